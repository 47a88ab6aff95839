"""The tile plan of one call: which rows of queries attend to which rows of keys.

A *tile* is what one attention kernel call can do: rows of queries, rows of keys, causal or full. A kernel takes
(batch, heads, rows, head dim), and any strides; a tile has up to five axes over which the same small attention repeats
(batch rows, segments, phases of the keys or of the queries, heads of one phase, query heads of one key/value head),
which `views.blocks` folds into the kernel's two.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from longnet.attention.branches import Branch
from longnet.attention.pattern import DilationPattern


class Run(NamedTuple):
    """Positions `start` … `stop` − 1 of `rows` batch rows from `row` on: real tokens that attend to one another.

    A run that began before the tensors at hand has a negative start; `first` of its positions never existed. `beyond`
    of its positions follow the tensors at hand.
    """

    row: int
    rows: int
    start: int
    stop: int
    first: int = 0
    beyond: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """`size` repetitions of a tile, each so many batch rows, positions and heads after the one before.

    Of the keys, `sharing` repetitions in a row read one head, and `kv_head` is the step from one such head to the next.
    """

    size: int
    row: int = 0
    q_position: int = 0
    kv_position: int = 0
    q_head: int = 0
    kv_head: int = 0
    sharing: int = 1


@dataclass(frozen=True, slots=True)
class Tile:
    """`q_rows` queries, every `q_rate`-th, against `k_rows` keys, every `k_rate`-th, repeated over `axes`.

    Starts are the batch row, head and position of the first repetition. With `is_causal` query row j sees the key rows
    up to j, of as many; otherwise every query sees every key. `is_first`: no earlier tile of the plan has written these
    queries, and they are also the rows of its keys. With `is_kept` the keys' tensor holds the kept rows of branch
    `branch` alone, one after the other, in place of every position: those before the tensors at hand or, with
    `is_later`, those after them. `is_whole`: of a whole segment of a sequence that fills the tensors, so that its
    shapes come again at every step of a training run, which those of documents, tails and growing caches do not.
    """

    row: int
    q_head: int
    kv_head: int
    q_start: int
    q_rows: int
    q_rate: int
    k_start: int
    k_rows: int
    k_rate: int
    is_causal: bool
    is_first: bool
    axes: tuple[Axis, ...]
    branch: int = 0
    is_kept: bool = False
    is_later: bool = False
    is_whole: bool = False

    @property
    def pairs(self) -> int:
        """The (query, key) pairs of all repetitions."""
        pairs = self.q_rows * (self.q_rows + 1) // 2 if self.is_causal else self.q_rows * self.k_rows
        return pairs * math.prod(axis.size for axis in self.axes)


class Plan(NamedTuple):
    """The tiles of one call; `is_complete` when their `is_first` ones write every query."""

    tiles: tuple[Tile, ...]
    is_complete: bool


class Whole(NamedTuple):
    """A call as one, for a backend that needs no tiles; `is_complete` when every query lies in a run.

    Of runs that reach beyond the tensors at hand a halo has the rest; `earlier` and `later` are where it has the rows
    of each branch from before the tensors at hand and from after them, and empty where there is no halo.
    """

    pattern: DilationPattern
    runs: tuple[Run, ...]
    is_causal: bool
    is_complete: bool
    earlier: tuple[int, ...] = ()
    later: tuple[int, ...] = ()


@functools.lru_cache(maxsize=64)  # packed documents make a plan a batch, of up to a megabyte
def plan(
    pattern: DilationPattern,
    *,
    runs: tuple[Run, ...],
    batch_size: int,
    q_tokens: int,
    k_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    is_partial: bool = False,
) -> Plan:
    """Lay out dilated attention as tiles. The queries are the last `q_tokens` of `k_tokens` positions.

    With `is_partial`, the runs may reach beyond the keys at hand: what else a query sees of its segment, kept by a
    streaming state or sent by other ranks, becomes `is_kept` tiles.
    """
    # Who writes all comes first.
    branches = sorted(enumerate(pattern.all_branches), key=lambda numbered: not numbered[1].is_covering)
    tiles: list[Tile] = []
    skipped = k_tokens - q_tokens
    written = 0
    for run in runs:
        q_from = max(run.first, skipped - run.start)
        if q_from >= run.stop - run.start:
            continue
        written += run.rows * (run.stop - run.start - q_from)
        is_filling = run.rows == batch_size and run.start <= 0 and run.stop == k_tokens == q_tokens
        for index, (number, branch) in enumerate(branches):
            is_first = index == 0 and branch.is_covering
            for segments in _segments(run, branch.length, q_from):
                is_whole = is_filling and segments.positions == branch.length and not segments.queried
                for rows in segments.kept(pattern, branch, num_heads, num_kv_heads):
                    own = _see_own(rows, branch.is_dense, is_causal, is_partial, is_first, skipped)
                    others = _see_others(rows, branch.is_dense, is_causal, is_partial, number, skipped)
                    tiles += (replace(tile, is_whole=is_whole, branch=number) for tile in itertools.chain(own, others))
    return Plan(tuple(tiles), is_complete=branches[0][1].is_covering and written == batch_size * q_tokens)


class _Segments(NamedTuple):
    """`repeats` equal segments of a branch, the first of which is `run`'s positions at hand.

    Attributes:
        run: the first segment, as a run of its own.
        repeats: how many follow one another, `length` positions apart.
        length: w.
        queried: the first position of each that is a query.
    """

    run: Run
    repeats: int
    length: int
    queried: int

    @property
    def positions(self) -> int:
        return self.run.stop - self.run.start

    def kept(self, pattern: DilationPattern, branch: Branch, num_heads: int, num_kv_heads: int) -> Iterator[_Kept]:
        """Yield the kept rows of these segments: of heads that keep side by side offsets, and equally many rows."""
        run, rate, group = self.run, branch.rate, num_heads // num_kv_heads
        edges = (self.positions, self.queried, run.first, self.positions + run.beyond)
        for grid in pattern.offset_grids(rate, num_kv_heads):
            # Between two cuts all offsets have as many kept rows and queries as each other.
            for part in grid.cut(*(edge % rate - grid.offset for edge in edges)):
                offset = part.offset
                yield _Kept(
                    segments=self,
                    rate=rate,
                    offset=offset,
                    offsets=part.offsets,
                    kv_head=part.head,
                    group=group,
                    offset_axis=Axis(part.offsets, q_head=part.offset_step * group, kv_head=part.offset_step),
                    head_axes=(
                        Axis(part.heads, q_head=part.head_step * group, kv_head=part.head_step),
                        Axis(group, q_head=1),
                    ),
                    absent=branch.kept_rows(run.first, offset),
                    earlier=branch.kept_rows(self.queried, offset),
                    rows=branch.kept_rows(self.positions, offset),
                    beyond=branch.kept_rows(self.positions + run.beyond, offset),
                )


class _Kept(NamedTuple):
    """The rows that some heads keep of equal segments, counted from each segment's start.

    Attributes:
        segments: whose rows.
        rate: r.
        offset: which of each r positions the first head keeps.
        offsets: how many offsets, side by side, have as many rows.
        kv_head: the first head.
        group: query heads a key/value head.
        offset_axis: from one offset's head to the next one's.
        head_axes: over the heads of one offset, and the query heads of each.
        absent: rows before the first position that ever existed.
        earlier: rows before the first query, absent ones included.
        rows: rows before the end of the positions at hand.
        beyond: rows before the end of the segment.
    """

    segments: _Segments
    rate: int
    offset: int
    offsets: int
    kv_head: int
    group: int
    offset_axis: Axis
    head_axes: tuple[Axis, ...]
    absent: int
    earlier: int
    rows: int
    beyond: int

    @property
    def own_start(self) -> int:
        """Position of the first kept row that is also a query's, in the tensors at hand."""
        return self.segments.run.start + self.offset + self.earlier * self.rate

    def tile(self, *, q_start: int, q_rows: int, q_rate: int, is_moving: bool, phases: int = 1) -> Tile:
        """Return a tile of some queries and all kept rows at hand.

        Args:
            q_start: position of the first query among the queries at hand.
            q_rows: how many.
            q_rate: their distance.
            is_moving: the queries lie one further with each offset.
            phases: so many times, the queries one further each time, the keys where they are.
        """
        run, repeats, length = self.segments.run, self.segments.repeats, self.segments.length
        return Tile(
            row=run.row,
            q_head=self.kv_head * self.group,
            kv_head=self.kv_head,
            q_start=q_start,
            q_rows=q_rows,
            q_rate=q_rate,
            k_start=run.start + self.offset,
            k_rows=self.rows,
            k_rate=self.rate,
            is_causal=False,
            is_first=False,
            axes=(
                Axis(run.rows, row=1),
                Axis(repeats, q_position=length, kv_position=length),
                replace(self.offset_axis, q_position=int(is_moving), kv_position=1),
                *self.head_axes,
                Axis(phases, q_position=1),
            ),
        )

    def kept_queries(self, skipped: int) -> Tile:
        """Return the tile whose queries are the kept rows."""
        return self.tile(
            q_start=self.own_start - skipped, q_rows=self.rows - self.earlier, q_rate=self.rate, is_moving=True
        )

    def all_queries(self, skipped: int) -> Tile:
        """Return the tile whose queries are all of the segment."""
        return self.tile(
            q_start=self.segments.run.start + self.segments.queried - skipped,
            q_rows=self.segments.positions - self.segments.queried,
            q_rate=1,
            is_moving=False,
        )

    def each_offset(self) -> Iterator[_Kept]:
        """Yield the rows of each offset by itself."""
        for index in range(self.offsets):
            yield self._replace(
                offset=self.offset + index,
                offsets=1,
                kv_head=self.kv_head + index * self.offset_axis.kv_head,
                offset_axis=replace(self.offset_axis, size=1),
            )


