"""`longnet show`: what a pattern costs, reaches and keeps."""

from __future__ import annotations

import html
import importlib.resources
import math
import tempfile
import urllib.parse
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from longnet.cli.check import at_least_one

if TYPE_CHECKING:
    from longnet.attention.pattern import DilationPattern


def show(
    pattern: str,
    *,
    tokens: Annotated[int, cyclopts.Parameter(("--tokens", "-n"))],
    heads: int = 4,
    head_dim: int = 64,
    causal: bool = True,
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
    open_browser: Annotated[bool, cyclopts.Parameter("--open", negative=())] = False,
) -> None:
    """Print what a pattern costs, reaches and keeps; draw which keys each query sees.

    Args:
        pattern: Branches as segment:rate pairs, like 2048:1,4096:2,8192:4 (";block" at the end for block head
            offsets), or "paper".
        tokens: Length of the sequence.
        heads: Key/value heads.
        head_dim: Channels of a head.
        causal: Whether keys after a query are hidden.
        output: Where to draw the picture; its suffix is the format (.png, .svg, .pdf; .html for the page in
            which the pattern can be changed).
        open_browser: Open that page in a browser.
    """
    from rich.console import Console
    from rich.table import Table

    from longnet.attention.pattern import DilationPattern

    at_least_one(tokens=tokens, heads=heads, head_dim=head_dim)
    dilation = DilationPattern.paper() if pattern == "paper" else DilationPattern.parse(pattern)
    drawn = _draw(dilation, output, open_browser=open_browser, tokens=tokens, heads=heads, causal=causal)
    flops = dilation.flops(tokens=tokens, num_heads=heads, head_dim=head_dim, is_causal=causal)
    dense = 4 * head_dim * heads * (tokens * (tokens + 1) // 2 if causal else tokens**2)
    rows = dilation.state_rows(tokens=tokens)
    branches = Table(
        "segment", "rate", "rows kept", "segments", "positions some head keeps", title=f"{tokens:,} tokens"
    )
    for (length, rate), share in zip(
        dilation.branches, dilation.coverage(tokens=tokens, num_kv_heads=heads), strict=True
    ):
        branches.add_row(
            f"{length:,}", f"{rate:,}", f"{-(-length // rate):,}", f"{-(-tokens // length):,}", f"{share:.1%}"
        )
    if dilation.global_tokens:
        share = min(1, dilation.global_tokens / tokens)
        branches.add_row("without end", "1", f"{dilation.global_tokens:,}", "1", f"{share:.1%}")
    console = Console()
    console.print(branches)
    console.print(f"cost   {flops:.3e} FLOPs forward, dense {dense:.3e}: {dense / flops:.2f}× less")
    console.print(
        f"reach  segments up to {min(max(dilation.segment_lengths), tokens):,} tokens; {_hops(dilation, tokens)}"
    )
    console.print(
        f"state  {rows:,} rows per key/value head when streaming, dense {tokens:,}: {tokens / rows:.1f}× less"
    )
    for line in drawn:
        console.print(line)


def _draw(
    pattern: DilationPattern, output: Path | None, *, open_browser: bool, tokens: int, heads: int, causal: bool
) -> list[str]:
    """Write the page or the picture that is asked for, and return what to say of it."""
    if open_browser or (output is not None and output.suffix == ".html"):
        page = output or Path(tempfile.mkdtemp(prefix="longnet-")) / "pattern.html"
        if page.suffix != ".html":
            raise ValueError(f"--open shows a page, got --output {page}: give a file that ends in .html, or none")
        page.write_text(explorer_page(pattern, tokens=tokens, heads=heads, causal=causal), encoding="utf-8")
        is_open = open_browser and webbrowser.open(page.resolve().as_uri())
        lacking = ["no browser was found: open the page yourself"] if open_browser and not is_open else []
        return [f"page   {page}", *lacking]
    if output is None:
        return []
    from longnet.plots.patterns import draw_pattern

    draw_pattern(pattern, output, tokens=tokens, num_heads=heads, is_causal=causal)
    return [f"drawn  {output}"]


def explorer_page(pattern: DilationPattern, *, tokens: int, heads: int, causal: bool) -> str:
    """Return the pattern explorer, one page that needs nothing else, as it shows a pattern."""
    page = (importlib.resources.files("longnet") / "explorer" / "pattern.html").read_text(encoding="utf-8")
    start = urllib.parse.urlencode({"p": str(pattern), "n": tokens, "h": heads, "c": int(causal), "q": tokens * 5 // 8})
    return page.replace('data-start=""', f'data-start="{html.escape(start)}"', 1)


def _hops(pattern: DilationPattern, tokens: int) -> str:
    try:
        hops = pattern.hops(tokens=tokens)
    except ValueError as error:
        return f"layers until every token can have heard of every other: unknown ({error})"
    if hops == math.inf:
        return "some tokens never hear of each other, however deep the model"
    return f"without causality, and with a head per phase, all tokens can have heard of each other after {hops} layers"
