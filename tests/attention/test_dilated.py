"""The op against the float64 oracle, on anything that it may be given."""

import itertools

import pytest
import torch
from hypothesis import given

from cases import DEVICES, Case, cases
from longnet import DilationPattern, dilated_attention
from tolerances import (
    FLOAT64,
    SAME_FLOAT32,
    assert_as_good_as_plain,
    factor_of,
    rounding_floor,
)

PATTERN = DilationPattern((16, 32, 48, 64), (1, 2, 3, 5))


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_float64_is_the_oracle(case, device):
    exact = case.run("reference", torch.float64)
    for name, got in case.run("sdpa", torch.float64, device).items():
        torch.testing.assert_close(got, exact[name], atol=FLOAT64, rtol=FLOAT64, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_every_dtype_errs_no_more_than_plain_pytorch(case, dtype, device):
    # Inputs are rounded first: the oracle sees what the op sees.
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    exact = case.run("reference", torch.float64)
    plain = case.run("reference", dtype)
    logit, magnitudes = case.magnitudes()
    for name, got in case.run("sdpa", dtype, device).items():
        assert got.dtype == (torch.float32 if name == "lse" else dtype)
        floor = rounding_floor(dtype, logit, magnitudes[name])
        assert_as_good_as_plain(name, got, plain[name], exact[name], factor_of(name), floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 1000])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_odd_lengths_at_model_width(tokens, is_causal, dtype, device):
    """FlashAttention's criterion as it stands, no floor but four roundings of the result."""
    q = torch.randn(2, tokens, 8, 64).transpose(1, 2).to(dtype)
    k, v = (torch.randn(2, tokens, 2, 64).transpose(1, 2).to(dtype) for _ in "kv")
    dout = torch.randn(2, 8, tokens, 64).to(dtype)
    runs = {"got": ("sdpa", dtype), "plain": ("reference", dtype), "exact": ("reference", torch.float64)}
    results = {}
    for run, (backend, run_dtype) in runs.items():
        place = device if run == "got" else "cpu"
        inputs = [x.to(place, run_dtype).requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*inputs, PATTERN, is_causal=is_causal, backend=backend)
        results[run] = [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, inputs, dout.to(place, run_dtype)))]
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        got, plain, exact = (results[run][index] for run in ("got", "plain", "exact"))
        in_tf32 = device == "cuda" and dtype == torch.float32
        assert_as_good_as_plain(name, got, plain, exact, factor_of(name, in_tf32=in_tf32))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", [11, 5])
