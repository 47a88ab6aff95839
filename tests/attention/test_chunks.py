"""A sequence that comes in chunks, forward and backward, against the oracle on the whole of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention import reference
from longnet.attention.chunks import Chunk, Tape
from stretches import learn, sequences


@settings(max_examples=150)
@given(
    sequences(), patterns(), st.integers(1, 5), st.integers(1, 2), st.sampled_from([None, 1, 3]), st.integers(0, 2**31)
)
def test_chunks_compute_what_one_pass_does(sequence, pattern, kv_heads, group, sinks_ndim, seed):
    tokens, batch, bounds, chunk_tokens = sequence
    torch.manual_seed(seed)
    heads, layers, pairs = kv_heads * group, [], []
    for layer in range(2):
        q, dout = (torch.randn(batch, heads, tokens, 4, dtype=torch.float64) for _ in range(2))
        k, v = (torch.randn(batch, kv_heads, tokens, 4, dtype=torch.float64) for _ in range(2))
        shape = {None: None, 1: (heads,), 3: (batch, heads, tokens)}[sinks_ndim]
        sinks = None if shape is None else torch.randn(shape, dtype=torch.float64)
        layers.append((q, k, v, dout, sinks))
        pairs.append(pattern.shifted(layer))
    found = learn(layers, Tape(pairs, tokens=tokens, chunk_tokens=chunk_tokens, bounds=bounds))
    for (*qkv, dout, sinks), shifted, results in zip(layers, pairs, found, strict=True):
        inputs = [x.clone().requires_grad_() for x in (*qkv, *(() if sinks is None else (sinks,)))]
        out, _ = reference.attend(
            *inputs[:3], shifted, bounds=bounds, is_causal=True, scale=0.4, sinks=(*inputs, None)[3]
        )
        expected = [out, *torch.autograd.grad(out, inputs, dout)]
        for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), results, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_from_later_chunks_keep_float32_where_keys_have_less():
    pattern, tokens = DilationPattern((8, 64), (1, 4)), 64
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, tokens, 16).bfloat16().double() for _ in range(4)]
    bounds = torch.tensor([[0, 0, tokens]])
    (results,) = learn(
        [(*(x.bfloat16() for x in exact), None)], Tape([pattern], tokens=tokens, chunk_tokens=8, bounds=bounds)
    )
    inputs = [x.requires_grad_() for x in exact[:3]]
    out, _ = reference.attend(*inputs, pattern, bounds=None, is_causal=True, scale=0.4)
    expected = torch.autograd.grad(out, inputs, exact[3])
    for a, b in zip(results[1:], expected, strict=True):
        assert (a.double() - b).abs().max() <= 2**-7 * b.abs().max()  # one rounding of the result, not one a chunk


def test_a_branch_whose_segments_end_with_chunks_has_no_place():
    bounds = torch.tensor([[0, 0, 256]])
    tape = Tape([DilationPattern((16, 32, 64, 128), (1, 2, 4, 8))], tokens=256, chunk_tokens=32, bounds=bounds)
    assert tape.places == (0, 0, 0, 16, 32)
    assert tape.rows_given(1).tolist() == [12, 4, 12, 0] * 2
    assert tape.rows_given(3).tolist() == [36, 12, 36, 0] * 2


def test_what_does_not_fit_is_said():
    pattern, bounds = DilationPattern((16,), (1,)), torch.tensor([[0, 0, 64]])
    tape = Tape([pattern], tokens=64, chunk_tokens=24, bounds=bounds)
    x = torch.zeros(1, 1, 24, 4)
    chunk = Chunk(tape, 0, is_learning=False)
    with pytest.raises(
        ValueError, match="holds 24 tokens for 1 layers with the pattern 16:1, got 20 queries of layer 0"
    ):
        chunk.attend(0, *[x[:, :, :20]] * 3, pattern, scale=1.0)
    with pytest.raises(ValueError, match="of layer 1"):
        chunk.attend(1, x, x, x, pattern, scale=1.0)
    with pytest.raises(ValueError, match="no chunk has been read"):
        chunk.restore(torch.zeros(8, 2, 4))
    chunk.attend(0, x, x, x, pattern, scale=1.0)
    with pytest.raises(ValueError, match="keys alike"):
        Chunk(tape, 1, is_learning=False).attend(0, *[x.double()] * 3, pattern, scale=1.0)
