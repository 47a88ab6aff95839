"""The streaming state against the oracle on the whole sequence, in any pieces, at any position."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention import reference
from longnet.attention.branches import kept_rows
from longnet.attention.streaming import StreamState
from stretches import Text, texts
from tolerances import assert_as_good_as_plain


@given(texts())
def test_any_pieces_are_the_whole(text):
    out, state = text.run()
    torch.testing.assert_close(out, text.oracle(), atol=1e-12, rtol=1e-10)
    assert state.next == [text.start + text.q.shape[2] - begin for begin in text.begins]


@given(texts(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_dtype(text, dtype):
    rounded = Text(*(x.to(dtype).double() for x in (text.q, text.k, text.v)), *list(vars(text).values())[3:])
    out, _ = rounded.run(dtype)
    assert out.dtype == dtype
    assert_as_good_as_plain("out", out, rounded.oracle(dtype), rounded.oracle(), 2.0)


@given(texts())
def test_the_state_is_bitwise_that_of_one_pass(text):
    tokens = text.q.shape[2]
    _, split = text.run(torch.float32)
    _, whole = text.run(torch.float32, [(0, tokens)])
    assert split.next == whole.next
    heads = text.k.shape[1]
    for branch, (length, rate, most, _) in enumerate(text.pattern.all_branches):
        for row, head in itertools.product(range(text.q.shape[0]), range(heads)):
            kept = split.kept(branch, row=row, head=head)
            for one, other in zip(kept, whole.kept(branch, row=row, head=head), strict=True):
                assert torch.equal(one, other)
            # and these are the rows that the definition keeps
            position = text.start + tokens - text.begins[row]
            seen = range(max(text.start, position // length * length), position)
            offset = text.pattern.offset(rate, head, heads)
            columns = [
                p - text.start + text.begins[row]
                for p in seen
                if (p % length % rate, p % length // rate < most) == (offset, True)
            ]
            assert torch.equal(kept[0], text.k[row, head, columns].float())
            assert torch.equal(kept[1], text.v[row, head, columns].float())


@given(texts(), st.data())
def test_crop_goes_back(text, data):
    """With recording always, without it within the current segments, else with an error that says why."""
    tokens = text.q.shape[2]
    stay = data.draw(st.integers(max(text.begins), tokens))
    expected, _ = text.run()
    pieces = [(a, min(b, stay)) for a, b in text.pieces if a < stay]
    rest = [(stay, tokens)] if stay < tokens else []
    for is_recorded in (True, False):
        state = text.run(pieces=pieces)[1] if pieces else text.state
        state.record(is_on=is_recorded)
        junk = (torch.randn_like(x) for x in (text.q[:, :, stay:], text.k[:, :, stay:], text.v[:, :, stay:]))
        for q, k, v in zip(*(x.split(5, 2) if rest else () for x in junk), strict=True):
            state.attend(q, k, v, scale=None)
        position = text.start + tokens - min(text.begins)
        may_fail = any(
            stay - min(text.begins) + text.start < (text.start + tokens - begin - 1) // length * length
            or text.start + stay - begin < (text.start + tokens - begin - 1) // length * length
            for length, _ in text.pattern.branches
            for begin in text.begins
        )
        try:
            state.crop(tokens - stay)
        except ValueError as error:
            assert not is_recorded
            assert may_fail
            assert f"cannot crop {tokens - stay} tokens" in str(error)  # noqa: PT017
            continue
        assert position >= 0
        for a, b in rest:
            out = state.attend(text.q[:, :, a:b], text.k[:, :, a:b], text.v[:, :, a:b], scale=None)
            torch.testing.assert_close(out, expected[:, :, a:b], atol=1e-12, rtol=1e-10)


@given(texts(), st.data())
def test_rows_may_be_chosen_and_repeated(text, data):
    cut = data.draw(st.sampled_from([b for _, b in text.pieces]))
    tokens = text.q.shape[2]
    rows = data.draw(st.lists(st.integers(0, text.q.shape[0] - 1), min_size=1, max_size=4))
    if cut == tokens or any(text.begins[row] > cut for row in rows):
        return
    expected, _ = text.run()
    _, state = text.run(pieces=[(a, b) for a, b in text.pieces if b <= cut])
    state.select(rows)
    out = state.attend(*(x[rows, :, cut:] for x in (text.q, text.k, text.v)), scale=None)
    torch.testing.assert_close(out, expected[rows, :, cut:], atol=1e-12, rtol=1e-10)


@given(texts(), st.integers(1, 60))
def test_room_grows_where_the_text_is_longer_than_was_said(text, room):
    batch, heads, _, head_dim = text.k.shape
    state = StreamState(
        text.pattern, batch_size=batch, num_kv_heads=heads, head_dim=head_dim, dtype=torch.float64,
        device=text.k.device, max_tokens=room,
    )  # fmt: skip
    assert state.keys.shape[2] == text.pattern.state_rows(tokens=room)
    text.start, text.begins = 0, [0] * batch
    expected = text.oracle()
    for a, b in text.pieces:
        out = state.attend(text.q[:, :, a:b], text.k[:, :, a:b], text.v[:, :, a:b], scale=None)
        torch.testing.assert_close(out, expected[:, :, a:b], atol=1e-12, rtol=1e-10)


@given(patterns(max_length=10**6, max_rate=10**4), st.integers(1, 6), st.integers(1, 2))
def test_bytes_are_the_closed_form(pattern, heads, batch):
    state = StreamState(
        pattern, batch_size=batch, num_kv_heads=heads, head_dim=2, dtype=torch.float16, device=torch.device("meta")
    )
    rows = sum(-(-length // rate) for length, rate in pattern.branches) + pattern.global_tokens
    assert pattern.state_rows(tokens=2**62) == rows
    assert state.nbytes == 2 * batch * heads * 2 * 2 * rows


def test_a_billion_tokens_need_what_the_pattern_says():
    pattern = DilationPattern.geometric(2048, 2**30)
    assert pattern.state_rows(tokens=10**9) <= 20 * 2048
    length, rate = pattern.branches[-1]
    assert kept_rows(length, rate, 0) == 2048


def test_a_backward_pass_is_refused():
    state = StreamState(
        DilationPattern((4,), (1,)), batch_size=1, num_kv_heads=1, head_dim=2, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    x = torch.randn(1, 1, 3, 2, requires_grad=True)
    out = state.attend(x, x, x, scale=None)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        out.sum().backward()


def test_tensors_that_do_not_fit_are_refused():
    state = StreamState(
        DilationPattern((4,), (1,)), batch_size=2, num_kv_heads=1, head_dim=2, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    x = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match="make one of this batch size"):
        state.attend(x, x, x, scale=None)
    y = torch.randn(2, 1, 3, 2)
    with pytest.raises(ValueError, match="make it with this dtype"):
        state.attend(y.double(), y.double(), y.double(), scale=None)
    state.attend(y, y, y, scale=None, bounds=torch.tensor([[0, 0, 2], [1, 1, 3]]))
    with pytest.raises(ValueError, match="row 0 has padding between its tokens"):
        state.attend(y, y, y, scale=None)
    with pytest.raises(ValueError, match="row 1 has padding between its tokens"):
        state.attend(y, y, y, scale=None, bounds=torch.tensor([[1, 1, 3]]))


def test_patterns_without_rate_one_leave_zeros():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pattern = DilationPattern((6,), (3,))
    x = torch.randn(1, 1, 9, 4, dtype=torch.float64)
    text = Text(x, x, x, pattern, [0], [(t, t + 1) for t in range(9)], 0)
    out, _ = text.run()
    assert (out[0, 0, [1, 2, 4, 5, 7, 8]] == 0).all()
    torch.testing.assert_close(out, text.oracle())


@given(texts(), st.booleans())
def test_sinks_in_any_pieces_are_those_of_the_op(text, is_per_query):
    batch, heads, tokens, head_dim = text.q.shape
    sinks = torch.randn((batch, heads, tokens) if is_per_query else (heads,), dtype=torch.float64)
    state, parts = replace(text, begins=[0] * batch, start=0).state, []
    for a, b in text.pieces:
        of_piece = sinks[:, :, a:b] if is_per_query else sinks
        parts.append(state.attend(*(x[:, :, a:b] for x in (text.q, text.k, text.v)), scale=None, sinks=of_piece))
    whole, _ = reference.attend(
        text.q, text.k, text.v, text.pattern, bounds=None, is_causal=True, scale=head_dim**-0.5, sinks=sinks
    )
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-12, rtol=1e-10)
