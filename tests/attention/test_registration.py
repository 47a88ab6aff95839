"""What PyTorch does with the op: compile, autocast, checkpoint, count, fake."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longnet import DilationPattern, dilated_attention
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention
from tolerances import SAME_FLOAT32

PATTERN = DilationPattern((16, 32, 64), (1, 2, 4))


def inputs(tokens=70, queries=None, heads=4, kv_heads=2, dtype=torch.float32):
    q = torch.randn(2, queries or tokens, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, kv_heads, tokens, 8, dtype=dtype, requires_grad=True) for _ in "kv")
    return q, k, v


def test_compile_fullgraph_with_a_dynamic_length_compiles_once():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    pattern = DilationPattern((16, 32, 64), (1, 2, 4), queries="all", offset_shift=1)
    sinks = torch.randn(4, requires_grad=True)

    def loss(q, k, v, mask):
        out = dilated_attention(q * 1.0, k, v, pattern, is_causal=True, padding_mask=mask, sinks=sinks)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (70, 33, 129):
        q, k, v = inputs(tokens)
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[0, :5] = False
        got, want = (torch.autograd.grad(f(q, k, v, mask), (q, k, v, sinks)) for f in (compiled, loss))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("masks", [{}, {"cu_seqlens": torch.tensor([0, 20, 50])}])
def test_compile_with_inductor(masks):
    torch._dynamo.reset()

    def loss(q, k, v):
        out, lse = dilated_attention(q + 1, k, v, PATTERN, is_causal=True, return_lse=True, **masks)
        return out.square().sum() + 0 * lse.sum()

    q, k, v = (x[:1].detach().requires_grad_() for x in inputs(50))
    compiled = torch.compile(loss, fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(got, want, atol=SAME_FLOAT32, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's own opcheck
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("bounds", [None, torch.tensor([[0, 3, 40], [1, 0, 70]])])
@pytest.mark.parametrize("queries", ["kept", "all"])
def test_opcheck(queries, is_causal, bounds):
    settings = ([16, 32], [1, 2], "mod", queries, 1, [2, 6], 0, is_causal, 0.3, "sdpa")
    q, k, v = inputs()
    sinks = torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.longnet.dilated_attention.default, (q, k, v, bounds, sinks, *settings))
    settings = ([16, 32], [1, 2], "mod", queries, 0, [], 2, is_causal, 0.3, "sdpa")
    expanded = torch.randn(2, 1, 70, 8).expand(2, 4, 70, 8)
    strided = torch.randn(2, 4, 8, 70).transpose(2, 3)
    torch.library.opcheck(
        torch.ops.longnet.dilated_attention.default, (expanded, strided, strided, bounds, None, *settings)
    )


def test_opcheck_of_the_backward_and_of_the_bounds():
    q, k, v = (x.detach() for x in inputs())
    out, lse = dilated_attention(q, k, v, PATTERN, return_lse=True)
    torch.library.opcheck(
        torch.ops.longnet.dilated_attention_backward.default,
        (
            torch.ones_like(out),
            q,
            k,
            v,
            out,
            lse,
            None,
            [16, 32, 64],
            [1, 2, 4],
            "mod",
            "kept",
            0,
            [],
            0,
            False,
            0.3,
            "sdpa",
        ),
    )
    torch.library.opcheck(torch.ops.longnet.padding_bounds.default, (torch.ones(2, 9, dtype=torch.bool),))
    torch.library.opcheck(torch.ops.longnet.document_bounds.default, (torch.tensor([0, 4, 9]), 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_runs_in_the_lower_dtype(dtype, backend):
    q, k, v = inputs()
    with torch.autocast("cpu", dtype):
        got = dilated_attention(q, k, v, PATTERN, is_causal=True, backend=backend)
    want = dilated_attention(q.to(dtype), k.to(dtype), v.to(dtype), PATTERN, is_causal=True, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    got.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert dilated_attention(*inputs(dtype=torch.float64), PATTERN).dtype == torch.float64


def test_autocast_takes_mixed_dtypes_as_sdpa_does():
    q, k, v = inputs()
    mixed = (q, k.bfloat16(), v.half())
    fixed = SparseFixedPattern(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.scaled_dot_product_attention(q[:, :2], *mixed[1:])  # what it does not refuse
        got = dilated_attention(*mixed, PATTERN, is_causal=True), sparse_fixed_attention(*mixed, fixed)
        with pytest.raises(ValueError, match="one floating-point dtype"):  # float64 stays, as there
            dilated_attention(q.double(), k, v, PATTERN)
    cast = [x.bfloat16() for x in mixed]
    want = dilated_attention(*cast, PATTERN, is_causal=True), sparse_fixed_attention(*cast, fixed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    q, k, v = inputs()

    def block(q, k, v):
        return dilated_attention(q.sin(), k, v, PATTERN, is_causal=True)

    want = torch.autograd.grad(block(q, k, v).square().sum(), (q, k, v))
    checkpoint(block, q, k, v, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip((q, k, v), want, strict=True))


@pytest.mark.parametrize("is_causal", [True, False])
def test_flop_counter_counts_the_closed_form(is_causal):
    q, k, v = inputs(tokens=70)
    with FlopCounterMode(display=False) as counter:
        out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal)
    forward = 2 * PATTERN.flops(tokens=70, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=is_causal)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_flop_counter_counts_the_closed_form_of_the_fixed_pattern():
    q, k, v = inputs(tokens=70)
    pattern = SparseFixedPattern(16, 4, 9)
    with FlopCounterMode(display=False) as counter:
        out = sparse_fixed_attention(q, k, v, pattern)
    forward = 2 * pattern.flops(tokens=70, num_heads=4, head_dim=8)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        sparse_fixed_attention(*(torch.empty(2, 4, 70, 8) for _ in "qkv"), pattern)
    assert counter.get_total_flops() == forward


MASKS = {
    "none": dict,
    "padding": lambda: {"padding_mask": torch.ones(1, 70, dtype=torch.bool)},
    "packing": lambda: {"cu_seqlens": torch.tensor([0, 20, 70])},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_fake_tensors(backend, masks):
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 4, 70, 8, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        keywords = {"is_causal": True, "return_lse": True, "backend": backend, **MASKS[masks]()}
        out, lse = dilated_attention(q, k, v, PATTERN, **keywords)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        assert (lse.shape, lse.dtype) == ((1, 4, 70), torch.float32)
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
            assert grad.stride() == x.stride() or backend == "reference"


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_meta_tensors(backend):
    out = dilated_attention(*(torch.empty(2, 4, 70, 8, device="meta") for _ in "qkv"), PATTERN, backend=backend)
    assert (out.shape, out.device.type) == ((2, 4, 70, 8), "meta")


def test_output_has_the_memory_layout_of_the_queries():
    for q in (inputs()[0], inputs()[0].detach().contiguous(), torch.randn(2, 70, 3, 4, 8)[:, :, 1].transpose(1, 2)):
        _, k, v = inputs()
        for pattern in (PATTERN, DilationPattern((128,), (1,))):  # the first tile in one call, or alone
            out = dilated_attention(q, k, v, pattern)
            assert out.stride() == torch.empty_like(q).stride()
