"""Which calls `backend="auto"` computes as one: by what was measured, where it was, and after the kernels proved it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention import dilated, fused

PAPER = DilationPattern.paper()


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(fused, "architecture_of", lambda _: 90)
    monkeypatch.setattr(fused.launch, "refusal", lambda *_: None)
    monkeypatch.setattr(fused, "_proves_itself", lambda *_: True)


def takes(
    tokens, *, backend="auto", dtype=torch.bfloat16, documents=1, backward=False, head_dim=128, queries=None, plan=True
):
    k = torch.empty(1, 2048 // head_dim, tokens, head_dim, dtype=dtype, device="meta")
    q = k[:, :, -(queries or tokens) :]
    edges = torch.linspace(0, tokens, documents + 1).long()
    bounds = torch.stack([torch.zeros_like(edges[1:]), edges[:-1], edges[1:]], 1)

    def whole():
        return dilated._as_one(q, k, bounds, *PAPER.arguments, True)

    def tiles():
        assert plan, "a plan that is not needed"
        layout = dilated._lay_out(q, k, bounds, *PAPER.arguments, True)
        return [tile for part in layout.parts for tile in part.tiles]

    return fused.is_fused(backend, q, k, whole, tiles, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
def test_short_sequences_and_many_documents_are_computed_as_one(backward):
    assert takes(2048, backward=backward)
    assert not takes(131072, backward=backward)
    assert takes(131072, documents=64, backward=backward)


def test_of_many_documents_no_plan_is_made():
    """Of 1,024 in 131,072 tokens it takes 1.8 s to make, and 11 ms to count; each batch has its own."""
    assert takes(131072, documents=1024, plan=False)
    assert takes(131072, documents=1024, backward=True, plan=False)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), pattern=patterns(), is_causal=st.booleans())
def test_tiles_and_pairs_lie_within_their_bounds(lengths, pattern, is_causal):
    bounds = torch.tensor([(0, sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))])
    q = torch.empty(1, 4, sum(lengths), 16, device="meta")
    layout = dilated._lay_out(q, q[:, :2], bounds, *pattern.arguments, is_causal)
    whole = dilated._as_one(q, q[:, :2], bounds, *pattern.arguments, is_causal)
    found = [tile for part in layout.parts for tile in part.tiles]
    fewest, pairs = fused._sizes(whole.pattern, whole.runs, is_causal)
    assert fewest <= len(found)
    assert sum(tile.pairs for tile in found) <= 4 * pairs


@pytest.mark.parametrize("head_dim", [8, 32, 192, 256])
def test_what_was_not_measured_is_computed_tile_by_tile(head_dim, monkeypatch):
    assert not takes(2048, head_dim=head_dim)
    assert not takes(2048, dtype=torch.float32)
    assert not takes(2048, queries=16)
    monkeypatch.setattr(fused, "architecture_of", lambda _: 100)
    assert not takes(2048)


def test_kernels_that_do_not_run_or_do_not_agree_are_not_taken(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fused.launch, "refusal", lambda *_: "has no such thing")
        assert not takes(2048)
    monkeypatch.setattr(fused, "_proves_itself", lambda *_: False)
    assert not takes(2048)


def test_who_asks_is_answered(monkeypatch):
    monkeypatch.setattr(fused.dispatch, "is_fused", lambda backend, *_: backend == "triton")
    assert takes(131072, backend="triton")
    assert not takes(2048, backend="sdpa")
