"""The cases in which other implementations of LongNet fail. Sequence parallelism and xPos have theirs elsewhere."""

import pytest
import torch

from longnet import DilationPattern, dilated_attention
from tolerances import FLOAT64


def check(q, k, v, pattern, **keywords):
    got = dilated_attention(q, k, v, pattern, **keywords)
    want = dilated_attention(q, k, v, pattern, backend="reference", **keywords)
    torch.testing.assert_close(got, want, atol=FLOAT64, rtol=0)
    return got


def normal(*shape, std=1.0):
    return (std * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("tokens", [61, 40, 17])
@pytest.mark.parametrize("offsets", ["mod", "block"])
def test_torchscale_attends_to_zero_padded_tails(tokens, offsets):
    q, k, v = (normal(2, 4, tokens, 8) for _ in "qkv")
    check(q, k, v, DilationPattern((16, 32), (1, 2), offsets), is_causal=False)


@pytest.mark.parametrize("is_causal", [True, False])
def test_torchscale_shifts_segments_where_the_rate_does_not_divide(is_causal):
    # The paper's 16384/6 and 32768/12, a thousandth of the size: 16 = 2·6 + 4, 32 = 2·12 + 8.
    pattern = DilationPattern((8, 16, 32), (1, 6, 12))
    q, k, v = (normal(1, 12, 96, 8) for _ in "qkv")
    check(q, k, v, pattern, is_causal=is_causal)


@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
def test_torchscale_detaches_the_mixture_weights(std):
    q, k, v = (normal(1, 4, 64, 8, std=std**0.5) for _ in "qkv")
    pattern = DilationPattern((16, 32, 64), (1, 2, 4))
    grads = [
        torch.autograd.grad(
            dilated_attention(q, k, v, pattern, is_causal=True, backend=backend).square().sum(), (q, k, v)
        )
        for backend in ("sdpa", "reference")
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=FLOAT64 * std**2, rtol=FLOAT64)


def test_torchscale_fails_past_the_smallest_segment_when_cached():
    pattern = DilationPattern((4, 8), (1, 2))
    q, k, v = (normal(1, 2, 20, 4) for _ in "qkv")
    full = check(q, k, v, pattern, is_causal=True)
    for now in range(20):  # odd steps, and the first after position 4
        step = dilated_attention(
            q[:, :, now : now + 1], k[:, :, : now + 1], v[:, :, : now + 1], pattern, is_causal=True
        )
        torch.testing.assert_close(step[:, :, 0], full[:, :, now], atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("real", [57, 64])
def test_torchscale_and_gigapath_ignore_the_padding_mask(real):
    """A slide of 57 tiles, one CLS token among them, in a batch padded to 100."""
    q, k, v = (normal(1, 4, 100, 8) for _ in "qkv")
    mask = torch.arange(100)[None] < real
    padded = dilated_attention(q, k, v, DilationPattern((16, 32), (1, 2)), padding_mask=mask)
    alone = dilated_attention(*(x[:, :, :real] for x in (q, k, v)), DilationPattern((16, 32), (1, 2)))
    assert torch.equal(padded[:, :, :real], alone)
    assert (padded[:, :, real:] == 0).all()


def test_torchscale_takes_an_lse_of_zero_for_not_selected():
    q = torch.zeros(1, 1, 4, 4)  # logits 0, and one key in the causal first row: lse is exactly 0
    v = torch.randn(1, 1, 4, 4)
    out, lse = dilated_attention(q, q, v, DilationPattern((4,), (1,)), is_causal=True, return_lse=True)
    assert lse[0, 0, 0] == 0
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])


@pytest.mark.filterwarnings("ignore:.*no branch of dilation rate 1")
def test_torchscales_block_offsets_leave_phases_unseen_and_we_say_so():
    assert DilationPattern((12,), (4,), "block").coverage(tokens=12, num_kv_heads=6) == (0.75,)
    assert DilationPattern((12,), (4,), "mod").coverage(tokens=12, num_kv_heads=6) == (1.0,)


def test_fkodom_leaks_the_future():
    pattern = DilationPattern((16, 32, 64), (1, 2, 4))
    q, k, v = (normal(1, 4, 64, 8).detach() for _ in "qkv")
    before = dilated_attention(q, k, v, pattern, is_causal=True)
    for cut in (1, 17, 40, 63):
        altered = [x.clone() for x in (q, k, v)]
        for x in altered:
            x[:, :, cut:] = 1e3 * torch.randn_like(x[:, :, cut:])
        assert torch.equal(dilated_attention(*altered, pattern, is_causal=True)[:, :, :cut], before[:, :, :cut])


def test_fkodom_has_heads_that_are_always_zero_on_the_papers_pattern():
    pattern = DilationPattern((16, 32, 64, 128, 256), (1, 2, 4, 6, 12))
    out = dilated_attention(*(normal(1, 12, 256, 8) for _ in "qkv"), pattern, is_causal=True)
    assert (out.abs().amax((0, 2, 3)) > 0.1).all()
    assert out.abs().max() < 10  # a mean of values does not explode


def test_kyegomez_returns_fewer_tokens_and_knows_no_causality():
    q, k, v = (normal(2, 4, 50, 8) for _ in "qkv")
    assert check(q, k, v, DilationPattern((8, 16), (1, 4)), is_causal=True).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rozhkov_gives_nan_with_padding_and_overflows_on_large_logits(dtype):
    q, k, v = (normal(2, 2, 40, 8, std=20).detach().to(dtype).requires_grad_() for _ in "qkv")
    mask = torch.arange(40)[None] < torch.tensor([[0], [23]])
    out = dilated_attention(q, k, v, DilationPattern((8, 16), (1, 4)), is_causal=True, padding_mask=mask)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *grads))
