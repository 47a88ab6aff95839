"""Charts whose colours a page may set."""

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
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from longnet.plots.names import name_count, name_length

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