def _see_own(
    kept: _Kept, is_dense: bool, is_causal: bool, is_partial: bool, is_first: bool, skipped: int
) -> Iterator[Tile]:
    """Yield the tiles of queries and the kept rows among them; without causality, of all kept rows at hand."""
    own = kept.rows - kept.earlier
    if not is_dense:
        if own:
            tile = replace(kept.kept_queries(skipped), is_first=is_first)
            if is_causal or is_partial:
                tile = replace(tile, k_start=kept.own_start, k_rows=own, is_causal=is_causal)
            yield tile
        return
    if not is_causal:
        tile = kept.all_queries(skipped)
        if is_partial:
            tile = replace(tile, k_start=kept.own_start, k_rows=own)
        if tile.k_rows:
            yield tile
        return
    # From the first kept row on, the queries of each of r phases are a causal tile: row j sees the key rows up to j.
    if own > 1:
        tile = kept.tile(
            q_start=kept.own_start - skipped, q_rows=own - 1, q_rate=kept.rate, is_moving=True, phases=kept.rate
        )
        yield replace(tile, k_start=kept.own_start, k_rows=own - 1, is_causal=True)
    # Those from the last kept row on, fewer with each offset, see all of them.
    for one in kept.each_offset() if own else ():
        last = one.own_start + (own - 1) * one.rate
        rest = one.segments.run.start + one.segments.positions - last
        tile = one.tile(q_start=last - skipped, q_rows=rest, q_rate=1, is_moving=False)
        yield replace(tile, k_start=one.own_start, k_rows=own)


