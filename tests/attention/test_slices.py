"""A sequence in slices, its ranks simulated in one process: against the oracle on the whole sequence."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention import reference
from longnet.attention.plan import runs_of
from longnet.attention.slices import lay_out_slice
from stretches import cut_sequences, simulate


@given(cut_sequences(), patterns(), st.integers(1, 5), st.integers(1, 2), st.booleans(), st.integers(0, 2**31))
def test_ranks_compute_what_one_device_does(sequence, pattern, kv_heads, group, is_causal, seed):
    tokens, batch, edges, bounds = sequence
    torch.manual_seed(seed)
    q, dout = (torch.randn(batch, kv_heads * group, tokens, 4, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, tokens, 4, dtype=torch.float64) for _ in range(2))
    settings = {"bounds": bounds, "is_causal": is_causal, "scale": 0.4}
    (found, _), inputs = simulate(q, k, v, dout, pattern, edges, **settings), [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attend(*inputs, pattern, **settings)
    expected = [out, lse, *torch.autograd.grad(out, inputs, dout)]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@given(patterns(), st.integers(1, 300), st.integers(1, 16), st.integers(1, 5), st.booleans())
def test_traffic_is_the_closed_form(pattern, tokens, ranks, kv_heads, is_causal):
    size = -(-tokens // ranks)
    edges = tuple(min(tokens, rank * size) for rank in range(ranks + 1))
    layouts = [
        lay_out_slice(
            pattern, runs=runs_of(None, 2, tokens), edges=edges, rank=rank, batch_size=2, num_heads=kv_heads,
            num_kv_heads=kv_heads, is_causal=is_causal, device=torch.device("cpu"),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    received = [2 * sum(layout.received_counts) * 16 * 4 for layout in layouts]  # keys and values, head dim 16, float32
    closed = pattern.traffic(
        tokens=tokens, ranks=ranks, num_kv_heads=kv_heads, head_dim=16, itemsize=4, is_causal=is_causal
    )
    assert received == [2 * count for count in closed]  # two batch rows
    assert sum(sum(layout.sent_counts) for layout in layouts) * 2 * 64 == sum(received)
    assert all(layout.received_counts[rank] == 0 for rank, layout in enumerate(layouts))


@pytest.mark.parametrize("is_causal", [True, False])
def test_traffic_does_not_grow_with_the_length(is_causal):
    pattern = DilationPattern.geometric(segment_length=2048, max_length=2**20)
    shape = {"num_kv_heads": 8, "head_dim": 128, "itemsize": 2, "is_causal": is_causal}
    slices = [2**20 + 2**19 - 1, 8 * 2**20 + 2**19 - 1]  # cut at the same places of every segment
    short, long = (pattern.traffic(tokens=8 * size, ranks=8, **shape) for size in slices)
    middle = [traffic[4] for traffic in (short, long)]
    bound = 2 * 8 * 128 * 2 * sum(-(-w // r) for w, r in pattern.branches) * (1 if is_causal else 2)
    assert 0 < middle[0] == middle[1] <= bound
    # Eight times the ranks, slices as they were: nobody receives more.
    more = pattern.traffic(tokens=64 * slices[0], ranks=64, **shape)
    assert max(more) <= bound
    assert more[:8] == short if is_causal else more[:7] == short[:7]


def test_the_table_of_the_documentation_is_the_closed_form():
    text = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    rows = re.findall(r"^\| 2\^(\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    pattern, row = DilationPattern.geometric(2048, 2**30), 12 * 64 * 2
    for row_text in rows:
        power, ranks, ours, ring, ulysses = (float(cell.replace(",", "")) for cell in row_text)
        tokens, ranks = 2 ** int(power), int(ranks)
        traffic = pattern.traffic(tokens=tokens, ranks=ranks, num_kv_heads=12, head_dim=64, itemsize=2, is_causal=True)
        assert round(max(traffic) / 2**20, 1) == ours
        others = (ranks - 1) * tokens // ranks * row / 2**20  # a row of every token of the other ranks
        assert 2 * others == ring
        assert 4 * others // ranks == ulysses


def test_traffic_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="ranks=0"):
        DilationPattern.paper().traffic(tokens=8, ranks=0, num_kv_heads=1, head_dim=1, itemsize=1, is_causal=True)


def test_ranks_whose_segments_end_with_their_slices_exchange_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern = DilationPattern((16, 32), (1, 2))
    layout = lay_out_slice(
        pattern, runs=runs_of(None, 1, 128), edges=(0, 64, 128), rank=1, batch_size=1, num_heads=2, num_kv_heads=2,
        is_causal=False, device=torch.device("cpu"),
    )  # fmt: skip
    assert not layout.is_exchanging
    assert layout.tiles.halo == ()
    assert layout.halo_rows == 0
