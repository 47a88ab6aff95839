"""Kept rows as strided views: a tile's repetitions folded into what kernels read.

A kernel has two axes beside the rows; `blocks` folds a tile's axes into those by their strides, and loops over what
does not fold. Nothing is gathered.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from longnet.attention.plan import Axis, Tile

Strides = tuple[int, ...]  # of batch rows, heads, positions, and what there is beside
Place = tuple[int, int, int]  # batch row, head, position


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """One kernel call: a tile's repetitions folded into (batch, heads)."""

    tile: Tile
    batch: Axis
    heads: Axis
    q_first: bool
    kv_first: bool
    _places: dict[tuple[bool, Strides], tuple[Strides, Strides, int]] = field(default_factory=dict, repr=False)

    def q(self, x_BHT: Tensor) -> Tensor:
        """View the rows of the queries, or of anything laid out like them: (batch, heads, rows, …)."""
        return self._view(x_BHT, is_kv=False)

    def kv(self, x_BGT: Tensor) -> Tensor:
        """View the rows of the keys, or of anything laid out like them; an axis that shares them has stride 0."""
        return self._view(x_BGT, is_kv=True)

    def kv_once(self, x_BGT: Tensor) -> Tensor:
        """View the rows of the keys, each once: size 1 on an axis that shares them. For what is added up there."""
        view = self.kv(x_BGT)
        for dim in self.shared:
            view = view.narrow(dim, 0, 1)
        return view

    @property
    def shared(self) -> tuple[int, ...]:
        """The kernel axes along which the keys are the same, by a stride of 0."""
        axes = enumerate((self.batch, self.heads))
        return tuple(dim for dim, axis in axes if axis.size > 1 and axis.sharing == 1 and _shares_keys(axis))

    def _view(self, x: Tensor, *, is_kv: bool) -> Tensor:
        # The same tensors come at every call, and where their rows lie takes longer to find than to look up.
        place = self._places.get((is_kv, x.stride()))
        if place is None:
            place = self._places[is_kv, x.stride()] = self._place(x.stride(), is_kv=is_kv)
        sizes, strides, start = place
        return x.as_strided((*sizes, *x.shape[3:]), strides, x.storage_offset() + start)

    def _place(self, x_strides: Strides, *, is_kv: bool) -> tuple[Strides, Strides, int]:
        """Return sizes of the three axes, strides of all, and where the rows begin."""
        tile, axes, outer = self.tile, (self.batch, self.heads), x_strides[:3]
        if is_kv:
            steps = [(axis.row, axis.kv_head, axis.kv_position) for axis in axes]
            start, rows, rate = (tile.row, tile.kv_head, tile.k_start), tile.k_rows, tile.k_rate
        else:
            steps = [(axis.row, axis.q_head, axis.q_position) for axis in axes]
            start, rows, rate = (tile.row, tile.q_head, tile.q_start), tile.q_rows, tile.q_rate
        sizes = self.batch.size, self.heads.size // (self.heads.sharing if is_kv else 1)
        # An axis of one entry has a stride of x, since kernels look at strides before sizes.
        strides = [
            _dot(step, outer) if size > 1 else own for step, size, own in zip(steps, sizes, outer[:2], strict=True)
        ]
        return (*sizes, rows), (*strides, rate * outer[2], *x_strides[3:]), _dot(start, outer)


def blocks(
    tile: Tile,
    q_like: Sequence[Tensor],
    kv_like: Sequence[Tensor],
    max_rows: int,
    *,
    groups_heads: bool = False,
) -> tuple[Block, ...]:
    """Fold a tile's axes into kernel calls of at most `max_rows` query rows where the batch axis can be cut.

    Args:
        tile: what to compute.
        q_like: every tensor (B, H, T, …) that the call reads or writes at the queries' rows; one it writes is last.
        kv_like: every tensor (B, G, T, …) that it reads or writes at the keys' rows.
        max_rows: bound on batch · heads · rows of one call; a call has at least one batch entry.
        groups_heads: the kernel takes fewer heads of keys than of queries.
    """
    q_strides, kv_strides = (tuple(x.stride()[:3] for x in tensors) for tensors in (q_like, kv_like))
    return _blocks(tile, q_strides, kv_strides, max_rows, groups_heads)


@functools.lru_cache(maxsize=1024)
def _blocks(
    tile: Tile, q_strides: tuple[Strides, ...], kv_strides: tuple[Strides, ...], max_rows: int, groups_heads: bool
) -> tuple[Block, ...]:
    axes = _fold([axis for axis in tile.axes if axis.size > 1], q_strides, kv_strides)
    axes.sort(key=lambda axis: -axis.size)
    axes += [Axis(1)] * (2 - len(axes))
    batch, heads, *looped = axes
    # Kernels answer in the layout (batch, rows, heads, D): that of the queries, if heads is what lies between two rows.
    row, head, position = q_strides[-1]
    step = batch.row * row + batch.q_head * head + batch.q_position * position
    grouped = _group_heads(axes) if groups_heads else None
    if grouped:
        heads, batch, *looped = grouped
    elif (
        step < tile.q_rate * position and batch.size * heads.size * tile.q_rows <= max_rows and batch.size <= _MAX_BATCH
    ):
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
                q_start=tile.q_start + sum(axis.q_position * n for axis, n in moves),
                k_start=tile.k_start + sum(axis.kv_position * n for axis, n in moves),
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


def _dot(steps: Sequence[int], strides: Sequence[int]) -> int:
    return sum(map(operator.mul, steps, strides))


_MAX_BATCH = 65535  # a CUDA grid's second and third dimensions end there


def _shares_keys(axis: Axis) -> bool:
    return axis.row == axis.kv_position == axis.kv_head == 0


def _group_heads(axes: list[Axis]) -> list[Axis] | None:
    """Return axes whose first holds queries that share key heads, as a kernel with grouped heads takes them.

    None where there are none, or where two other axes are larger and had better not be looped over.
    """
    sharing = [axis for axis in axes if axis.size > 1 and _shares_keys(axis)]
    for shared, axis in itertools.product(sharing, axes):
        is_of_heads = axis.row == axis.q_position == axis.kv_position == 0 and axis.kv_head
        if is_of_heads and axis.q_head == shared.size * shared.q_head:
            heads = replace(shared, size=axis.size * shared.size, kv_head=axis.kv_head, sharing=shared.size)
            return [heads, *(other for other in axes if other is not shared and other is not axis), Axis(1)]
    for shared in sharing:
        if shared in axes[:2]:
            return [replace(shared, sharing=shared.size), *(axis for axis in axes if axis is not shared), Axis(1)]
    return None


def _fold(axes: list[Axis], q_strides: Sequence[Strides], kv_strides: Sequence[Strides]) -> list[Axis]:
    """Join pairs of axes that are one stride apart in every tensor, so that one kernel axis walks both."""

    def strides(axis: Axis) -> list[int]:
        of_q = [_dot((axis.row, axis.q_head, axis.q_position), of_x) for of_x in q_strides]
        return of_q + [_dot((axis.row, axis.kv_head, axis.kv_position), of_x) for of_x in kv_strides]

    for outer, inner in itertools.permutations(range(len(axes)), 2):
        if strides(axes[outer]) == [stride * axes[inner].size for stride in strides(axes[inner])]:
            joined = replace(axes[inner], size=axes[outer].size * axes[inner].size)
            rest = [axis for index, axis in enumerate(axes) if index not in (outer, inner)]
            return _fold([*rest, joined], q_strides, kv_strides)
    return axes
