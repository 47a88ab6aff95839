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
    about = record.provenance(place)
    draw_runtime(rows, output / "runtime.png", f"{about['device']}, torch {about['torch']}, {about['date'][:10]}")
    console.print(f"rows in {output / 'attention.jsonl'}, picture in {output / 'runtime.png'}")
