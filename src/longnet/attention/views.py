"""Kept rows as strided views: the tile plan of one call, and the views that a kernel reads.

A *tile* is what one attention kernel call can do: rows of queries, rows of keys, causal or full. A kernel takes
(batch, heads, rows, head dim), and any strides; a tile has up to five axes over which the same small attention repeats
(batch rows, segments, phases, heads of one phase, query heads of one key/value head). `blocks` folds those into the
kernel's two, and loops over what does not fold.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from longnet.attention.pattern import DilationPattern, kept_rows

Strides = tuple[int, ...]  # of batch rows, heads, positions


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
    """`size` repetitions of a tile, each so many batch rows, positions and heads after the one before."""

    size: int
    row: int = 0
    position: int = 0
    q_head: int = 0
    kv_head: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """`q_rows` queries against `k_rows` keys, every `rate`-th position, repeated over `axes`.

    Starts are the batch row, head and position of the first repetition. With `is_causal` the queries are the keys'
    rows; otherwise every query sees every key. `is_first`: no earlier tile of the plan has written these queries,
    and they are also the rows of its keys. With `is_kept` the keys' tensor holds the kept rows of branch `branch`
    alone, one after the other, in place of every position: those before the tensors at hand or, with `is_later`, those
    after them.
    """

    row: int
    q_head: int
    kv_head: int
    q_start: int
    q_rows: int
    k_start: int
    k_rows: int
    rate: int
    is_causal: bool
    is_first: bool
    axes: tuple[Axis, ...]
    branch: int = 0
    is_kept: bool = False
    is_later: bool = False

    @property
    def pairs(self) -> int:
        """The (query, key) pairs of all repetitions."""
        pairs = self.q_rows * (self.q_rows + 1) // 2 if self.is_causal else self.q_rows * self.k_rows
        return pairs * math.prod(axis.size for axis in self.axes)


class Plan(NamedTuple):
    """The tiles of one call; `is_complete` when their `is_first` ones write every query."""

    tiles: tuple[Tile, ...]
    is_complete: bool


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
    branches = sorted(enumerate(pattern.branches), key=lambda branch: branch[1][1] != 1)  # who writes all comes first
    tiles: list[Tile] = []
    skipped = k_tokens - q_tokens
    written = 0
    for run in runs:
        q_from = max(run.first, skipped - run.start)
        if q_from >= run.stop - run.start:
            continue
        written += run.rows * (run.stop - run.start - q_from)
        for index, (branch, (length, rate)) in enumerate(branches):
            is_first = index == 0 and rate == 1
            for base, count, positions, queried in _segments(run.stop - run.start, length, q_from):
                is_cut = base + positions == run.stop - run.start
                for tile, elsewhere in _segment_tiles(
                    pattern,
                    length,
                    rate,
                    run=run._replace(
                        start=run.start + base,
                        first=max(0, run.first - base),
                        beyond=min(run.beyond, length - positions) if is_cut else 0,
                    ),
                    count=count,
                    positions=positions,
                    queried=queried,
                    skipped=skipped,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                ):
                    if not (is_causal or is_partial):
                        tiles.append(replace(tile, is_first=is_first))
                        continue
                    own = replace(tile, k_start=tile.q_start + skipped, k_rows=tile.q_rows, is_causal=is_causal)
                    tiles.append(replace(own, is_first=is_first))
                    absent, earlier, later_from, later = elsewhere
                    if not is_partial:
                        if earlier:
                            tiles.append(replace(tile, k_rows=earlier))
                        continue
                    kept = replace(tile, branch=branch, is_kept=True)
                    if earlier > absent:
                        tiles.append(replace(kept, k_start=absent, k_rows=earlier - absent))
                    if later and not is_causal:
                        tiles.append(replace(kept, k_start=later_from, k_rows=later, is_later=True))
    return Plan(tuple(tiles), is_complete=branches[0][1][1] == 1 and written == batch_size * q_tokens)


class Elsewhere(NamedTuple):
    """Rows of a tile's segment before and after the queries' own.

    Attributes:
        absent: rows before the first that ever existed.
        earlier: rows before the first query, absent ones included.
        later_from: place of the first row beyond the positions at hand, counted from where they end.
        later: rows beyond the positions at hand.
    """

    absent: int
    earlier: int
    later_from: int
    later: int


def _segments(tokens: int, length: int, q_from: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (start, number of equal segments, positions in each, first queried position in it) of one branch."""
    segment, inside = divmod(q_from, length)
    whole = tokens // length
    if inside:
        yield segment * length, 1, min(length, tokens - segment * length), inside
        segment += 1
    if whole > segment:
        yield segment * length, whole - segment, length, 0
    if tokens % length and whole >= segment:
        yield whole * length, 1, tokens % length, 0


