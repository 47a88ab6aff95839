"""The `longnet` command. A mistake of the user's is one line on stderr and exit status 2."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

if TYPE_CHECKING:
    from longnet.attention.pattern import DilationPattern

app = cyclopts.App(name="longnet", help="LongNet: dilated attention for very long sequences (arXiv:2307.02486).")
bench = cyclopts.App(name="bench", help="Measure, each figure behind a check that the result is right.")
app.command(bench)


@app.command
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

    _at_least_one(tokens=tokens, heads=heads, head_dim=head_dim)
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


@bench.command(name="attention")
def bench_attention(
    *,
    quick: bool = False,
    device: str = "auto",
    repeats: int | None = None,
    output: Annotated[Path, cyclopts.Parameter(("--output", "-o"))] = Path("benchmarks/results"),
) -> None:
    """Time dilated attention against dense SDPA and against its own bare kernel calls (the paper's Figure 5).

    Parameters
    ----------
    quick
        Fewer and shorter lengths: about a minute on two cores, where the whole takes some fifteen.
    device
        "cpu", "cuda", or "auto" for CUDA where there is one.
    repeats
        Counted rounds of each case; figures are their medians.
    output
        Folder for attention.jsonl (rows are appended) and runtime.png.
    """
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.bench import attention, record
    from longnet.plots import draw_runtime

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {device!r}")
    output.mkdir(parents=True, exist_ok=True)  # a wrong folder shows before the measurements, not after
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but this machine has no CUDA device: leave --device away")
    settings = attention.QUICK if quick else attention.Settings()
    if repeats is not None:
        _at_least_one(repeats=repeats)
        settings = dataclasses.replace(settings, repeats=repeats)
    console = Console()
    rows = []
    try:
        for row in attention.run(settings, place):
            rows.append(row)
            figures = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
            console.print(f"{row['case']} {row['tokens']:,} tokens: {figures}", highlight=False)
    except attention.GateError as error:
        sys.exit(f"longnet: {error}")
    table = Table(
        "tokens", "dense", "dilated", "faster", "/ bare", "dense f+b", "dilated f+b", "faster", "/ bare",
        title="causal, the paper's pattern; milliseconds (f+b: forward and backward)", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for row in rows:
        if row["case"] == "compare":
            cells = []
            for key in ("forward", "both"):
                cells += [f"{1e3 * row[f'{key}_dense_s']:.1f}", f"{1e3 * row[f'{key}_dilated_s']:.1f}"]
                cells += [f"{row[f'{key}_speedup']:.2f}×", f"{row[f'{key}_over_bare']:.2f}×"]
            table.add_row(f"{row['tokens']:,}", *cells)
    console.print(table)
    record.append(rows, output / "attention.jsonl", place)
    about = record.provenance(place)
    draw_runtime(rows, output / "runtime.png", f"{about['device']}, torch {about['torch']}, {about['date'][:10]}")
    console.print(f"rows in {output / 'attention.jsonl'}, picture in {output / 'runtime.png'}")


def main() -> None:
    """Run the command line; the entry point of `longnet`."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except (cyclopts.CycloptsError, ValueError, OSError) as error:
        print(f"longnet: {error}", file=sys.stderr)
        sys.exit(2)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def _hops(pattern: DilationPattern, tokens: int) -> str:
    try:
        hops = pattern.hops(tokens=tokens)
    except ValueError as error:
        return f"layers until every token can have heard of every other: unknown ({error})"
    if hops == math.inf:
        return "some tokens never hear of each other, however deep the model"
    return f"without causality, and with a head per phase, all tokens can have heard of each other after {hops} layers"
