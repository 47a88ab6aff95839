"""A picture of the rows that heads keep, for notebooks: a strip a branch, a line a head, from the first token on."""

from __future__ import annotations

import html
from collections.abc import Sequence

_CELLS, _CELL, _LINE, _LEFT = 64, 6, 7, 96  # cells a strip; pixels a cell, a line, and left of them


def shares(segment_length: int, rate: int, offset: int, *, tokens: int) -> list[float]:
    """Return which share of the positions of each cell a head keeps, of up to 64 cells over `tokens` positions."""
    size = -(-tokens // _CELLS)
    found = []
    for start in range(0, tokens, size):
        stop, kept, at = min(start + size, tokens), 0, start
        while at < stop:  # a segment at a time, or all whole ones at once
            low = at % segment_length
            if not low and stop - at >= segment_length:
                whole = (stop - at) // segment_length
                kept += whole * len(range(offset, segment_length, rate))
                at += whole * segment_length
                continue
            high = min(segment_length, low + stop - at)
            kept += len(range(low + (offset - low) % rate, high, rate))
            at += high - low
        found.append(kept / (stop - start))
    return found


def draw_strips(title: str, branches: Sequence[tuple[int, int, Sequence[int]]]) -> str:
    """Return HTML: for each branch (segment length, rate, offsets of the first heads) what these keep.

    Shown are as many positions as the longest segment has; the darker, the larger the share of a cell that is kept.
    Bars stand where segments begin.
    """
    tokens = max(length for length, *_ in branches)
    rows, top = [], 24
    for length, rate, offsets in branches:
        rows.append(f'<text x="0" y="{top + _LINE}">w={length:,} r={rate}</text>')
        for offset in offsets:
            found = shares(length, rate, offset, tokens=tokens)
            start = 0
            for cell in range(1, len(found) + 1):  # cells alike are one rectangle
                if cell < len(found) and found[cell] == found[start]:
                    continue
                if found[start]:
                    rows.append(
                        f'<rect x="{_LEFT + _CELL * start}" y="{top}" width="{_CELL * (cell - start)}" '
                        f'height="{_LINE - 1}" opacity="{max(0.15, found[start] ** 0.5):.2f}"/>'
                    )
                start = cell
            top += _LINE
        if tokens <= _CELLS * length:  # where segments begin; more of them would be a smear
            size = -(-tokens // _CELLS)
            edges = (_LEFT + _CELL * start / size for start in range(0, tokens + 1, length))
            line = "".join(f"M{edge:.1f} {top - _LINE * len(offsets) - 3}V{top + 2}" for edge in edges)
            rows.append(f'<path d="{line}" stroke="currentColor"/>')
        top += 2 * _LINE
    said = f"positions 0 to {tokens - 1:,} across, a line a head, segments between bars; darker: more are kept"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _CELL * _CELLS}" height="{top + 8}" role="img" '
        f'aria-label="{html.escape(title)}" fill="currentColor" font-family="sans-serif" font-size="11">'
        f'<text x="0" y="11">{html.escape(title)}</text>{"".join(rows)}<text x="0" y="{top + 4}">{said}</text></svg>'
    )