def _see_others(
    kept: _Kept, is_dense: bool, is_causal: bool, is_partial: bool, branch: int, skipped: int
) -> Iterator[Tile]:
    """Yield the tiles of queries and the kept rows before the first of them, and beyond the tensors at hand."""
    tile = kept.all_queries(skipped) if is_dense else kept.kept_queries(skipped)
    if not tile.q_rows:
        return
    if not is_partial:
        if is_causal and kept.earlier:
            yield replace(tile, k_rows=kept.earlier)
        return
    axes = tuple(replace(axis, kv_position=0) for axis in tile.axes)
    other = replace(tile, k_rate=1, axes=axes, branch=branch, is_kept=True)
    if kept.earlier > kept.absent:
        yield replace(other, k_start=kept.absent, k_rows=kept.earlier - kept.absent)
    if kept.beyond > kept.rows and not is_causal:
        later_from = kept.rows - kept.segments.positions // kept.rate
        yield replace(other, k_start=later_from, k_rows=kept.beyond - kept.rows, is_later=True)


def _segments(run: Run, length: int, q_from: int) -> Iterator[_Segments]:
    """Yield the segments of a branch, equal ones at once, from the one that holds the first query on."""

    def equal(base: int, repeats: int, positions: int, queried: int) -> _Segments:
        is_cut = base + positions == tokens
        first = run._replace(
            start=run.start + base,
            stop=run.start + base + positions,
            first=max(0, run.first - base),
            beyond=min(run.beyond, length - positions) if is_cut else 0,
        )
        return _Segments(first, repeats, length, queried)

    tokens = run.stop - run.start
    segment, inside = divmod(q_from, length)
    whole = tokens // length
    if inside:
        yield equal(segment * length, 1, min(length, tokens - segment * length), inside)
        segment += 1
    if whole > segment:
        yield equal(segment * length, whole - segment, length, 0)
    if tokens % length and whole >= segment:
        yield equal(whole * length, 1, tokens % length, 0)


def kept_tiles(
    pattern: DilationPattern, *, runs: tuple[Run, ...], num_kv_heads: int
) -> Iterator[tuple[Tile, int, int]]:
    """Lay out which rows of new keys (B, G, T, D) a streaming state keeps: those of each branch's last segment.

    Yields:
        A tile whose query rows are the keys to keep and whose key rows are their places in the state of its branch;
        with it the first place and one past the last.
    """
    for run in runs:
        tokens = run.stop - run.start
        q_from = max(run.first, -run.start)
        for number, branch in enumerate(pattern.all_branches):
            last = max(q_from, (tokens - 1) // branch.length * branch.length)
            for segments in _segments(run, branch.length, last):
                for kept in segments.kept(pattern, branch, num_kv_heads, num_kv_heads):
                    tile = kept.kept_queries(0)
                    if not tile.q_rows:
                        continue
                    axes = tuple(replace(axis, kv_position=0) for axis in tile.axes)
                    stored = replace(tile, k_start=kept.earlier, k_rows=tile.q_rows, k_rate=1, axes=axes)
                    yield replace(stored, branch=number, is_kept=True), kept.earlier, kept.earlier + tile.q_rows


def runs_of(bounds: Tensor | None, batch_size: int, tokens: int) -> tuple[Run, ...]:
    """Read (batch row, start, stop) triples; equal neighbours become one run. None is every row, whole."""
    if bounds is None:
        return (Run(0, batch_size, 0, tokens),) if batch_size and tokens else ()
    runs: list[Run] = []
    for row, start, stop in bounds[bounds[:, 1] < bounds[:, 2]].tolist():
        last = runs[-1] if runs else None
        if last and (last.row + last.rows, last.start, last.stop) == (row, start, stop):
            runs[-1] = last._replace(rows=last.rows + 1)
        else:
            runs.append(Run(row, 1, start, stop))
    return tuple(runs)