@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(is_causal, queries, device):
    pattern = DilationPattern((4, 6, 11), (1, 2, 3))
    q = torch.randn(1, 4, queries, 3, dtype=torch.float64, device=device, requires_grad=True)
    k, v = (torch.randn(1, 2, 11, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in "kv")
    assert torch.autograd.gradcheck(lambda *x: dilated_attention(*x, pattern, is_causal=is_causal), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_120(dtype, device):
    q = (torch.randint(0, 2, (1, 2, 80, 1)) * 2.0 - 1) * (120 * 16**0.5) ** 0.5 * torch.eye(1, 16)[0]
    k = (torch.randint(0, 2, (1, 2, 80, 1)) * 2.0 - 1) * (120 * 16**0.5) ** 0.5 * torch.eye(1, 16)[0]
    case = Case(*(x.to(dtype).double() for x in (q, k, torch.randn(1, 2, 80, 16))), PATTERN, is_causal=True)
    exact, plain = case.run("reference", torch.float64), case.run("reference", dtype)
    got = case.run("sdpa", dtype, device)
    logit, magnitudes = case.magnitudes()
    assert logit == pytest.approx(120, rel=0.01)
    assert exact["lse"].min() < -100
    assert exact["lse"].max() > 100
    for name in got:
        floor = rounding_floor(dtype, logit, magnitudes[name])
        assert_as_good_as_plain(name, got[name], plain[name], exact[name], factor_of(name), floor)


def assert_same(a, b):
    """To the last bit on the CPU; CUDA kernels may split rows by their number."""
    tolerance = 0 if a.device.type == "cpu" else SAME_FLOAT32
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("device", DEVICES)
def test_padded_is_unpadded(side, is_causal, device):
    lengths = (70, 33, 1, 0)
    q, k, v = torch.randn(3, 4, 4, 70, 8).to(device)
    mask = torch.zeros(4, 70, dtype=torch.bool, device=device)
    for row, length in enumerate(lengths):
        mask[row, 70 - length :] = side == "left"
        mask[row, :length] |= side == "right"
    for x in (q, k, v):
        x.transpose(1, 2)[~mask] = torch.nan  # padding is never read
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*inputs, PATTERN, is_causal=is_causal, padding_mask=mask)
    assert (out.transpose(1, 2)[~mask] == 0).all()
    out.sum().backward()
    for row, length in enumerate(lengths):
        real = mask[row]
        if not length:
            continue
        alone = [x[row : row + 1, :, real].clone().requires_grad_() for x in (q, k, v)]
        expected = dilated_attention(*alone, PATTERN, is_causal=is_causal)
        assert_same(out[row, :, real], expected[0])
        expected.sum().backward()
        for x, y in zip(inputs, alone, strict=True):
            torch.testing.assert_close(x.grad[row, :, real], y.grad[0], atol=SAME_FLOAT32, rtol=SAME_FLOAT32)
            assert (x.grad.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_packed_is_separate(is_causal, device):
    lengths = [70, 1, 0, 33, 64]
    edges = [0, *itertools.accumulate(lengths)]
    q, k, v = (torch.randn(1, 4, sum(lengths), 8, device=device, requires_grad=True) for _ in "qkv")
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    out, lse = dilated_attention(q, k, v, PATTERN, is_causal=is_causal, cu_seqlens=cu_seqlens, return_lse=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        alone = [x.detach()[:, :, start:stop].clone().requires_grad_() for x in (q, k, v)]
        expected, expected_lse = dilated_attention(*alone, PATTERN, is_causal=is_causal, return_lse=True)
        assert_same(out[:, :, start:stop], expected)
        assert_same(lse[:, :, start:stop], expected_lse)
        for grad, want in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
            torch.testing.assert_close(grad[:, :, start:stop], want, atol=SAME_FLOAT32, rtol=SAME_FLOAT32)


@pytest.mark.parametrize("device", DEVICES)
def test_cached_decoding_step_by_step_is_the_full_forward(device):
    q, k, v = torch.randn(3, 2, 4, 150, 8).to(device)
    full = dilated_attention(q, k, v, PATTERN, is_causal=True)
    for now in range(1, 151):
        step = dilated_attention(q[:, :, now - 1 : now], k[:, :, :now], v[:, :, :now], PATTERN, is_causal=True)
        torch.testing.assert_close(step, full[:, :, now - 1 : now], atol=SAME_FLOAT32, rtol=SAME_FLOAT32)


def test_one_branch_of_everything_is_scaled_dot_product_attention():
    q, k, v = (torch.randn(2, 4, 100, 16, requires_grad=True) for _ in "qkv")
    for is_causal in (True, False):
        got = dilated_attention(q, k, v, DilationPattern((128,), (1,)), is_causal=is_causal, scale=0.3)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_250_repeats_are_bitwise_equal():
    q, k, v = (torch.randn(1, 4, 200, 16, requires_grad=True) for _ in "qkv")

    def run():
        out, lse = dilated_attention(q, k, v, PATTERN, is_causal=True, return_lse=True)
        return (out.detach(), lse, *torch.autograd.grad(out.sum(), (q, k, v)))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # one thread cannot race
    torch.use_deterministic_algorithms(False)
    try:
        first = run()
        for _ in range(250):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_only_inputs_and_outputs_are_saved():
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in "qkv")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = dilated_attention(q, k, v, PATTERN, is_causal=True, return_lse=True)
    held = {x.untyped_storage().data_ptr() for x in (q, k, v, out, lse)}
    assert saved
    assert {x.untyped_storage().data_ptr() for x in saved} == held


def test_lse_carries_no_gradient():
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in "qkv")
    for backend in ("sdpa", "reference"):
        _, lse = dilated_attention(q, k, v, PATTERN, return_lse=True, backend=backend)
        assert not lse.requires_grad


def test_a_query_that_no_branch_keeps_gets_zero():
    with pytest.warns(UserWarning, match="no branch of dilation rate 1"):
        pattern = DilationPattern((8,), (2,))
    q, k, v = torch.randn(3, 1, 1, 10, 4)
    out, lse = dilated_attention(q, k, v, pattern, return_lse=True)
    assert (out[:, :, 1::2] == 0).all()
    assert (lse[:, :, 1::2] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, ::2]).all()


@pytest.mark.parametrize("shape", [(0, 2, 8, 4), (2, 2, 0, 4)])
def test_empty_inputs_give_empty_outputs(shape):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in "qkv")
    out = dilated_attention(q, k, v, PATTERN, is_causal=True)
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape


def test_no_queries_of_many_keys():
    k, v = torch.randn(2, 1, 2, 8, 4)
    assert dilated_attention(k[:, :, :0], k, v, PATTERN).shape == (1, 2, 0, 4)


