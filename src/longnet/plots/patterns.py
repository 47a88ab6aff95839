"""Which keys each query sees, head by head and branch by branch."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longnet.attention.pattern import DilationPattern
from longnet.plots.names import name_length

_CELLS = 256
_DRAWN_TOKENS = 2**22
_DPI = 100
_LETTERS = 15  # points in a pattern's picture: with three branches, 11 pixels where it is 358 wide
# A hue for each offset, so that heads that keep other rows look other; the first is that of rate 1.
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")


class Grid(NamedTuple):
    """A picture of queries (down) and keys (across) in squares of `size` × `size` tokens.

    Attributes:
        shares: (n, n) float64; of all pairs of a square, those that are attended to.
        size: tokens a square is wide; the last row and column may have fewer.
    """

    shares: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    size: int


def visibility(
    pattern: DilationPattern,
    branch: int,
    *,
    tokens: int,
    head: int,
    num_heads: int,
    is_causal: bool,
    cells: int = _CELLS,
) -> Grid:
    """Return how much of a head's keys each query sees in one branch.

    Args:
        pattern: the branches.
        branch: which of all (`DilationPattern.all_branches`).
        tokens: T.
        head: a key/value head.
        num_heads: of how many.
        is_causal: hide the keys after each query.
        cells: squares a side, at most; one a token where there are no more tokens.
    """
    length, rate, rows, is_dense = pattern.all_branches[branch]
    size = -(-tokens // cells)
    count = -(-tokens // size)
    offset = pattern.offset(rate, head, num_heads)
    place = np.arange(tokens, dtype=np.int64)
    keeps = (place % length % rate == offset) & (place % length // rate < rows)
    asks = np.ones_like(keeps) if is_dense else keeps
    edges = np.arange(0, tokens, size)
    pairs = np.zeros((count, count))
    # Within a square on the diagonal: the queries of the key's own segment and square, from the key on if causal.
    asked = np.concatenate([[0], np.cumsum(asks)])
    keys = place[keeps]
    first = np.maximum(keys // length * length, keys // size * size)
    last = np.minimum(np.minimum((keys // length + 1) * length, (keys // size + 1) * size), tokens)
    np.add.at(pairs, (keys // size, keys // size), asked[last] - asked[keys if is_causal else first])
    # Squares beside it: all queries of a segment in one against all keys in the other, each longer than a square.
    for start in range(0, tokens, length) if length > 1 else ():
        stop = min(start + length, tokens)
        low, high = start // size, (stop - 1) // size
        if low == high:
            continue
        cuts = np.clip(np.append(edges[low : high + 1], stop), start, stop)
        queries, held = asked[cuts[1:]] - asked[cuts[:-1]], np.diff(np.concatenate([[0], np.cumsum(keeps)])[cuts])
        beside = np.outer(queries, held).astype(np.float64)
        beside = np.tril(beside, -1) if is_causal else beside - np.diag(np.diag(beside))
        pairs[low : high + 1, low : high + 1] += beside
    sides = np.diff(np.append(edges, tokens))
    return Grid(pairs / np.outer(sides, sides), size)


def draw_pattern(
    pattern: DilationPattern,
    path: Path,
    *,
    tokens: int,
    num_heads: int,
    is_causal: bool = True,
    shown: int = 8,
    cells: int = _CELLS,
) -> None:
    """Draw which keys (across) each query (down) sees: a row per head, a column per branch, and all branches last.

    A colour's depth says which share of a square's pairs is attended to, its hue the offset of the rows that are kept.
    Upright and in large letters, so that four columns can be read on a telephone.

    Args:
        pattern: the branches.
        path: where the picture goes; its suffix is the format.
        tokens: sequence length; beyond `cells` a square stands for several tokens.
        num_heads: key/value heads.
        is_causal: hide the keys after each query.
        shown: heads that are drawn, the first ones.
        cells: squares a side, at most.

    Raises:
        ValueError: more than 2²² tokens, or a suffix that is no format.
    """
    if tokens > _DRAWN_TOKENS:
        raise ValueError(f"can draw up to {_DRAWN_TOKENS:,} tokens, got {tokens:,}: scale the pattern down with them")
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise ValueError(
            f"cannot draw {str(path)!r}: the suffix must be one of {', '.join(sorted(formats))}, or html, "
            "from longnet show, for the page in which it can be changed"
        )
    heads, branches = min(num_heads, shown), pattern.all_branches
    grids = [
        [
            visibility(pattern, branch, tokens=tokens, head=head, num_heads=num_heads, is_causal=is_causal, cells=cells)
            for branch in range(len(branches))
        ]
        for head in range(heads)
    ]
    size = grids[0][0].size
    count = len(grids[0][0].shares)
    side = count * max(1, round(150 / count))  # pixels; whole ones for each square, so that all are as large
    left, right, between, gap, foot = 86, 16, 16, 44, 226
    columns = len(branches) + 1
    width = left + columns * side + (columns - 1) * between + right
    each = "a square is one query and one key" if size == 1 else f"a square is {size:,} × {size:,} tokens"
    said = f"{tokens:,} tokens, queries down, keys across; {each}; hue: offset"
    said = textwrap.fill(said, (width - 30) * 72 // (_DPI * _LETTERS * 6 // 10))
    top = 112 + 24 * (said.count("\n") + 1)
    height = top + heads * side + (heads - 1) * gap + foot
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    power = 1 if size == 1 else 0.4
    ticks = _ticks(tokens)

    def panel(head: int, column: int) -> Axes:
        x, y = left + column * (side + between), foot + (heads - 1 - head) * (side + gap)
        ax = figure.add_axes((x / width, y / height, side / width, side / height))
        is_last = head == heads - 1
        ax.set_xticks([tick / size - 0.5 for tick in ticks], map(name_length, ticks) if is_last else [])
        ax.set_yticks([tick / size - 0.5 for tick in ticks], map(name_length, ticks) if column == 0 else [])
        ax.tick_params(labelsize=_LETTERS, length=3)
        if labels := ax.get_xticklabels():  # inwards, so that those of neighbours do not run into each other
            labels[-1].set_horizontalalignment("right")
            labels[0].set_horizontalalignment("left")
        return ax

    for head in range(heads):
        for column, (w, r, rows, _) in enumerate(branches):
            offset = pattern.offset(r, head, num_heads)
            is_global = column == len(pattern.branches)
            ax = panel(head, column)
            hue = colormaps[_HUES[offset % len(_HUES)]].with_extremes(under="white")
            norm = PowerNorm(power, 1e-12, 1)
            ax.imshow(grids[head][column].shares, cmap=hue, norm=norm, interpolation="nearest", aspect="auto")
            # Two lines and more are for the top panels: below them is a line's room.
            branch = f"global\ntokens\n{rows:,}" if is_global else f"w = {name_length(w)}\nr = {r}\noffset {offset}"
            ax.set_title(branch if head == 0 else branch.splitlines()[-1], fontsize=_LETTERS, pad=5)
            if column == 0:
                ax.set_ylabel(f"head {head}", fontsize=_LETTERS)
        ax = panel(head, columns - 1)
        total = np.sum([grid.shares for grid in grids[head]], axis=0)
        image = ax.imshow(
            total, cmap="Greys", norm=PowerNorm(power, 0, len(branches)), interpolation="nearest", aspect="auto"
        )
        ax.set_title("all", fontsize=_LETTERS, pad=5)
    for bottom, mappable, key in (
        (126, _grey_key(power, 1), "share of pairs"),
        (34, image, "times a pair is attended to"),
    ):
        place = (left / width, bottom / height, (width - left - 2 * right) / width, 14 / height)
        bar = figure.colorbar(mappable, cax=figure.add_axes(place), orientation="horizontal")
        bar.ax.tick_params(labelsize=_LETTERS, length=3)
        bar.ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        bar.ax.set_title(key, fontsize=_LETTERS, loc="left", pad=5)
    figure.text(15 / width, 1 - 10 / height, said, fontsize=_LETTERS, va="top")
    figure.savefig(path, dpi=_DPI * 2 if path.suffix == ".png" else _DPI)


def _grey_key(power: float, most: float) -> ScalarMappable:
    """Return a grey scale from 0 to `most`, for the key of panels of several hues."""
    return ScalarMappable(norm=PowerNorm(power, 0, most), cmap="Greys")


def _ticks(tokens: int) -> list[int]:
    step = 2 ** max(0, math.floor(math.log2(max(1, tokens) / 2)))
    return list(range(0, tokens + 1, step))
