"""One sequence cut into slices, one a rank: which tiles a rank computes, and which rows it needs of the others.

Before any row travels it is sparsified: of a branch a rank needs the kept rows of the segment that its slice begins in
and, where attention is not causal, of the one that it ends in, w_i / r_i rows at most, however long the sequence
(arXiv:2307.02486 §3.1). Those rows are the *halo*. Nothing here communicates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.branches import kept_rows
from longnet.attention.halo import HaloLayout, Pieces, Rows, lay_out
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run


@dataclass(frozen=True, eq=False)
class SliceLayout:
    """What one rank computes and exchanges in one call.

    Attributes:
        tiles: of its own queries.
        halo_rows: of the halo (B, G, halo_rows, D).
        sent: rows of its keys for the other ranks, in rank order.
        sent_counts: how many for each.
        received: rows of the halo that the other ranks fill, in rank order.
        received_counts: how many from each.
        is_exchanging: some rank needs rows of another one; where none does, none communicates.
    """

    tiles: HaloLayout
    halo_rows: int
    sent: Pieces
    sent_counts: tuple[int, ...]
    received: Pieces
    received_counts: tuple[int, ...]
    is_exchanging: bool


class Need(NamedTuple):
    """Positions `low` … `high` − 1 of a segment that a slice needs and does not hold; `run` and `base` are global."""

    run: Run
    branch: int
    base: int
    low: int
    high: int
    is_later: bool


@functools.lru_cache(maxsize=64)
def lay_out_slice(
    pattern: DilationPattern,
    *,
    runs: tuple[Run, ...],
    edges: tuple[int, ...],
    rank: int,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    device: torch.device,
) -> SliceLayout:
    """Lay out the attention of the slice edges[rank] … edges[rank + 1] − 1 of a sequence.

    Args:
        pattern: the branches.
        runs: what attends to one another, in positions of the whole sequence.
        edges: (P + 1,) the slices' boundaries, from 0 to the length.
        rank: which slice.
        batch_size: B.
        num_heads: H.
        num_kv_heads: G.
        is_causal: hide the keys after each query.
        device: of the rows' indices.
    """
    ranks = len(edges) - 1
    start, stop = edges[rank], edges[rank + 1]
    needs = [list(needs_of(pattern, runs, edges, receiver, is_causal=is_causal)) for receiver in range(ranks)]
    places, halo_rows = _places(pattern, needs[rank])
    earlier, later = (
        tuple(places.get((number, is_later), 0) for number in range(len(pattern.all_branches)))
        for is_later in (False, True)
    )
    sent, received = RowIndices(), RowIndices()
    for other in range(ranks):
        for need in needs[other] if other != rank else ():
            sent.add(
                pattern, need, rows_within(need, edges, rank), num_kv_heads, first=need.run.start + need.base - start
            )
        sent.close()
        for need in needs[rank] if other != rank else ():
            first = places[need.branch, need.is_later]
            received.add(pattern, need, rows_within(need, edges, other), num_kv_heads, place=first)
        received.close()
    return SliceLayout(
        tiles=lay_out(
            pattern,
            runs=runs_at_hand(runs, start, stop),
            tokens=stop - start,
            batch_size=batch_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
            earlier=earlier,
            later=later,
        ),
        halo_rows=halo_rows,
        sent=sent.pieces(device),
        sent_counts=tuple(sent.counts),
        received=received.pieces(device),
        received_counts=tuple(received.counts),
        is_exchanging=any(needs),
    )


def runs_at_hand(runs: Sequence[Run], start: int, stop: int) -> tuple[Run, ...]:
    """Return the runs that have positions in start … stop − 1, counted from there."""
    return tuple(
        run._replace(start=run.start - start, stop=min(run.stop, stop) - start, beyond=max(0, run.stop - stop))
        for run in runs
        if run.start < stop and run.stop > start
    )


def needs_of(
    pattern: DilationPattern, runs: Sequence[Run], edges: Sequence[int], rank: int, *, is_causal: bool
) -> Iterator[Need]:
    """Yield what a rank needs of others: per run and branch, the rest of the segments that its slice cuts."""
    start, stop = edges[rank], edges[rank + 1]
    for run in runs:
        if start == stop or run.start >= stop or run.stop <= start:
            continue
        for number, (length, rate, rows, _) in enumerate(pattern.all_branches):
            inside = max(0, start - run.start) % length
            if inside:
                yield Need(run, number, start - run.start - inside, 0, min(inside, rows * rate), is_later=False)
            inside = (stop - run.start) % length
            if inside and run.stop > stop and not is_causal:
                base = stop - run.start - inside
                high = min(length, run.stop - run.start - base, rows * rate)
                if inside < high:
                    yield Need(run, number, base, inside, high, is_later=True)


def _places(pattern: DilationPattern, needs: Sequence[Need]) -> tuple[dict[tuple[int, bool], int], int]:
    """Return where the halo of each branch and side begins, and how many rows there are in all."""
    sizes: dict[tuple[int, bool], int] = {}
    for need in needs:
        rate = pattern.all_branches[need.branch].rate
        size, key = kept_rows(need.high, rate, 0) - need.low // rate, (need.branch, need.is_later)
        sizes[key] = max(size, sizes.get(key, 0))
    *starts, total = itertools.accumulate(sizes.values(), initial=0)
    return dict(zip(sizes, starts, strict=True)), total


def rows_within(need: Need, edges: Sequence[int], rank: int) -> tuple[int, int]:
    """Return which positions of the needed ones a rank holds, counted from the segment's start."""
    first = need.run.start + need.base
    return max(need.low, edges[rank] - first), min(need.high, edges[rank + 1] - first)


class RowIndices:
    """Rows gathered piece by piece: per piece a product of batch rows and positions of one head."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._sizes: list[int] = []
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def add(
        self,
        pattern: DilationPattern,
        need: Need,
        span: tuple[int, int],
        num_kv_heads: int,
        *,
        first: int | None = None,
        place: int = 0,
    ) -> None:
        """Add the kept rows of a span of a segment: as positions from `first` on, or as the halo's from `place` on."""
        low, high = span
        if low >= high:
            return
        rate = pattern.all_branches[need.branch].rate
        batch = torch.arange(need.run.row, need.run.row + need.run.rows)
        for head in range(num_kv_heads):
            offset = pattern.offset(rate, head, num_kv_heads)
            inside = torch.arange(low + (offset - low) % rate, max(high, low + (offset - low) % rate), rate)
            at = inside // rate - need.low // rate + place if first is None else inside + first
            rows, positions = batch.repeat_interleave(len(at)), at.repeat(len(batch))
            self._pieces.append((rows, torch.full_like(rows, head), positions))
            self._count += len(rows)
        self._sizes.append(self._count - sum(self._sizes))

    def close(self) -> None:
        """End the rows of one rank."""
        self.counts.append(self._count - sum(self.counts))

    def pieces(self, device: torch.device) -> Pieces:
        """Return all rows, those of the first rank first, those of one need a piece."""
        none = torch.empty(0, dtype=torch.int64)
        columns = zip(*self._pieces, strict=True) if self._pieces else ([none],) * 3
        return Pieces(Rows(*(torch.cat(list(column)).to(device) for column in columns)), list(self._sizes))
