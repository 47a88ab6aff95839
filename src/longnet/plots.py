"""Pictures, drawn without a display: patterns, and charts whose colours a page may set."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from longnet.attention.pattern import DilationPattern

_CELLS = 256
_DRAWN_TOKENS = 2**22
_DPI = 100
_LETTERS = 15  # points in a pattern's picture: with three branches, 11 pixels where it is 358 wide
# A hue for each offset, so that heads that keep other rows look other; the first is that of rate 1.
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")

# What a colour says. In an SVG it is a CSS variable of that name, with this value where no page sets it; the kinds of
# attention differ in lightness, too, for eyes and printers that tell no hues.
_COLOURS = {
    "ink": "#1d2428",
    "faint": "#5d6a72",
    "line": "#d8dfe2",
    "dilated": "#0f4c75",
    "sdpa": "#c4631c",
    "sparse_fixed": "#8a9a2b",
    "window": "#b04a7a",
    "other": "#7a5ea8",
}
_DARK = {
    "ink": "#dfe6e9",
    "faint": "#9fadb4",
    "line": "#333d42",
    "dilated": "#5aa9e6",
    "sdpa": "#ffb37a",
    "sparse_fixed": "#e2ee9a",
    "window": "#f0a0c8",
    "other": "#b9a3e3",
}
_PAPER = {"light": "#fff", "dark": "#14191c"}
_FONT = 11.5  # points of an SVG, which are a page's pixels where it is shown at its own size
_WIDTH, _HEIGHT = 358, 270  # points: a phone's column; wider pages enlarge it
_BESIDE = 18  # letters of a label that finds room beside its curve


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


def draw_heat_map(
    coords: np.ndarray[Any, np.dtype[Any]], values: np.ndarray[Any, np.dtype[Any]], step: float, file: BinaryIO
) -> None:
    """Draw a value of each tile of a slide where it lies, as a PNG; the colours span percentiles 1 to 99.

    Args:
        coords: (N, 2), x and y of each tile's corner.
        values: (N,).
        step: how wide a tile is.
        file: to write to.
    """
    cells = np.floor((coords - coords.min(0)) / step).astype(int)
    grid = np.full(cells.max(0)[::-1] + 1, np.nan)
    for (x, y), value in zip(cells, values, strict=True):
        grid[y, x] = np.fmax(grid[y, x], value)
    height, width = grid.shape
    figure = Figure(figsize=(6 * max(0.3, min(1, width / height)) + 1, 6 * max(0.3, min(1, height / width))))
    ax = figure.subplots()
    low, high = np.percentile(values, (1, 99))
    image = ax.imshow(grid, cmap="inferno", vmin=low, vmax=high, interpolation="nearest")
    ax.axis("off")
    figure.colorbar(image, ax=ax, shrink=0.6, label="attention received")
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        label: written at its end; "" for none.
        x: places.
        y: values.
        error: standard errors, drawn as bars of two of them on either side; None for none.
        kind: what the colour says: "dilated", "sdpa", "sparse_fixed", or anything else.
        names: written beside each place; None for none.
        joined: whether a line joins the places.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] | None = None
    kind: str = "dilated"
    names: Sequence[str] | None = None
    joined: bool = True


def draw_curves(
    curves: Sequence[Curve],
    path: Path,
    *,
    x: str,
    y: str,
    scale: Literal["tokens", "log", "linear"] = "tokens",
    mark: tuple[float, str] | None = None,
    zero: str | None = None,
    log_y: bool = False,
) -> None:
    """Draw curves, each labelled at its end.

    Args:
        curves: what to draw; where a label is too long to stand beside its curve, all stand below.
        path: an .svg, with text as text and colours as CSS variables, which follow the reader's light or dark scheme
            or, where `inline_svg` puts it into a page, the page's.
        x: name of the horizontal axis, with its unit.
        y: name of the vertical axis, with its unit.
        scale: of the horizontal axis: "tokens" for a few lengths, named 512, 2K, …, on a logarithmic one. Places are
            marked but on a linear one, which has many.
        mark: a vertical line, and what it marks.
        zero: a horizontal line at 0, and what it means.
        log_y: a logarithmic vertical axis.
    """
    settings = {
        "font.size": _FONT, "svg.fonttype": "none", "svg.hashsalt": path.stem, "font.family": "sans-serif",
        "text.color": _COLOURS["ink"], "axes.edgecolor": _COLOURS["faint"], "axes.labelcolor": _COLOURS["ink"],
        "xtick.color": _COLOURS["faint"], "ytick.color": _COLOURS["faint"], "xtick.labelcolor": _COLOURS["ink"],
        "ytick.labelcolor": _COLOURS["ink"], "grid.color": _COLOURS["line"],
    }  # fmt: skip
    with rc_context(settings):  # type: ignore[arg-type]
        below = [textwrap.fill(curve.label, 46) for curve in curves if curve.label]
        if max(map(len, below), default=0) <= _BESIDE:
            below = []
        height = _HEIGHT + math.ceil(1.5 * _FONT * sum(1 + label.count("\n") for label in below))
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")
        ax = figure.subplots()
        kinds = [curve.kind for curve in curves]
        lines = [  # those of a kind are told apart by how they are drawn
            _draw_curve(ax, curve, index, kinds[:index].count(curve.kind), is_dense=scale == "linear")
            for index, curve in enumerate(curves)
        ]
        if scale == "log":
            ax.set_xscale("log")
            every = [place for curve in curves for place in curve.x]
            span = max(every) / min(every)
            ticks = LogLocator(subs=(1, 2, 5) if span < 100 else (1,), numticks=6)
            ax.xaxis.set_major_locator(ticks if span >= 10 else MaxNLocator(4))  # too few marks, or too close
            ax.xaxis.set_major_formatter(lambda value, _: name_count(value))
            ax.xaxis.set_minor_formatter(NullFormatter())
        elif scale == "tokens":
            ax.set_xscale("log", base=2)
            places = sorted({int(place) for curve in curves for place in curve.x})
            places = places[:: math.ceil(len(places) / 6)]
            ax.set_xticks(places, [name_length(place) for place in places])
            ax.set_xticks([], minor=True)
        else:
            ax.xaxis.set_major_formatter(lambda value, _: name_count(value))
            ax.locator_params(axis="x", nbins=5)
        if log_y:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: name_count(value))  # exponents would be too small to read
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.grid(linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if zero is not None:
            ax.axhline(0, color=_COLOURS["faint"], linewidth=1)
            ax.annotate(zero, (0, 0), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                        color=_COLOURS["faint"])  # fmt: skip
        if mark is not None:
            ax.axvline(mark[0], color=_COLOURS["faint"], linestyle=(0, (4, 3)), linewidth=1, zorder=0)
            ax.annotate(mark[1], (mark[0], 1), xycoords=("data", "axes fraction"), xytext=(-3, 0),
                        textcoords="offset points", ha="right", va="top", rotation=90,
                        color=_COLOURS["faint"])  # fmt: skip
        if any(curve.names for curve in curves):
            ax.margins(x=0.1)  # room for the last name, before the labels
        if below:
            labelled = [line for line, curve in zip(lines, curves, strict=True) if curve.label]
            figure.legend(labelled, below, loc="outside lower left", frameon=False, labelcolor="linecolor",
                          handlelength=2.5)  # fmt: skip
        else:
            _label_ends(ax, curves)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text(_with_variables(text.getvalue(), height), encoding="utf-8")


def _draw_curve(ax: Axes, curve: Curve, index: int, style: int, *, is_dense: bool) -> Line2D:
    colour = _COLOURS.get(curve.kind, _COLOURS["other"])
    line = (":" if curve.kind == "faint" else ("-", "--", ":", "-.")[style % 4]) if curve.joined else "none"
    marker = None if is_dense and curve.joined else ("o", "s", "^", "D")[style % 4]
    (drawn,) = ax.plot(curve.x, curve.y, linestyle=line, marker=marker, markersize=4.5, color=colour, linewidth=1.6)
    if curve.error is not None:
        bars = [2 * (error or 0) for error in curve.error]
        ax.errorbar(curve.x, curve.y, bars, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)
    beside: tuple[tuple[int, int], str] = (((4, 4), "left"), ((4, -13), "left"), ((-5, 4), "right"))[index % 3]
    for place, value, name in zip(curve.x, curve.y, curve.names or (), strict=curve.names is not None):
        # Curves that meet have their names on different sides of the place.
        ax.annotate(name, (place, value), xytext=beside[0], textcoords="offset points", ha=beside[1], color=colour)
    return drawn


def _label_ends(ax: Axes, curves: Sequence[Curve]) -> None:
    """Write each curve's label beside its end, pushed apart where ends lie close."""
    labelled = [curve for curve in curves if curve.label and len(curve.x)]
    if not labelled:
        return
    low, high = ax.get_ylim()
    scale = ax.transData
    height = (_FONT + 2) / 210  # of the axes
    ends = []
    for curve in labelled:
        place = ax.transAxes.inverted().transform(scale.transform((curve.x[-1], curve.y[-1])))
        ends.append(min(max(float(place[1]), 0.0), 1.0))
    ax.set_ylim(low, high)
    order = sorted(range(len(ends)), key=lambda index: ends[index])
    at = [ends[index] for index in order]
    for _ in range(200):
        for below, above in itertools.pairwise(range(len(at))):
            lacking = height - (at[above] - at[below])
            if lacking > 1e-6:
                at[below], at[above] = at[below] - lacking / 2, at[above] + lacking / 2
    for index, y in zip(order, at, strict=True):
        curve = labelled[index]
        colour = _COLOURS.get(curve.kind, _COLOURS["other"])
        ax.annotate(curve.label, (1, y), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
                    va="center", color=colour, annotation_clip=False)  # fmt: skip


