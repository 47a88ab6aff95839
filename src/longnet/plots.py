"""Pictures, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from longnet.attention.pattern import DilationPattern, kept_rows

_PIXELS = 256
_DRAWN_TOKENS = 2**22
_DENSE, _DILATED, _IDEAL = "#9a6b4f", "#1f6f8b", "#b7c4c9"
_KINDS, _OTHER = {"dilated": _DILATED, "sdpa": _DENSE, "sparse_fixed": "#7a8f2a"}, "#5b5b8c"


def visibility(
    pattern: DilationPattern, branch: int, *, tokens: int, head: int, num_heads: int, is_causal: bool
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Return which of a head's keys each query sees in one branch, as (n, n) bins of tokens, queries first.

    n = min(tokens, 256). A bin pair is True where any query of the one sees any key of the other.
    """
    length, rate = pattern.branches[branch]
    size = min(tokens, _PIXELS)
    seen = np.zeros((size, size), dtype=np.bool_)
    offset = pattern.offset(rate, head, num_heads)
    for start in range(0, tokens, length):
        rows = kept_rows(min(length, tokens - start), rate, offset)
        bins = np.unique((start + offset + rate * np.arange(rows, dtype=np.int64)) * size // tokens)
        seen[np.ix_(bins, bins)] = True
    return np.tril(seen) if is_causal else seen


def draw_pattern(pattern: DilationPattern, path: Path, *, tokens: int, num_heads: int, is_causal: bool = True) -> None:
    """Draw which keys (across) each query (down) sees: a column per head, a row per branch, and all branches last.

    Args:
        pattern: the branches.
        path: where the picture goes; its suffix is the format.
        tokens: sequence length; beyond 256 a pixel stands for several tokens.
        num_heads: key/value heads; the first 8 are drawn.
        is_causal: hide the keys after each query.

    Raises:
        ValueError: more than 2²² tokens, or a suffix that is no format.
    """
    if tokens > _DRAWN_TOKENS:
        raise ValueError(f"can draw up to {_DRAWN_TOKENS:,} tokens, got {tokens:,}: scale the pattern down with them")
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise ValueError(f"cannot draw {str(path)!r}: the suffix must be one of {', '.join(sorted(formats))}")
    heads = min(num_heads, 8)
    rows = len(pattern.branches) + 1
    figure = Figure(figsize=(1.7 * heads + 1.1, 1.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, heads, squeeze=False)
    for head in range(heads):
        layers = [
            visibility(pattern, branch, tokens=tokens, head=head, num_heads=num_heads, is_causal=is_causal)
            for branch in range(rows - 1)
        ]
        counts = np.sum(layers, axis=0)
        for row, layer in enumerate([*layers, counts]):
            ax = axes[row][head]
            ax.imshow(layer, cmap="GnBu", vmin=0, vmax=max(1, rows - 1), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(f"head {head}", fontsize=9)
        for row, label in enumerate([*(f"w={w}, r={r}" for w, r in pattern.branches), "all branches"]):
            axes[row][0].set_ylabel(label, fontsize=9)
    figure.suptitle(f"{tokens} tokens: queries down, keys across", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_runtime(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw run time against tokens, dilated and dense, from rows of `longnet bench attention` (paper, Figure 5)."""
    rows = sorted((row for row in rows if row["case"] == "compare"), key=lambda row: int(row["tokens"]))
    tokens = [row["tokens"] for row in rows]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for ax, key, name in zip(panels, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        dense, dilated = ([1e3 * row[f"{key}_{which}_s"] for row in rows] for which in ("dense", "dilated"))
        ideal = [seconds / row["flop_ratio"] for seconds, row in zip(dense, rows, strict=True)]
        ax.loglog(tokens, dense, "o-", color=_DENSE, label="dense (SDPA)")
        ax.loglog(tokens, dilated, "o-", color=_DILATED, label="dilated")
        ax.loglog(tokens, ideal, "--", color=_IDEAL, label="dense ÷ FLOP ratio", zorder=0)
        ax.set_xticks(tokens, [f"{n // 1024}K" for n in tokens])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("tokens")
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        label: in the legend.
        x: places.
        y: values.
        error: standard errors, drawn as a band of two of them on either side; None for none.
        kind: what the colour says: "dilated", "sdpa", "sparse_fixed", or anything else.
        style: of the line, which tells curves of a kind apart: 0, 1, ….
        names: written beside each place; None for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] | None = None
    kind: str = "dilated"
    style: int = 0
    names: Sequence[str] | None = None


def draw_curves(
    curves: Sequence[Curve],
    path: Path,
    *,
    x: str,
    y: str,
    scale: Literal["tokens", "log", "linear"] = "tokens",
    mark: tuple[float, str] | None = None,
) -> None:
    """Draw curves with a legend.

    Args:
        curves: what to draw.
        path: where the picture goes; its suffix is the format.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        scale: of the horizontal axis: "tokens" for a few lengths, named 512, 2K, …, on a logarithmic one. Places are
            marked but on a linear one, which has many.
        mark: a vertical line, and what it marks.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for curve in curves:
        colour = _KINDS.get(curve.kind, _OTHER)
        line = ("-", "--", ":", "-.")[curve.style % 4]
        marker = None if scale == "linear" else ("o", "s", "^", "D")[curve.style % 4]
        ax.plot(curve.x, curve.y, line, marker=marker, markersize=4, color=colour, label=curve.label, linewidth=1.4)
        if curve.error is not None:
            around = [2 * (error or 0) for error in curve.error]
            low, high = ([v + sign * e for v, e in zip(curve.y, around, strict=True)] for sign in (-1, 1))
            ax.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
        for place, value, name in zip(curve.x, curve.y, curve.names or (), strict=curve.names is not None):
            ax.annotate(name, (place, value), xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour)
    if mark is not None:
        ax.axvline(mark[0], color=_IDEAL, linestyle="--", linewidth=1, zorder=0)
        ax.annotate(
            mark[1], (mark[0], 1), xycoords=("data", "axes fraction"), fontsize=8, ha="right", va="top", rotation=90
        )
    if scale == "log":
        ax.set_xscale("log")
    elif scale == "tokens":
        ax.set_xscale("log", base=2)
        places = sorted({int(place) for curve in curves for place in curve.x})
        ax.set_xticks(places, [name_length(place) for place in places])
        ax.set_xticks([], minor=True)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    if len(curves) > 1:
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def name_length(tokens: int) -> str:
    """Return 512, 2K, 32K, 1M for lengths in tokens; what is no whole number of K in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def draw_by_position(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw perplexity against position, with two standard errors, from rows with from, to, loss, standard_error."""
    rows = [row for row in rows if row["from"] >= 1]
    places = [math.sqrt(row["from"] * row["to"]) for row in rows]
    low, high = ([math.exp(min(row["loss"] + sign * row["standard_error"], 700.0)) for row in rows] for sign in (-2, 2))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.fill_between(places, low, high, color=_IDEAL, linewidth=0)
    ax.plot(places, [math.exp(min(row["loss"], 700.0)) for row in rows], "o-", color=_DILATED, markersize=3)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("position")
    ax.set_ylabel("perplexity")
    ax.grid(alpha=0.3)
    ax.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
