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
        phases: of the branch's rows of a head, which come one by one: the distance of the rows; 1 where these are all.
        rows: (…, …, rows, D), the rows of the result that it gives to, a view of that.
        out: alike, what it gives, last stride 1.
        lse: (…, …, rows), float32; None where parts are added up.
    """

    branch: int
    phases: int
    rows: Tensor
    out: Tensor
    lse: Tensor | None


class Placed(NamedTuple):
    """A part without its addresses: (batch, heads, rows) of it, where they go, and the strides of what it gives."""

    branch: int
    rate: int
    phases: int
    sizes: Steps
    offset: int
    steps: Steps
    out: Steps
    lse: Steps


class Table(NamedTuple):
    """What a launch reads, see `combine.combine`; ENTRIES lack their addresses, whose parts `owners` tells.

    Attributes:
        entries: (n, 7) int64, on the CPU.
        owners: (n,) int64, on the CPU.
        layers: (layers, 2) int32.
        bases: (documents, layers, 3) int32.
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
        part.rows.stride(2) // result.stride(2),
        part.phases,
        tuple(part.rows.shape[:3]),
        int(part.rows.storage_offset() - result.storage_offset()),
        part.rows.stride()[:2],
        part.out.stride()[:3],
        () if part.lse is None else part.lse.stride(),
    )


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
    kinds = tuple(sorted({part[:3] for part in parts}))
    return _table_of(parts, shape, strides, itemsize, _cut_of(kinds, whole, skipped), block, device)


class Cut(NamedTuple):
    """How segments cut documents, as seen from what is at hand: the same for chunk after chunk of a long sequence.

    Attributes:
        documents: of each its batch row, its first position at hand, and how many there are.
        lengths: per kind of part and document, of a segment; at most what is at hand if that lies in one.
        inside: alike, how much of the first segment lies before the document's first position at hand.
    """

    documents: tuple[tuple[int, int, int], ...]
    lengths: tuple[Steps, ...]
    inside: tuple[Steps, ...]


@functools.lru_cache(maxsize=64)
def _cut_of(kinds: tuple[tuple[int, int, int], ...], whole: Whole, skipped: int) -> Cut:
    documents = []  # batch row, first position at hand, how many, and how many of the document's lie before it
    for run in whole.runs:
        start = run.start - skipped
        first = max(start + run.first, 0)
        if run.stop - skipped > first:
            documents += [
                (row, first, run.stop - skipped - first, first - start) for row in range(run.row, run.row + run.rows)
            ]
    _, _, tokens, before = torch.tensor(documents, dtype=torch.int64).view(-1, 4).unbind(1)
    branches, rates, _ = torch.tensor(kinds, dtype=torch.int64).unbind(1)
    lengths = torch.tensor([branch.length for branch in whole.pattern.all_branches], dtype=torch.int64)
    length, inside = _within_32_bits(lengths[branches, None], before, tokens, rates[:, None])
    length = torch.minimum(length, inside + tokens)
    return Cut(
        tuple(document[:3] for document in documents),
        *(tuple(map(tuple, column.expand(len(kinds), len(documents)).tolist())) for column in (length, inside)),
    )


@functools.lru_cache(maxsize=256)  # a dozen kinds of chunks, three results each, of several layers where offsets shift
def _table_of(
    parts: tuple[Placed, ...], shape: Steps, strides: Steps, itemsize: int, cut: Cut, block: int, device: torch.device
) -> Table:
    kinds = sorted({part[:3] for part in parts})
    _, rates, phases = torch.tensor(kinds, dtype=torch.int64).unbind(1)
    rows, firsts, tokens = torch.tensor(cut.documents, dtype=torch.int64).view(-1, 3).unbind(1)
    length, inside = (torch.tensor(column, dtype=torch.int64) for column in (cut.lengths, cut.inside))
    # One row for each (batch, head) of each part: all of them at once, since packed documents have many.
    columns = [
        (*part[3], kinds.index(part[:3]), part[4], *part[5], *part[6], *(part[7] or (0, 0, 0))) for part in parts
    ]
    sizes = torch.tensor(columns, dtype=torch.int64)
    counts = sizes[:, 0] * sizes[:, 1]
    owners = torch.repeat_interleave(torch.arange(len(parts)), counts)
    _, n_heads, n_rows, kind, offset, *steps = sizes[owners].unbind(1)
    index = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    at, head = index // n_heads, index % n_heads
    b, h, t = _decode(offset + at * steps[0] + head * steps[1], shape, strides)
    order = torch.argsort(rows * shape[2] + firsts)
    document = order[torch.searchsorted((rows * shape[2] + firsts)[order], b * shape[2] + t, right=True) - 1]
    u = t - firsts[document] + inside[kind, document]
    segment, u = u // length[kind, document], u % length[kind, document]
    row, phase = u // rates[kind], u % rates[kind]
    # A kind has an entry for each segment, head and phase; where several parts ask for one, each has a layer.
    needed = ((tokens - 1 + inside) // length + 1) * shape[1] * phases[:, None]  # (kinds, documents)
    places = (needed.cumsum(1) - needed)[kind, document]
    places += (segment * shape[1] + h) * phases[kind] + torch.where(phases[kind] > 1, phase, 0)
    totals = needed.sum(1)
    keys = (totals.cumsum(0) - totals)[kind] + places
    order = torch.argsort(keys, stable=True)
    _, inverse, times = torch.unique_consecutive(keys[order], return_inverse=True, return_counts=True)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order)) - (times.cumsum(0) - times)[inverse]
    layers, layer = torch.unique(torch.stack([kind, turn], 1), dim=0, return_inverse=True)
    of_layer = layers[:, 0]
    begins = totals[of_layer].cumsum(0) - totals[of_layer]
    entries = torch.zeros(int(totals[of_layer].sum()), 7, dtype=torch.int64)
    of_entry = torch.zeros(len(entries), dtype=torch.int64)
    places += begins[layer]
    entries[places] = torch.stack(
        [
            itemsize * (at * steps[2] + head * steps[3] - row * steps[4]), steps[4],
            4 * (at * steps[5] + head * steps[6] - row * steps[7]), steps[7],
            row, row + n_rows, phase,
        ], 1,
    )  # fmt: skip
    of_entry[places] = owners
    counts = -(-tokens // block)
    document = torch.repeat_interleave(torch.arange(len(rows)), counts)
    turn = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    work = torch.stack([rows[document], firsts[document], tokens[document], turn * block, document], 1)
    bases = begins[:, None] + (needed.cumsum(1) - needed)[of_layer]
    return Table(
        entries,
        of_entry,
        send(torch.stack([rates, phases], 1)[of_layer].int(), device),
        send(torch.stack([bases, length[of_layer], inside[of_layer]], 2).transpose(0, 1).int().contiguous(), device),
        send(work.int(), device),
    )


def _within_32_bits(length: Tensor, before: Tensor, tokens: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Return a shorter segment, and how much of it lies before a document's first position at hand.

    Ends of segments, and what is left of a position after division by the rate, are where they were among so many
    tokens: a stream is at any position, and a segment as long as may be.
    """
    inside = before % length
    spare = torch.minimum((length - tokens) // rate, inside // rate).clamp(min=0) * rate
    return (length - spare).clamp(max=2**31 - 1), inside - spare


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
