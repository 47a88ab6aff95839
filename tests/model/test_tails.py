"""torchscale's tail from the op: forward and gradient against a dense softmax written from its description."""

import pytest
import torch

from longnet.model.configuration import LongNetConfig
from longnet.model.tails import tail_of
from model.plain_torchscale import as_trained


@pytest.mark.parametrize(
    ("lengths", "rates", "rows"),
    [
        ((8, 16, 32), (1, 2, 4), [50, 64]),
        ((8, 16, 32), (1, 2, 4), [11, 3]),
        ((8, 18, 34), (1, 2, 4), [60, 34]),
        ((7, 9, 22), (1, 2, 4), [50, 8]),
        ((5, 11, 13), (1, 3, 8), [40, 1]),
    ],
)
def test_forward_and_gradient_are_those_of_the_dense_softmax(lengths, rates, rows):
    config = LongNetConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=8, is_causal=False, tail="torchscale",
        segment_lengths=lengths, dilation_rates=rates, head_offsets="block", position_embedding="none",
    )  # fmt: skip
    tokens = max(rows)
    q, k, v = (torch.randn(2, 4, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([[row, 0, stop] for row, stop in enumerate(rows)])
    tail = tail_of(config, torch.empty(2, tokens, 32, dtype=q.dtype), bounds)
    out = tail.attend(q, k, v, scale=8**-0.5)
    expected = as_trained(q, k, v, list(zip(lengths, rates, strict=True)), bounds.tolist())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    weight = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_where_it_cannot_be_had_it_is_refused():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    with pytest.raises(ValueError, match="a causal model never sees the zero keys"):
        LongNetConfig(**sizes, tail="torchscale")
    with pytest.raises(ValueError, match="rotate_offsets=False"):
        LongNetConfig(**sizes, tail="torchscale", is_causal=False, rotate_offsets=True)
