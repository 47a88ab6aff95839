"""The fixed pattern of the Sparse Transformer against a dense mask in float64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cases import DEVICES
from longnet import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention


def sees(pattern: SparseFixedPattern, tokens: int) -> torch.Tensor:
    """The definition, arXiv:1904.10509 §4.3, with block and stride apart."""
    stride = pattern.block if pattern.stride is None else pattern.stride
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (j <= i) & ((j // pattern.block == i // pattern.block) | (j % stride >= stride - pattern.summary))


def dense(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def tensors(batch, heads, kv_heads, q_tokens, tokens, dim=8):
    generator = torch.Generator().manual_seed(7)
    shapes = [(batch, heads, q_tokens, dim), *[(batch, kv_heads, tokens, dim)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("device", DEVICES)
@given(
    tokens=st.integers(1, 70),
    block=st.integers(1, 40),
    stride=st.none() | st.integers(1, 40),
    share=st.floats(0, 1),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    batch=st.integers(1, 2),
    queries=st.floats(0, 1),
)
def test_forward_and_gradient_are_those_of_the_dense_mask(tokens, block, stride, share, heads, batch, queries, device):
    pattern = SparseFixedPattern(block, 1 + round(share * ((stride or block) - 1)), stride)
    q_tokens = max(1, round(queries * tokens))
    inputs = [x.detach().to(device).requires_grad_() for x in tensors(batch, *heads, q_tokens, tokens)]
    out = sparse_fixed_attention(*inputs, pattern)
    expected = dense(*inputs, sees(pattern, tokens)[-q_tokens:].to(device))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-11, rtol=1e-11)


def test_runs_are_separate_sequences_and_the_rest_is_zero():
    pattern = SparseFixedPattern(8, 2)
    q, k, v = tensors(2, 4, 2, 45, 45)
    runs = [(0, 0, 20), (0, 20, 45), (1, 13, 45)]
    out = sparse_fixed_attention(q, k, v, pattern, bounds=torch.tensor(runs))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.zeros_like(out)
    for row, start, stop in runs:
        alone = sparse_fixed_attention(*(x[row : row + 1, :, start:stop] for x in (q, k, v)), pattern)
        expected = expected.index_put((torch.tensor([row]),), expected[row : row + 1]).clone()
        expected[row : row + 1, :, start:stop] = alone
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-13)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-12)
    assert out[1, :, :13].abs().max() == 0


def test_flops_count_the_dense_mask():
    for pattern in (SparseFixedPattern(8, 3), SparseFixedPattern(8, 3, 5), SparseFixedPattern(5, 2, 12)):
        for tokens in (0, 1, 7, 40, 61):
            pairs = int(sees(pattern, tokens).sum())
            assert pattern.flops(tokens=tokens, num_heads=3, head_dim=16) == 4 * 16 * 3 * pairs


def test_flop_counter_counts_the_closed_form():
    pattern = SparseFixedPattern(block=16, summary=3)
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 70, 70))
    with FlopCounterMode(display=False) as counter:
        out = sparse_fixed_attention(q, k, v, pattern)
    forward = 2 * pattern.flops(tokens=70, num_heads=4, head_dim=8)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_matching_the_paper_costs_what_longnet_costs():
    wanted = DilationPattern.paper().flops(tokens=32768, num_heads=12, head_dim=64, is_causal=True)
    pattern = SparseFixedPattern.matching(DilationPattern.paper(), tokens=32768, num_kv_heads=12)
    assert pattern.block == 2048
    found = pattern.flops(tokens=32768, num_heads=12, head_dim=64)
    one_more = SparseFixedPattern(2048, pattern.summary + 1).flops(tokens=32768, num_heads=12, head_dim=64) - found
    assert abs(found - wanted) <= one_more / 2
    with pytest.raises(ValueError, match="choose another block"):
        SparseFixedPattern.matching(DilationPattern((64,), (1,)), tokens=4096, block=2048)


MEMORY = """
import resource, torch
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention
q = torch.randn(1, 1, 32768, 16, requires_grad=True)
attend = lambda x: sparse_fixed_attention(x, x, x, SparseFixedPattern(2048, 64)).sum().backward()
attend(q[:, :, :4096])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(q)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_at_32k_is_linear():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 128 * 1024  # KiB; a boolean mask alone would take 1 GiB, q takes 2 MiB


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's own opcheck
def test_opcheck():
    q, k, v = tensors(1, 4, 2, 19, 19)
    torch.library.opcheck(torch.ops.longnet.sparse_fixed_attention, (q, k, v, None, None, 8, 8, 2, 0.3, "auto"))


@pytest.mark.parametrize("numbers", [(0, 1), (4, 0), (4, 5), (4, 3, 2)])
def test_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="at"):
        SparseFixedPattern(*numbers)


def test_shapes_that_do_not_fit():
    q, k, v = tensors(1, 3, 2, 8, 8)
    with pytest.raises(ValueError, match="multiple of G"):
        sparse_fixed_attention(q, k, v, SparseFixedPattern(4, 1))
    with pytest.raises(ValueError, match="on one device, got cpu, meta, meta"):
        sparse_fixed_attention(k, k.to("meta"), v.to("meta"), SparseFixedPattern(4, 1))
    with pytest.raises(ValueError, match='no backend="reference"'):
        sparse_fixed_attention(k, k, v, SparseFixedPattern(4, 1), backend="reference")
    with pytest.raises(TypeError, match="SparseFixedPattern"):
        sparse_fixed_attention(q, k, v, DilationPattern((4,), (1,)))
