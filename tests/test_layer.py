"""DilatedSelfAttention against nn.MultiheadAttention, and what it refuses."""

import warnings

import pytest
import torch
from torch import nn

from longnet import DilatedSelfAttention, DilationPattern, dilated_attention

DENSE = DilationPattern((64,), (1,))
DILATED = DilationPattern((8, 16), (1, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_dense_branch_is_multihead_attention(bias, is_causal):
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True, dtype=torch.float64)
    ours = DilatedSelfAttention(24, 4, DENSE, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 8:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64).isinf() if is_causal else None
    expected, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=is_causal, need_weights=False)
    got = ours(x, key_padding_mask=padding, is_causal=is_causal)
    assert torch.allclose(got[~padding], expected[~padding], rtol=0, atol=1e-12)
    alone = ours(x[0], is_causal=is_causal)
    assert torch.allclose(alone, got[0], rtol=0, atol=1e-12)


def test_initialisation_is_multihead_attentions():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    torch.manual_seed(0)
    ours = DilatedSelfAttention(24, 4, DENSE)
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys()
    for name in ("in_proj_bias", "out_proj.bias"):
        assert not mine[name].any()
    assert mine["in_proj_weight"].std().item() == pytest.approx(yours["in_proj_weight"].std().item(), rel=0.05)


def test_grouped_heads_rotary_positions_and_gradients_are_the_ops():
    layer = DilatedSelfAttention(24, 6, DILATED, num_kv_heads=2, rope=100.0, dtype=torch.float64)
    x = torch.randn(1, 21, 24, dtype=torch.float64, requires_grad=True)
    heads = (x @ layer.in_proj_weight.T + layer.in_proj_bias).view(1, 21, 10, 4).transpose(1, 2)
    angles = torch.arange(21.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    turned = torch.view_as_complex(torch.stack([heads[..., :2], heads[..., 2:]], -1).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    turned = torch.cat([turned.real, turned.imag], -1)
    out = dilated_attention(turned[:, :6], turned[:, 6:8], heads[:, 8:], DILATED, is_causal=True)
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    got = layer(x, is_causal=True)
    assert torch.allclose(got, expected, rtol=0, atol=1e-7)  # the rotation's tables are exact, the test's are not
    got.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_packed_documents_and_padding_are_separate_rows():
    layer = DilatedSelfAttention(16, 2, DILATED, rope=10_000.0, dtype=torch.float64)
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    packed = layer(x, is_causal=True, cu_seqlens=torch.tensor([0, 13, 30]))
    assert torch.allclose(packed[0, 13:], layer(x[0, 13:], is_causal=True), rtol=0, atol=1e-12)
    padded = layer(x, is_causal=True, key_padding_mask=torch.arange(30)[None] < 13)
    assert torch.allclose(padded[0, 13:], packed[0, 13:], rtol=0, atol=1e-12)


def test_a_row_of_padding_warns_once():
    layer = DilatedSelfAttention(16, 2, DILATED)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [True] * 5])
    with pytest.warns(UserWarning, match="all padding: True means padding here"):
        layer(x, key_padding_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, key_padding_mask=mask)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_mask": None}, "attn_mask: an arbitrary mask cannot be honoured: is_causal, key_padding_mask"),
        ({"need_weights": False}, "need_weights: the attention weights are never formed"),
        ({"padding_mask": None}, "key_padding_mask=~padding_mask"),
        ({"speed": 9}, "speed: DilatedSelfAttention has no such keyword"),
    ],
)
def test_what_cannot_be_honoured_says_what_to_do(keywords, message):
    with pytest.raises(TypeError, match=message):
        DilatedSelfAttention(16, 2, DILATED)(torch.randn(1, 4, 16), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dropout": 0.1}, "dropout: attention dropout is not supported"),
        ({"batch_first": True}, "batch_first: rows are .* leave batch_first away"),
        ({"speed": 9}, "speed: DilatedSelfAttention has no such keyword"),
    ],
)
def test_keywords_of_the_dense_layers_constructor_say_what_to_do(keywords, message):
    with pytest.raises(TypeError, match=message):
        DilatedSelfAttention(16, 2, DILATED, **keywords)


def test_query_key_and_value_are_one():
    x = torch.randn(1, 4, 16)
    with pytest.raises(TypeError, match=r"got 3 tensors: this is self-attention.*layer\(x\), which returns the output"):
        DilatedSelfAttention(16, 2, DILATED)(x, x, x)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
        DilatedSelfAttention(16, 3, DILATED)
    with pytest.raises(ValueError, match="rope must be the base"):
        DilatedSelfAttention(6, 2, DILATED, rope=10_000.0)
    with pytest.raises(TypeError, match=r"DilationPattern.parse reads text"):
        DilatedSelfAttention(16, 2, "8:1")
    layer = DilatedSelfAttention(16, 2, DILATED)
    with pytest.raises(ValueError, match=r"x must be \(batch, tokens, 16\)"):
        layer(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="True for padding, got"):
        layer(torch.randn(1, 4, 16), key_padding_mask=torch.zeros(1, 4))
    assert "16, 2, 8:1,16:2" in repr(layer)


def test_it_compiles_whole():
    layer = DilatedSelfAttention(16, 2, DILATED, rope=10_000.0)
    x = torch.randn(1, 20, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, is_causal=True), layer(x, is_causal=True))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attn_mask": None}, "attn_mask: an arbitrary mask cannot be honoured: is_causal, padding_mask"),
        ({"enable_gqa": True}, "enable_gqa: grouped heads need no flag"),
        ({"key_padding_mask": None}, "padding_mask, True for a real token: pass the opposite"),
        ({"speed": 9}, "speed: dilated_attention has no such keyword"),
    ],
)
def test_the_op_says_what_to_do_instead_of_keywords_of_sdpa(keywords, message):
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(TypeError, match=message):
        dilated_attention(q, q, q, DILATED, **keywords)
