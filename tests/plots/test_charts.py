import itertools
import re

import pytest

from longnet.plots.charts import _COLOURS, Curve, css_variables, draw_curves, draw_runtime, inline_svg


def test_a_chart_says_what_its_lines_are_beside_them_and_leaves_colours_to_the_page(tmp_path):
    path = tmp_path / "chart.svg"
    curves = [
        Curve(name, [512, 2048], [3.0, 2.5], None, kind)
        for name, kind in (("LongNet", "dilated"), ("Dense", "sdpa"), ("Sparse", "sparse_fixed"))
    ]
    draw_curves(curves, path, x="context (tokens)", y="loss (nats)", mark=(2048, "training length"), zero="nothing")
    svg = path.read_text()
    texts = {text: float(y) for y, text in re.findall(r'<text [^>]*?y="([-\d.]+)"[^>]*>([^<]+)</text>', svg)}
    heights = sorted(texts[name] for name in ("LongNet", "Dense", "Sparse"))
    assert all(below - above > 12 for above, below in itertools.pairwise(heights))  # though the lines end in a point
    assert {"context (tokens)", "loss (nats)", "training length", "nothing", "512", "2K"} <= set(
        re.findall(r">([^<>]+)</text>", svg)
    )
    style = re.search(r"<style>.*?</style>", svg)[0]
    assert set(re.findall(r"(?<!, )#[0-9a-f]{6}", svg.replace(style, ""))) == set()  # none but as a variable's value
    assert css_variables("light") in style.partition("@media")[0]  # as <img>, beyond the reach of a page's variables
    assert css_variables("dark") in style.partition("@media (prefers-color-scheme: dark)")[2]
    assert "<style>" not in inline_svg(path, "a <chart>")
    assert 'aria-label="a &lt;chart&gt;"' in inline_svg(path, "a <chart>")
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)) >= 11
    again = tmp_path / "again" / "chart.svg"
    again.parent.mkdir()
    draw_curves(curves, again, x="context (tokens)", y="loss (nats)", mark=(2048, "training length"), zero="nothing")
    assert again.read_text() == svg


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_stands_out_from_the_paper(scheme):
    """Three to one, which the accessibility guidelines (WCAG 2.1) ask of graphics; grid lines are to be faint."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        shares = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), shares, strict=True))

    colours = dict(re.findall(r"--([\w-]+): (#\w+);", css_variables(scheme)))
    paper = luminance(colours.pop("paper"))
    del colours["line"]
    assert set(colours) == {name.replace("_", "-") for name in _COLOURS} - {"line"}
    for name, colour in colours.items():
        low, high = sorted((paper, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 3, name


def test_places_within_a_decade_have_few_marks(tmp_path):
    flops = [1.9548e13, 2.4058e13, 4.2097e13]
    curve = Curve("Transformer", flops, [54.0, 86.0, 117.0], kind="sdpa", names=["256", "1K", "4K"])
    draw_curves([curve], tmp_path / "flops.svg", x="FLOPs", y="perplexity", scale="log")
    svg = (tmp_path / "flops.svg").read_text()
    marks = [(float(x), text) for x, text in re.findall(r'<text [^>]*? x="([-\d.]+)"[^>]*>([^<]*e13)</text>', svg)]
    assert len(marks) >= 2
    assert all(right - left > 8 * len(text) for (left, text), (right, _) in itertools.pairwise(marks))


def test_run_times_are_lines_of_both_attentions_and_of_the_flops(tmp_path):
    columns = [f"{key}_{which}_s" for key in ("forward", "both") for which in ("dense", "dilated")]
    rows = [
        {"case": "compare", "flop_ratio": 2.0, "tokens": tokens, **dict.fromkeys(columns, tokens / 1e3)}
        for tokens in (8192, 2048, 4096)
    ]
    draw_runtime([*rows, {"case": "tile", "tokens": 64}], tmp_path / "runtime.svg")
    svg = (tmp_path / "runtime.svg").read_text()
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"dense, both passes", "dilated, both passes", "dense, forward", "dilated, forward", "8K", "1k"} <= set(
        texts
    )
    assert texts.count("dense ÷ FLOP ratio") == 2
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)) >= 11


def test_colours_differ_in_lightness():
    lightness = [
        sum(weight * int(colour[i : i + 2], 16) ** 2.2 for weight, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))
        for colour in (_COLOURS[kind] for kind in ("dilated", "sdpa", "sparse_fixed"))
    ]
    for darker, lighter in itertools.pairwise(lightness):
        assert lighter > 1.3 * darker


@pytest.mark.parametrize("scale", ["tokens", "log", "linear"])
def test_curves_are_drawn(tmp_path, scale):
    path = tmp_path / "curves.svg"
    curves = [
        Curve("one", [512, 2048], [3.0, 2.5], [0.1, None], "sdpa"),
        Curve("two", [512, 2048, 8192], [3.0, 2.5, 2.4], None, "other", ["a", "b", "c"]),
    ]
    draw_curves(curves, path, x="tokens", y="loss", scale=scale, mark=(2048, "training length"))
    assert path.stat().st_size > 5000


def test_labels_too_long_to_stand_beside_curves_stand_below(tmp_path):
    """Beside them a pattern of four branches left the curves no room at all."""
    path, grid = tmp_path / "curves.svg", {}
    for label in ("Window", "LongNet 1024:1,8192:8,65536:64,8388608:8192, 64K"):
        draw_curves([Curve(label, [1, 2], [1, 2]), Curve("b", [1, 2], [2, 1])], path, x="x", y="y", scale="linear")
        text = path.read_text()
        height = int(re.search(r'viewBox="0 0 358 (\d+)"', text)[1])
        lines = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" clip-path', text)
        grid[label] = height, max(float(right) - float(left) for left, _, right, _ in lines)
        assert all(word in text for word in label.split())
    (short, beside), (long, below) = grid.values()
    assert short == 270 < long
    assert below > beside > 200


def test_curves_of_a_kind_are_told_apart_by_their_lines(tmp_path):
    path = tmp_path / "curves.svg"
    kinds = ["dilated", "other", "dilated", "other", "dilated"]
    draw_curves([Curve("", [1, 2], [1, 2], kind=kind) for kind in kinds], path, x="x", y="y", scale="linear")
    lines = re.findall(
        r"fill: none; (stroke-dasharray: [^;]*; )?(?:[^\"]*; )?stroke: var\(--(dilated|other)", path.read_text()
    )
    assert len(set(lines)) == 5
