"""`longnet show`: what a pattern costs, reaches and keeps."""

from __future__ import annotations

import math
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
) -> None:
    """Print what a pattern costs, reaches and keeps; draw which keys each query sees.

    Parameters
    ----------
    pattern
        Branches as segment:rate pairs, like 2048:1,4096:2,8192:4 (";block" at the end for block head offsets),
        or "paper".
    tokens
        Length of the sequence.
    heads
        Key/value heads.
    head_dim
        Channels of a head.
    causal
        Whether keys after a query are hidden.
    output
        Where to draw the picture; its suffix is the format (.png, .svg, .pdf).
    """
    from rich.console import Console
    from rich.table import Table

    from longnet.attention.pattern import DilationPattern

    at_least_one(tokens=tokens, heads=heads, head_dim=head_dim)
    dilation = DilationPattern.paper() if pattern == "paper" else DilationPattern.parse(pattern)
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
    console = Console()
    console.print(branches)
    console.print(f"cost   {flops:.3e} FLOPs forward, dense {dense:.3e}: {dense / flops:.2f}× less")
    console.print(
        f"reach  segments up to {min(max(dilation.segment_lengths), tokens):,} tokens; {_hops(dilation, tokens)}"
    )
    console.print(
        f"state  {rows:,} rows per key/value head when streaming, dense {tokens:,}: {tokens / rows:.1f}× less"
    )
    if output is not None:
        from longnet.plots import draw_pattern

        draw_pattern(dilation, output, tokens=tokens, num_heads=heads, is_causal=causal)
        console.print(f"drawn  {output}")


def _hops(pattern: DilationPattern, tokens: int) -> str:
    try:
        hops = pattern.hops(tokens=tokens)
    except ValueError as error:
        return f"layers until every token can have heard of every other: unknown ({error})"
    if hops == math.inf:
        return "some tokens never hear of each other, however deep the model"
    return f"without causality, and with a head per phase, all tokens can have heard of each other after {hops} layers"
