"""Which calls `backend="auto"` computes as one: by what was measured, where it was, and after the kernels proved it."""

import pytest
import torch

from longnet import DilationPattern
from longnet.attention import dilated, fused

PAPER = DilationPattern.paper()


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(fused, "architecture_of", lambda _: 90)
    monkeypatch.setattr(fused.launch, "refusal", lambda *_: None)
    monkeypatch.setattr(fused, "_proves_itself", lambda *_: True)


def takes(tokens, *, backend="auto", dtype=torch.bfloat16, documents=1, backward=False):
    q = torch.empty(1, 16, tokens, 128, dtype=dtype, device="meta")
    edges = torch.linspace(0, tokens, documents + 1).long()
    bounds = torch.stack([torch.zeros_like(edges[1:]), edges[:-1], edges[1:]], 1)

    def tiles():
        layout = dilated._lay_out(q, q, bounds, *PAPER.arguments, True)
        return [tile for part in layout.parts for tile in part.tiles]

    return fused.is_fused(backend, q, tiles, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
def test_short_sequences_and_many_documents_are_computed_as_one(backward):
    assert takes(2048, backward=backward)
    assert not takes(131072, backward=backward)
    assert takes(131072, documents=64, backward=backward)


def test_what_was_not_measured_is_computed_tile_by_tile(monkeypatch):
    assert not takes(2048, dtype=torch.float32)
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
