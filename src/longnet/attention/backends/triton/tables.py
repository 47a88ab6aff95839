"""What the fused kernels read on the device: a pattern's branches, a call's blocks of work, a halo's places."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Whole

AT_HAND, HALO, EVERYWHERE = range(1, 2), range(0, 3, 2), range(3)  # the sources of keys, as `forward` has them
_NO_END, _ALL_ROWS = 2**30, 2**31 - 1  # as 32 bits hold them; positions lie below the first
Span = tuple[Run, int, int]  # and its positions low … high − 1


class Tables(NamedTuple):
    """A pattern on the device: those of its branches that thin their queries first.

    Attributes:
        branches: (N, 4) int32, length, rate, distance of the queries, rows kept of a segment at most.
        offsets: (N, G) int32.
        covering: the last branch if every query is in it, else −1.
        most: the largest distance of queries or keys.
    """

    branches: Tensor
    offsets: Tensor
    covering: int
    most: int


@functools.lru_cache(maxsize=256)
def tables_of(pattern: DilationPattern, num_kv_heads: int, device: torch.device) -> Tables:
    branches = [pattern.all_branches[index] for index in _order(pattern)]
    rows = [
        (min(length, _NO_END), rate, 1 if is_dense else rate, min(most, _ALL_ROWS))
        for length, rate, most, is_dense in branches
    ]
    offsets = [[pattern.offset(branch.rate, head, num_kv_heads) for head in range(num_kv_heads)] for branch in branches]
    return Tables(
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(offsets, dtype=torch.int32, device=device),
        len(rows) - 1 if rows[-1][2] == 1 else -1,
        branches[0].rate,
    )


def _order(pattern: DilationPattern) -> list[int]:
    """Return the branches as the tables have them: those that thin their queries most come first."""
    return sorted(range(len(pattern.all_branches)), key=lambda index: -pattern.all_branches[index].rate)


def places_of(whole: Whole, device: torch.device) -> Tensor:
    none = (0,) * len(whole.pattern.all_branches)
    return _places_on(whole.pattern, whole.earlier or none, whole.later or none, device)


@functools.lru_cache(maxsize=256)
def _places_on(
    pattern: DilationPattern, earlier: tuple[int, ...], later: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return (N, 2) int32: where a halo has each branch's rows from before and from after what is at hand."""
    places = [(earlier[index], later[index]) for index in _order(pattern)]
    return torch.tensor(places, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def edges_on(pattern: DilationPattern, edges: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (N, 2) int32: a branch's first place in a state, and one past its last."""
    places = [edges[index : index + 2] for index in _order(pattern)]
    return torch.tensor(places, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def active_on(active: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(active, dtype=torch.int32, device=device)


def spans_of(whole: Whole, sources: range, skipped: int) -> tuple[Span, ...]:
    """Return the positions of each run whose queries, the last but `skipped` at hand, see keys of some sources."""
    if AT_HAND.start in sources:
        return tuple((run, max(run.first, skipped - run.start, 0), run.stop - run.start) for run in whole.runs)
    spans: dict[Run, tuple[int, int]] = {}
    for run, branch, base, *_ in _cuts(whole):
        end = base + whole.pattern.all_branches[_order(whole.pattern)[branch]].length
        low, high = spans.get(run, (base, end))
        spans[run] = min(low, base), max(high, end)
    return tuple(
        (run, max(low, run.first, skipped - run.start), min(high, run.stop - run.start))
        for run, (low, high) in spans.items()
    )


def _cuts(whole: Whole) -> Iterator[tuple[Run, int, int, int, int]]:
    """Yield what the tensors at hand cut off: run, branch (as the tables have it), segment's start, positions there."""
    for run in whole.runs:
        tokens = run.stop - run.start
        hand = max(-run.start, run.first)
        for branch, index in enumerate(_order(whole.pattern)):
            length, rate, rows, _ = whole.pattern.all_branches[index]
            if hand < tokens and hand % length:
                base = hand - hand % length
                high = min(hand - base, rows * rate)
                if (low := max(run.first - base, 0)) < high:
                    yield run, branch, base, low, high
            inside = tokens % length
            high = min(length, inside + run.beyond, rows * rate)
            if run.beyond and 0 < inside < high and not whole.is_causal:
                yield run, branch, tokens - inside, inside, high


@functools.lru_cache(maxsize=64)
def work_of(spans: tuple[Span, ...], length: int, device: torch.device, *, late_first: bool = True) -> Tensor:
    """Return (blocks, 6) int32, `forward.attend`'s WORK; late blocks first, or last.

    With causality late queries see most keys, and early keys are seen by most queries: the longest programs had better
    begin first.
    """
    blocks = [
        (row, run.start, run.stop, first, run.first, run.beyond)
        for run, low, high in spans
        for row in range(run.row, run.row + run.rows)
        for first in range(low // length * length, high, length)
    ]
    blocks.sort(key=lambda block: -block[3] if late_first else block[3])
    return _travel(blocks, 6, device)


@functools.lru_cache(maxsize=64)
def halo_work_of(whole: Whole, rows: int, device: torch.device) -> Tensor:
    """Return (blocks, 9) int32, `backward.backward_halo`'s WORK."""
    rates = [whole.pattern.all_branches[index].rate for index in _order(whole.pattern)]
    blocks = [
        (row, run.start, run.stop, run.first, branch, base, low, high, skip)
        for run, branch, base, low, high in _cuts(whole)
        for row in range(run.row, run.row + run.rows)
        for skip in range(0, -(-(high - low) // rates[branch]), rows)
    ]
    return _travel(blocks, 9, device)


def _travel(blocks: Sequence[tuple[int, ...]], columns: int, device: torch.device) -> Tensor:
    """Send a table to the device: documents travel as they lie in memory, which waits for nothing."""
    farthest = max((-block[1] for block in blocks), default=0)
    if farthest > 2**30:
        raise ValueError(
            f'backend="triton" counts positions in 32 bits, and got tokens at {farthest:,}, beyond 2**30: take "auto", '
            "or stream them one by one"
        )
    return send(torch.tensor(blocks, dtype=torch.int32).view(-1, columns), device)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU's on a device; nothing waits for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