Q = torch.zeros(2, 4, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((Q[0], Q, Q), {}, ValueError, "must be .batch, heads, tokens, head dim."),
        ((Q, Q, Q[:, :, :4]), {}, ValueError, "k and v must be alike"),
        ((Q, Q[:1], Q[:1]), {}, ValueError, "share batch and head dim"),
        ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, "multiple of the key/value heads"),
        ((Q, Q[:, :, :4], Q[:, :, :4]), {}, ValueError, "at least as many keys"),
        ((Q[..., :0], Q[..., :0], Q[..., :0]), {}, ValueError, "head dim must be at least 1"),
        ((Q, Q.double(), Q.double()), {}, ValueError, "one floating-point dtype"),
        ((Q.long(), Q.long(), Q.long()), {}, ValueError, "one floating-point dtype"),
        ((Q, Q.to("meta"), Q.to("meta")), {}, ValueError, "on one device"),
        ((Q, Q, Q), {"padding_mask": torch.ones(2, 8)}, ValueError, "must be bool"),
        ((Q, Q, Q), {"padding_mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, "batch, tokens of k"),
        ((Q, Q, Q), {"padding_mask": torch.tensor([[True, False] * 4] * 2)}, ValueError, r"rows \[0, 1\] have gaps"),
        ((Q, Q, Q), {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "a batch of 1, got a batch of 2"),
        ((Q[:1],) * 3, {"cu_seqlens": torch.tensor([0.0, 8])}, ValueError, "must be .documents . 1,. int32"),
        ((Q[:1],) * 3, {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "rise from 0 to the number of tokens, 8"),
        ((Q[:1],) * 3, {"cu_seqlens": torch.tensor([0, 5, 4, 8])}, ValueError, "rise from 0"),
        ((Q[:1],) * 3, {"cu_seqlens": torch.tensor([8])}, ValueError, "rise from 0"),
        ((Q, Q, Q), {"dropout_p": 0.1}, NotImplementedError, "attention_dropout=0.0"),
        ((Q, Q, Q), {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_calls_are_refused(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        dilated_attention(*arguments, PATTERN, **keywords)


def test_two_masks_are_refused():
    mask = {"padding_mask": torch.ones(1, 8, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match="not both"):
        dilated_attention(Q[:1], Q[:1], Q[:1], PATTERN, **mask)
    with pytest.raises(TypeError, match="must be a DilationPattern, got str"):
        dilated_attention(Q, Q, Q, "2048:1")


@pytest.mark.parametrize("queries", ["kept", "all"])
@pytest.mark.parametrize("head_offsets", ["mod", "block"])
@pytest.mark.parametrize("shards", [(2, 2, 2, 2), (1, 3, 4), (5, 3)])
def test_heads_on_several_ranks_are_those_of_one(shards, head_offsets, queries):
    """Eight heads in shards, against rates that a shard has too few heads for: offsets are those of the whole."""
    pattern = DilationPattern((16, 32, 64), (1, 3, 5), head_offsets, queries)
    q, k, v = torch.randn(1, 16, 150, 8), torch.randn(1, 8, 150, 8), torch.randn(1, 8, 150, 8)
    whole = dilated_attention(q, k, v, pattern, is_causal=True)
    for first, size in zip(itertools.accumulate(shards, initial=0), shards, strict=False):
        heads, query_heads = slice(first, first + size), slice(2 * first, 2 * (first + size))
        part = dilated_attention(q[:, query_heads], k[:, heads], v[:, heads], pattern.shard(first, 8), is_causal=True)
        torch.testing.assert_close(part, whole[:, query_heads], atol=SAME_FLOAT32, rtol=SAME_FLOAT32)
    with pytest.raises(ValueError, match="shard of 8 key/value heads from 6 on, got 3"):
        dilated_attention(q[:, :6], k[:, :3], v[:, :3], pattern.shard(6, 8))


def test_all_queries_at_rate_one_are_the_kept_ones_bit_for_bit():
    q, k, v = (torch.randn(1, 4, 150, 8, requires_grad=True) for _ in "qkv")
    results = []
    for queries in ("kept", "all"):
        out = dilated_attention(q, k, v, DilationPattern((16, 64), (1, 1), queries=queries), is_causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 4, 9)])
def test_sinks_of_another_shape_are_refused(sinks):
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    with pytest.raises(ValueError, match=r"sinks must be \(query heads,\) = \(4,\) or .* = \(2, 4, 10\)"):
        dilated_attention(q, k, v, PATTERN, sinks=sinks)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = torch.randn(3, 2, 4, 40, 8)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    sinks = torch.full((4,), -torch.inf, requires_grad=True)
    out, lse = dilated_attention(q, k, v, PATTERN, padding_mask=mask, sinks=sinks, return_lse=True)
    plain, plain_lse = dilated_attention(q, k, v, PATTERN, padding_mask=mask, return_lse=True)
    assert_same(out, plain)
    assert_same(lse, plain_lse)
    assert (torch.autograd.grad(out.sum(), sinks)[0] == 0).all()
