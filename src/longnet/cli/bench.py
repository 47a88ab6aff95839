"""`longnet bench …`: measurements, each behind a check that the result is right."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import cyclopts

from longnet.cli.check import at_least_one

app = cyclopts.App(name="bench", help="Measure, each figure behind a check that the result is right.")


@app.command(name="attention")
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
        Counted rounds at the longest length, up to ten times as many at shorter ones; figures are their medians.
    output
        Folder for attention.jsonl (rows are appended) and runtime.png.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.bench import attention, record
    from longnet.measurement import find_device, provenance
    from longnet.plots import draw_runtime

    place = find_device(device, option="--device")
    output.mkdir(parents=True, exist_ok=True)  # a wrong folder shows before the measurements, not after
    settings = attention.QUICK if quick else attention.Settings()
    if repeats is not None:
        at_least_one(repeats=repeats)
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
    about = provenance(place)
    draw_runtime(rows, output / "runtime.png", f"{about['device']}, torch {about['torch']}, {about['date'][:10]}")
    console.print(f"rows in {output / 'attention.jsonl'}, picture in {output / 'runtime.png'}")


@app.command(name="decode")
def bench_decode(
    *,
    quick: bool = False,
    sizes: bool = False,
    device: str = "auto",
    output: Annotated[Path, cyclopts.Parameter(("--output", "-o"))] = Path("benchmarks/results"),
) -> None:
    """Time one token after the other at lengths up to a billion, with the DilatedCache and with the dense cache.

    Parameters
    ----------
    quick
        Fewer lengths and a smaller model: about a minute on two cores.
    sizes
        Only count the bytes of both caches for known shapes; measure nothing, write nothing.
    device
        "cpu", "cuda", or "auto" for CUDA where there is one.
    output
        Folder for decode.jsonl; rows are appended.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.bench import decode, record
    from longnet.bench.attention import GateError
    from longnet.measurement import find_device

    place = find_device(device, option="--device")
    console = Console()
    table = Table(
        "shape", "tokens", "dense cache", "DilatedCache", "times less", title="bytes, bfloat16", box=box.SIMPLE
    )
    for row in decode.cache_bytes():
        figures = (f"{row['tokens']:,}", _size(row["dense_bytes"]), _size(row["dilated_bytes"]))
        table.add_row(row["shape"], *figures, f"{row['times_less']:,.1f}")
    console.print(table)
    if sizes:
        return
    output.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(decode.run(decode.QUICK if quick else decode.Settings(), place))
    except GateError as error:
        sys.exit(f"longnet: {error}")
    table = Table("cache", "tokens before", "tokens/s", "time / shortest", "bytes", title="decoding", box=box.SIMPLE)
    for row in rows:
        speed = (f"{row['tokens_per_second']:,.1f}", f"{row['over_shortest']:.2f}×")
        table.add_row(row["cache"], f"{row['context']:,}", *speed, _size(row["cache_bytes"]))
    console.print(table)
    record.append(rows, output / "decode.jsonl", place)
    console.print(f"rows in {output / 'decode.jsonl'}")


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:,.1f} {unit}"