def _segment_tiles(
    pattern: DilationPattern,
    length: int,
    rate: int,
    *,
    run: Run,
    count: int,
    positions: int,
    queried: int,
    skipped: int,
    num_heads: int,
    num_kv_heads: int,
) -> Iterator[tuple[Tile, Elsewhere]]:
    """Yield the tiles of `count` equal segments from `run.start` on, queried from position `queried` of each on.

    A tile's keys are all rows of its segment at hand.
    """
    group = num_heads // num_kv_heads
    per_offset = -(
        -num_kv_heads // rate
    )  # heads of each of the first `full_offsets` offsets; later ones: `heads_after`
    if pattern.head_offsets == "mod":
        offset_step, head_step, offsets = 1, rate, min(rate, num_kv_heads)
        full_offsets, heads_after = num_kv_heads - rate * (per_offset - 1), per_offset - 1
    else:
        offset_step, head_step, offsets = per_offset, 1, -(-num_kv_heads // per_offset)
        full_offsets, heads_after = divmod(num_kv_heads, per_offset)
    edges = (positions, queried, run.first, positions + run.beyond)
    # Between two cuts all offsets have as many heads, kept rows and queries as each other.
    cuts = sorted(
        {
            0,
            offsets,
            *(cut for cut in (full_offsets, *(n % rate for n in edges)) if cut < offsets),
        }
    )
    for low, high in itertools.pairwise(cuts):
        k_rows = kept_rows(positions, rate, low)
        earlier = kept_rows(queried, rate, low)
        q_rows = k_rows - earlier
        if q_rows <= 0:
            continue
        heads = per_offset if low < full_offsets else heads_after
        k_start = run.start + low
        q_start = k_start + earlier * rate
        tile = Tile(
            row=run.row,
            q_head=low * offset_step * group,
            kv_head=low * offset_step,
            q_start=q_start - skipped,
            q_rows=q_rows,
            k_start=k_start,
            k_rows=k_rows,
            rate=rate,
            is_causal=False,
            is_first=False,
            axes=(
                Axis(run.rows, row=1),
                Axis(count, position=length),
                Axis(high - low, position=1, q_head=offset_step * group, kv_head=offset_step),
                Axis(heads, q_head=head_step * group, kv_head=head_step),
                Axis(group, q_head=1),
            ),
        )
        yield (
            tile,
            Elsewhere(
                absent=kept_rows(run.first, rate, low),
                earlier=earlier,
                later_from=k_rows - positions // rate,
                later=kept_rows(positions + run.beyond, rate, low) - k_rows,
            ),
        )


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
        for branch, (length, rate) in enumerate(pattern.branches):
            base = (tokens - 1) // length * length
            for tile, (_, earlier, _, _) in _segment_tiles(
                pattern,
                length,
                rate,
                run=run._replace(start=run.start + base, first=max(0, run.first - base)),
                count=1,
                positions=tokens - base,
                queried=max(0, q_from - base),
                skipped=0,
                num_heads=num_kv_heads,
                num_kv_heads=num_kv_heads,
            ):
                kept = replace(tile, k_start=earlier, k_rows=tile.q_rows, branch=branch, is_kept=True)
                yield kept, earlier, earlier + tile.q_rows


class Block(NamedTuple):
    """One kernel call: a tile's repetitions folded into (batch, heads)."""

    tile: Tile
    batch: Axis
    heads: Axis
    q_first: bool
    kv_first: bool

    def q(self, x_BHT: Tensor) -> Tensor:
        """View the rows of the queries, or of anything laid out like them: (batch, heads, rows, …)."""
        tile = self.tile
        return self._view(
            x_BHT, (self.batch.q_head, self.heads.q_head), tile.q_head, tile.q_start, tile.q_rows, tile.rate
        )

    def kv(self, x_BGT: Tensor) -> Tensor:
        """View the rows of the keys, or of anything laid out like them; an axis that shares them has stride 0."""
        tile = self.tile
        rate = 1 if tile.is_kept else tile.rate
        heads = (self.batch.kv_head, self.heads.kv_head)
        return self._view(x_BGT, heads, tile.kv_head, tile.k_start, tile.k_rows, rate, moves_on=not tile.is_kept)

    def kv_once(self, x_BGT: Tensor) -> Tensor:
        """View the rows of the keys, each once: size 1 on an axis that shares them. For what is added up there."""
        view = self.kv(x_BGT)
        for dim in self.shared:
            view = view.narrow(dim, 0, 1)
        return view

    @property
    def shared(self) -> tuple[int, ...]:
        """The kernel axes on which several query heads share one key/value head."""
        return tuple(dim for dim, axis in enumerate((self.batch, self.heads)) if axis.size > 1 and _shares_keys(axis))

    def _view(
        self,
        x: Tensor,
        head_steps: tuple[int, int],
        head: int,
        start: int,
        rows: int,
        rate: int,
        *,
        moves_on: bool = True,
    ) -> Tensor:
        row_stride, head_stride, position_stride, *rest = x.stride()
        strides = [
            axis.row * row_stride + step * head_stride + axis.position * position_stride * moves_on
            for axis, step in zip((self.batch, self.heads), head_steps, strict=True)
        ]
        return x.as_strided(
            (self.batch.size, self.heads.size, rows, *x.shape[3:]),
            (*strides, rate * position_stride, *rest),
            x.storage_offset() + self.tile.row * row_stride + head * head_stride + start * position_stride,
        )


def blocks(tile: Tile, q_like: Sequence[Tensor], kv_like: Sequence[Tensor], max_rows: int) -> tuple[Block, ...]:
    """Fold a tile's axes into kernel calls of at most `max_rows` query rows where the batch axis can be cut.

    Args:
        tile: what to compute.
        q_like: every tensor (B, H, T, …) that the call reads or writes at the queries' rows; one it writes is last.
        kv_like: every tensor (B, G, T, …) that it reads or writes at the keys' rows.
        max_rows: bound on batch · heads · rows of one call; a call has at least one batch entry.
    """
    return _blocks(tile, tuple(x.stride()[:3] for x in q_like), tuple(x.stride()[:3] for x in kv_like), max_rows)


@functools.lru_cache(maxsize=1024)
def _blocks(
    tile: Tile, q_strides: tuple[Strides, ...], kv_strides: tuple[Strides, ...], max_rows: int
) -> tuple[Block, ...]:
    if tile.is_kept:  # repetitions lie at the same rows of the state, whatever their positions
        kv_strides = tuple((row, head, 0) for row, head, _ in kv_strides)
    axes = _fold([axis for axis in tile.axes if axis.size > 1], q_strides, kv_strides)
    axes.sort(key=lambda axis: -axis.size)
    axes += [Axis(1)] * (2 - len(axes))
    batch, heads, *looped = axes
    # Kernels answer in the layout (batch, rows, heads, D): that of the queries, if heads is what lies between two rows.
    row, head, position = q_strides[-1]
    step = batch.row * row + batch.q_head * head + batch.position * position
    if step < tile.rate * position and batch.size * heads.size * tile.q_rows <= max_rows and batch.size <= _MAX_BATCH:
        batch, heads = heads, batch
    at_once = min(batch.size, _MAX_BATCH, max(1, max_rows // (heads.size * tile.q_rows)))
    calls = []
    for steps in itertools.product(*(range(axis.size) for axis in looped)):
        for start in range(0, batch.size, at_once):
            moves = [*zip(looped, steps, strict=True), (batch, start)]
            moved = replace(
                tile,
                row=tile.row + sum(axis.row * n for axis, n in moves),
                q_head=tile.q_head + sum(axis.q_head * n for axis, n in moves),
                kv_head=tile.kv_head + sum(axis.kv_head * n for axis, n in moves),
                q_start=tile.q_start + sum(axis.position * n for axis, n in moves),
                k_start=tile.k_start + (0 if tile.is_kept else sum(axis.position * n for axis, n in moves)),
            )
            calls.append(
                Block(
                    moved,
                    replace(batch, size=min(at_once, batch.size - start)),
                    heads,
                    q_first=tile.is_first,
                    kv_first=tile.is_first and not any(n for axis, n in moves if _shares_keys(axis)),
                )
            )
    return tuple(calls)


_MAX_BATCH = 65535  # a CUDA grid's second and third dimensions end there


def _shares_keys(axis: Axis) -> bool:
    return axis.row == axis.position == axis.kv_head == 0


def _fold(axes: list[Axis], q_strides: Sequence[Strides], kv_strides: Sequence[Strides]) -> list[Axis]:
    """Join pairs of axes that are one stride apart in every tensor, so that one kernel axis walks both."""

    def strides(axis: Axis) -> list[int]:
        return [
            axis.row * row + step * head + axis.position * position
            for tensors, step in ((q_strides, axis.q_head), (kv_strides, axis.kv_head))
            for row, head, position in tensors
        ]

    for outer, inner in itertools.permutations(range(len(axes)), 2):
        if strides(axes[outer]) == [stride * axes[inner].size for stride in strides(axes[inner])]:
            joined = replace(axes[inner], size=axes[outer].size * axes[inner].size)
            rest = [axis for index, axis in enumerate(axes) if index not in (outer, inner)]
            return _fold([*rest, joined], q_strides, kv_strides)
    return axes


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
