"""Faults of the libraries below, each in the call that would meet it."""

import pytest
import torch

from longnet import DilationPattern, dilated_attention
from tolerances import SAME_FLOAT32

PATTERN = DilationPattern((16, 32), (1, 2))


def check(q, k, v, pattern=PATTERN, **keywords):
    got = dilated_attention(q, k, v, pattern, return_lse=True, **keywords)
    want = dilated_attention(q, k, v, pattern, return_lse=True, backend="reference", **keywords)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=SAME_FLOAT32, rtol=SAME_FLOAT32)
    return got


def test_no_tile_is_empty():
    # An empty q or k kills the process in ATen's CPU kernel; rates above the segment, heads above the rows: no rows.
    q, k, v = torch.randn(3, 1, 8, 33, 4)
    check(q, k, v, DilationPattern((16, 4, 3), (1, 7, 2)), is_causal=True)
    check(q, k, v, DilationPattern((16, 32), (1, 32)), is_causal=False)
    check(q[:, :, 32:], k, v, DilationPattern((16, 32), (1, 2)), is_causal=True)


def test_a_last_dim_of_another_stride_than_one():
    q, k, v = torch.randn(3, 1, 2, 8, 40).transpose(3, 4)
    check(q, k, v, is_causal=True)
    check(*torch.randn(3, 1, 2, 40, 16)[..., ::2], is_causal=True)


def test_rows_that_overlap():
    base = torch.randn(1, 2, 60)
    windows = base.unfold(2, 16, 1)  # rows one element apart
    check(windows, windows, windows, is_causal=True)
    leaf = base.clone().requires_grad_()
    other = base.clone().requires_grad_()
    dilated_attention(*[leaf.unfold(2, 16, 1)] * 3, PATTERN).square().sum().backward()
    dilated_attention(*[other.unfold(2, 16, 1).contiguous()] * 3, PATTERN).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_a_gradient_of_stride_zero():
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in "qkv")
    dilated_attention(q, k, v, PATTERN).sum().backward()  # sum's gradient is one number, expanded
    grad = q.grad.clone()
    q.grad = None
    (dilated_attention(q, k, v, PATTERN) * torch.ones(1, 2, 40, 8)).sum().backward()
    assert torch.equal(q.grad, grad)


def test_rows_that_are_all_padding_have_lse_minus_infinity():
    q, k, v = torch.randn(3, 2, 2, 20, 4)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 3:9] = True
    out, lse = check(q, k, v, padding_mask=mask)
    assert (lse.transpose(1, 2)[~mask] == -torch.inf).all()
    assert (out.transpose(1, 2)[~mask] == 0).all()


def test_lse_is_as_dense_as_the_queries():
    q = torch.randn(2, 40, 3, 4).transpose(1, 2)  # (B, T, H, D) in memory
    _, lse = dilated_attention(q, q, q, PATTERN, return_lse=True)
    assert lse.transpose(1, 2).is_contiguous()
    _, lse = dilated_attention(*[q.contiguous()] * 3, PATTERN, return_lse=True)
    assert lse.is_contiguous()


def test_more_than_65535_segments():
    q, k, v = torch.randn(3, 1, 1, 2 * 65535 + 9, 4)
    out = dilated_attention(q, k, v, DilationPattern((2,), (1,)), is_causal=True)
    assert torch.equal(out[:, :, ::2], v[:, :, ::2])
    last = dilated_attention(*(x[:, :, -1001:-1] for x in (q, k, v)), DilationPattern((2,), (1,)), is_causal=True)
    torch.testing.assert_close(out[:, :, -1001:-1], last)


def test_an_additive_or_boolean_mask_is_no_argument():
    with pytest.raises(TypeError, match="attn_mask"):
        dilated_attention(*torch.randn(3, 1, 1, 8, 4), PATTERN, attn_mask=torch.ones(8, 8, dtype=torch.bool))


@pytest.mark.deep
def test_offsets_beyond_two_to_the_31():
    tokens, dim = 2**23 + 70, 256  # 2³¹ elements and more in each tensor
    q = torch.randn(1, 1, 70, dim, dtype=torch.bfloat16).repeat(1, 1, -(-tokens // 70), 1)[:, :, :tokens]
    out = dilated_attention(q, q, q, DilationPattern((70,), (1,)), is_causal=True)
    assert out.numel() > 2**31
    first, last = out[:, :, :70], out[:, :, tokens // 70 * 70 - 70 : tokens // 70 * 70]
    assert torch.equal(first, last)