def _with_variables(svg: str, height: int) -> str:
    """Replace colours by CSS variables, and leave out what a page that holds the picture does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name.replace('_', '-')}, {colour})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="(\w+)"', lambda found: found[0] if found[1] in used else "", svg)
    # Shown by itself, or as <img>, a picture has its own paper: no page's variables reach it there.
    own = (
        f"<style>svg {{ color-scheme: light dark; {css_variables('light')} background: var(--paper) }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {css_variables('dark')} }} }}</style>"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">{own}'
    return re.sub(r"<svg [^>]*>", head, svg)


def css_variables(scheme: Literal["light", "dark"]) -> str:
    """Return the colours of charts, and of the page below them, as CSS declarations."""
    colours = {"paper": _PAPER[scheme], **(_COLOURS if scheme == "light" else _DARK)}
    return " ".join(f"--{name.replace('_', '-')}: {colour};" for name, colour in colours.items())


def inline_svg(path: Path, title: str) -> str:
    """Return a chart as part of an HTML page, whose CSS variables give its colours.

    Args:
        path: an .svg that `draw_curves` wrote.
        title: what it shows, for those who do not see it.
    """
    svg = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def name_length(tokens: int) -> str:
    """Return 512, 2K, 32K, 1M for lengths in tokens; what is no whole number of K in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def name_count(number: float) -> str:
    """Return a count in short, in powers of ten: 1.5M, 200k, 12."""
    if abs(number) >= 1e12:
        return f"{number:.2g}".replace("e+", "e")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def draw_by_position(
    rows: Sequence[Mapping[str, float]], path: Path, *, kind: str = "dilated", mark: tuple[float, str] | None = None
) -> None:
    """Draw loss against position, with two standard errors, from rows with from, to, loss, standard_error.

    Args:
        rows: a bin of positions each.
        path: an .svg.
        kind: of the attention, which decides the colour.
        mark: a position, the training length for one, and what it is.
    """
    rows = [row for row in rows if row["from"] >= 1]
    places = [math.sqrt(row["from"] * row["to"]) for row in rows]
    curve = Curve("", places, [row["loss"] for row in rows], [row["standard_error"] for row in rows], kind)
    draw_curves([curve], path, x="position in the sequence (tokens)", y="loss (nats per token)", scale="log", mark=mark)


def draw_runtime(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw run time against tokens, dilated and dense, from rows of `longnet bench attention` (paper, Figure 5).

    Args:
        rows: of one run; those of its case "compare" are drawn that have the first one's heads, channels and backend.
        path: an .svg.
    """
    shape = ("heads", "head_dim", "backend")
    rows = [row for row in rows if row["case"] == "compare"]
    rows = sorted((r for r in rows if all(r.get(x) == rows[0].get(x) for x in shape)), key=lambda r: int(r["tokens"]))
    tokens = [row["tokens"] for row in rows]
    curves = []
    for key, passes in (("both", "both passes"), ("forward", "forward")):
        dense, dilated = ([1e3 * row[f"{key}_{which}_s"] for row in rows] for which in ("dense", "dilated"))
        ideal = [time / row["flop_ratio"] for time, row in zip(dense, rows, strict=True)]
        curves += [
            Curve(f"dense, {passes}", tokens, dense, kind="sdpa"),
            Curve(f"dilated, {passes}", tokens, dilated, kind="dilated"),
            Curve("dense ÷ FLOP ratio", tokens, ideal, kind="faint"),
        ]
    draw_curves(curves, path, x="sequence length (tokens)", y="time (milliseconds)", log_y=True)
