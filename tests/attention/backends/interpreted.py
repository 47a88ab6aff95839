"""The fused kernels in Triton's interpreter, on the CPU: test_triton.py runs this file in a process of its own.

The interpreter is chosen as kernels are defined, and runs programs one after the other: what is missing between two of
them, or two threads of one, does not show here.
"""

import pytest
import torch
from hypothesis import given, settings

from cases import Case, cases
from longnet import DilationPattern, dilated_attention
from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as_plain, rounding_floor


def check(case: Case, dtype: torch.dtype) -> None:
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    exact = case.run("reference", torch.float64)
    plain = case.run("reference", dtype)
    logit, magnitudes = case.magnitudes()
    for name, got in case.run("triton", dtype).items():
        factor = FORWARD_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
        floor = rounding_floor(dtype, logit, magnitudes[name])
        assert_as_good_as_plain(name, got, plain[name], exact[name], factor, floor)


@settings(max_examples=8)
@given(case=cases(head_dims=(16, 24), max_tokens=24, max_kv_heads=2, max_batch=2, min_length=5))
def test_any_call_in_float32(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=2)
@given(case=cases(head_dims=(16,), max_tokens=24, max_kv_heads=2, max_batch=2, min_length=5))
def test_any_call_in_16_bits(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("queries", ["kept", "all"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_segments_of_many_blocks(is_causal, queries, monkeypatch):
    """Several blocks of rows and of keys a segment, whole and ragged ones, and several programs' blocks a segment."""
    monkeypatch.setattr(launch, "forward_blocks", lambda *_: launch.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(launch, "query_blocks", lambda *_: launch.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(launch, "key_blocks_of", lambda *_: launch.Blocks(16, 16, 4, 1))
    pattern = DilationPattern((40, 70), (1, 3), queries=queries)
    q, k, v = (torch.randn(1, heads, 90, 16, dtype=torch.float64) for heads in (2, 1, 1))
    check(Case(q, k, v, pattern, is_causal), torch.float32)


def test_merging_in_one_launch():
    assert dispatch._disagreement(torch.device("cpu")) < 1e-6


def test_the_same_bits_at_every_run():
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in "qkv")

    def run():
        out = dilated_attention(q, k, v, DilationPattern((16, 48), (1, 3)), is_causal=True, backend="triton")
        return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_memory_that_nobody_wrote_is_not_read():
    """Padding and what lies behind the tensors is NaN, and conftest fills new memory with NaN."""
    q, k, v = (torch.full((1, 2, 60, 32), torch.nan)[:, :, 10:50, :16] for _ in "qkv")
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 7:29] = True
    for x in (q, k, v):
        x[:, :, 7:29] = torch.randn(1, 2, 22, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, DilationPattern((8, 16), (1, 3)), padding_mask=mask, backend="triton")
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out[:, :, 7:29].sum(), leaves):
        assert torch.isfinite(grad).all()
        assert (grad[:, :, :7] == 0).all()


def test_layouts_of_the_results_are_those_that_were_promised():
    q = torch.randn(1, 40, 2, 16).transpose(1, 2)
    arguments = (None, None, *DilationPattern((16, 32), (1, 2)).arguments, True, 0.25, "triton")
    torch.library.opcheck(torch.ops.longnet.dilated_attention, (q, q, q, *arguments), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(torch.float64, 16, "has no torch.float64"), (torch.float32, 20, "multiple of 8 from 16 to 256, got 20")],
)
def test_what_it_cannot_run_is_refused(dtype, head_dim, message):
    q = torch.zeros(1, 1, 8, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        dilated_attention(q, q, q, DilationPattern((4,), (1,)), backend="triton")
