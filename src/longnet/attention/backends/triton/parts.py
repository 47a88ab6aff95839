"""Where the parts of a result lie, for `combine`: which tile has a segment's rows of a head, and at what address."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends.triton.tables import send
from longnet.attention.plan import Whole

ROW_BYTES = 16  # rows begin at multiples of so many bytes
Steps = tuple[int, ...]


class Part(NamedTuple):
    """What a tile gives to a result.

    Attributes:
        branch: whose rows they are.
        rows: (…, …, rows, D), the rows of the result that it gives to, a view of that.
        out: alike, what it gives, last stride 1.
        lse: (…, …, rows), float32; None where parts are added up.
    """

    branch: int
    rows: Tensor
    out: Tensor
    lse: Tensor | None


class Placed(NamedTuple):
    """A part without its addresses: (batch, heads, rows) of it, where they go, and the strides of what it gives."""

    branch: int
    sizes: Steps
    offset: int
    steps: Steps
    out: Steps
    lse: Steps


class Table(NamedTuple):
    """What a launch reads, see `combine.combine`; ENTRIES lack their addresses, whose parts `owners` tells.

    Attributes:
        entries: (n, 6) int64, on the CPU.
        owners: (n,) int64, on the CPU.
        layers: (layers, 2) int32.
        bases: (documents, layers) int32.
        work: (blocks, 5) int32.
    """

    entries: Tensor
    owners: Tensor
    layers: Tensor
    bases: Tensor
    work: Tensor


def placed(part: Part, result: Tensor) -> Placed:
    """Return a part as what a table depends on."""
    return Placed(
        part.branch,
        tuple(part.rows.shape[:3]),
        int(part.rows.storage_offset() - result.storage_offset()),
        part.rows.stride()[:2],
        part.out.stride()[:3],
        () if part.lse is None else part.lse.stride(),
    )


@functools.lru_cache(maxsize=64)
def table_of(
    parts: tuple[Placed, ...],
    shape: Steps,
    strides: Steps,
    itemsize: int,
    whole: Whole,
    skipped: int,
    block: int,
    device: torch.device,
) -> Table:
    """Lay out which parts give to a result.

    Args:
        parts: of all tiles.
        shape: (B, H, T) of the result.
        strides: its own.
        itemsize: bytes of a number of the parts.
        whole: what attends to what.
        skipped: positions at hand before the first of the result's.
        block: positions of a program.
        device: of all but the entries.
    """
    documents = [
        (row, run.start - skipped, run.stop - run.start)
        for run in whole.runs
        for row in range(run.row, run.row + run.rows)
        if run.stop > skipped
    ]
    rows, starts, tokens = torch.tensor(documents, dtype=torch.int64).view(-1, 3).unbind(1)
    lengths, rates = torch.tensor(whole.pattern.branches, dtype=torch.int64).unbind(1)
    # One row for each (batch, head) of each part: all of them at once, since packed documents have many.
    columns = [(*part[1], part[0], part[2], *part[3], *part[4], *(part[5] or (0, 0, 0))) for part in parts]
    sizes = torch.tensor(columns, dtype=torch.int64)
    counts = sizes[:, 0] * sizes[:, 1]
    owners = torch.repeat_interleave(torch.arange(len(parts)), counts)
    _, n_heads, n_rows, branch, offset, *steps = sizes[owners].unbind(1)
    index = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    at, head = index // n_heads, index % n_heads
    b, h, p = _decode(offset + at * steps[0] + head * steps[1], shape, strides)
    firsts = rows * shape[2] + starts.clamp(min=0)
    order = torch.argsort(firsts)
    document = order[torch.searchsorted(firsts[order], b * shape[2] + p, right=True) - 1]
    inside = p - starts[document]
    # A branch has an entry for each segment and head; where several parts ask for one, each has a layer of its own.
    segments = -(-tokens // lengths[:, None]) * shape[1]  # (branches, documents)
    bases = (segments.cumsum(1) - segments)[branch, document]
    places = bases + inside // lengths[branch] * shape[1] + h
    totals = segments.sum(1)
    keys = (totals.cumsum(0) - totals)[branch] + places
    order = torch.argsort(keys, stable=True)
    _, inverse, times = torch.unique_consecutive(keys[order], return_inverse=True, return_counts=True)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order)) - (times.cumsum(0) - times)[inverse]
    layers = torch.unique(torch.stack([branch, turn], 1), dim=0)
    begins = totals[layers[:, 0]].cumsum(0) - totals[layers[:, 0]]
    layer = torch.searchsorted(layers[:, 0] * len(keys) + layers[:, 1], branch * len(keys) + turn)
    entries = torch.zeros(int(totals[layers[:, 0]].sum()), 6, dtype=torch.int64)
    of_entry = torch.zeros(len(entries), dtype=torch.int64)
    places += begins[layer]
    entries[places] = torch.stack(
        [
            itemsize * (at * steps[2] + head * steps[3]), steps[4],
            4 * (at * steps[5] + head * steps[6]), steps[7],
            inside, n_rows,
        ], 1,
    )  # fmt: skip
    of_entry[places] = owners
    work = [
        (row, start, length, first, document)
        for document, (row, start, length) in enumerate(documents)
        for first in range(max(0, -start), length, block)
    ]
    return Table(
        entries,
        of_entry,
        send(torch.stack([lengths, rates], 1)[layers[:, 0]].int(), device),
        send((begins[:, None] + (segments.cumsum(1) - segments)[layers[:, 0]]).T.int().contiguous(), device),
        send(torch.tensor(work, dtype=torch.int32).view(-1, 5), device),
    )


def entries_of(table: Table, parts: Sequence[Part], device: torch.device) -> Tensor:
    """Return the entries with the addresses of this call's parts, on the device; nothing waits for it."""
    entries = table.entries.clone()
    entries[:, 0] += torch.tensor([part.out.data_ptr() for part in parts])[table.owners]
    if parts[0].lse is not None:
        entries[:, 2] += torch.tensor([part.lse.data_ptr() for part in parts])[table.owners]  # type: ignore[union-attr]
    return send(entries, device)


def _decode(at: Tensor, shape: Steps, strides: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places (b, h, t) of elements of a dense tensor, that lie so far from its first one."""
    found = [torch.zeros_like(at)] * 3
    for dim in sorted(range(3), key=lambda dim: -strides[dim]):
        if shape[dim] > 1:
            found[dim] = at // strides[dim]
            at = at % strides[dim]
    return found[0], found[1], found[2]
