"""`longnet bench …`: measurements, each behind a check that the result is right."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated

import cyclopts

from longnet.cli.check import at_least_one, refuse_unused

app = cyclopts.App(name="bench", help="Measure, each figure behind a check that the result is right.")

_RANK = 2**27  # bytes that a process of Python with torch holds, at the very least


@app.command(name="attention")
def bench_attention(
    *,
    quick: bool = False,
    device: str = "auto",
    repeats: int | None = None,
    model: str | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Time dilated attention against dense SDPA and against its own bare kernel calls (the paper's Figure 5).

    Args:
        quick: Fewer and shorter lengths: about a minute on two cores, where the whole takes some fifteen.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        repeats: Counted rounds at the longest length, up to ten times as many at shorter ones; figures are
            their medians.
        model: "h100" or "a100": measure nothing, print what each path should cost there by FLOPs, bytes and
            launches.
        output: Folder for attention.jsonl (rows are appended) and runtime.svg, runtime-gpu.svg of a GPU;
            benchmarks/results, and runs/bench with --quick.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.bench import attention, record
    from longnet.measurement import take_device
    from longnet.plots.charts import draw_runtime

    if model is not None:
        device_given = None if device == "auto" else device
        refuse_unused(
            "is of measurements, and --model makes none: give one of them",
            quick=quick, device=device_given, repeats=repeats, output=output,
        )  # fmt: skip
        _print_model(model)
        return
    place = take_device(device, option="--device")
    groups: tuple[attention.Settings, ...] = (attention.Settings(),)
    if quick or place.type == "cuda":
        groups = (attention.QUICK,) if quick else attention.GPU
    if repeats is not None:
        at_least_one(repeats=repeats)
        groups = tuple(dataclasses.replace(settings, repeats=repeats) for settings in groups)
    output = _folder(output, quick=quick)  # a wrong folder shows before the measurements, not after
    console = Console()
    rows = []
    try:
        for row in itertools.chain.from_iterable(attention.run(settings, place) for settings in groups):
            rows.append(row)
            record.append([row], output / "attention.jsonl", place)  # as it comes: what follows may be cut off
            figures = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
            console.print(f"{row['case']} {row['tokens']:,} tokens: {figures}", highlight=False)
    except attention.GateError as error:
        sys.exit(f"longnet: {error}")
    table = Table(
        "pattern", "tokens", "D", "backend",
        "dense", "dilated", "faster", "/ bare", "dense f+b", "dilated f+b", "faster", "/ bare",
        title="causal; milliseconds (f+b: forward and backward)", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for row in rows:
        if row["case"] in ("compare", "dense_queries"):
            cells = []
            for key in ("forward", "both"):
                cells += [f"{1e3 * row[f'{key}_dense_s']:.1f}", f"{1e3 * row[f'{key}_dilated_s']:.1f}"]
                cells += [f"{row[f'{key}_speedup']:.2f}×", f"{row[f'{key}_over_bare']:.2f}×"]
            table.add_row(row["pattern"], f"{row['tokens']:,}", str(row["head_dim"]), row["backend"], *cells)
    console.print(table)
    picture = output / ("runtime.svg" if place.type == "cpu" else "runtime-gpu.svg")
    draw_runtime(rows, picture)
    console.print(f"rows in {output / 'attention.jsonl'}, picture in {picture}")


def _print_model(name: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.attention.pattern import DilationPattern
    from longnet.bench import cost_model, cost_model_calls

    if name not in cost_model.DEVICES:
        raise ValueError(f"--model must be one of {', '.join(cost_model.DEVICES)}, got {name!r}")
    table = Table(
        "tokens", "D", "way", "path", "TFLOP", "GB", "launches", "ms", "dense ms", "FLOPs less", "faster", "of ideal",
        title=f"model of {name}, not measured: the paper's pattern, causal, bfloat16, 2,048 channels", box=box.SIMPLE,
    )  # fmt: skip
    device, pattern, ranks = cost_model.DEVICES[name], DilationPattern.paper(), 8
    rows = [
        row
        for head_dim in (64, 128)
        for tokens in (2**13, 2**15, 2**17, 2**20)
        for row in cost_model.costs(device, tokens, pattern, num_heads=2048 // head_dim, head_dim=head_dim)
    ]
    for tokens in (2**15, 2**17):
        rows += (
            {**row, "way": f"{row['way']}, 1 of {ranks} ranks"}
            for row in cost_model_calls.slice_costs(device, tokens, ranks, pattern, num_heads=16)
        )
    for tokens in (2**15, 2**20, 2**30):
        rows += cost_model_calls.token_costs(device, tokens, pattern, num_heads=16)
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}", str(row["head_dim"]), row["way"], row["path"], f"{1e-12 * row['flops']:.3g}",
            f"{1e-9 * row['bytes']:.3g}", str(row["launches"]), f"{1e3 * row['model_s']:.3g}",
            f"{1e3 * row['dense_model_s']:.3g}", f"{row['flop_ratio']:,.2f}×", f"{row['model_speedup']:,.2f}×",
            f"{row['of_ideal']:.0%}",
        )  # fmt: skip
    Console(width=160).print(table)


@app.command(name="decode")
def bench_decode(
    *,
    quick: bool = False,
    sizes: bool = False,
    device: str = "auto",
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Time one token after the other at lengths up to a billion, with the DilatedCache and with the dense cache.

    Args:
        quick: Fewer lengths and a smaller model: about a minute on two cores.
        sizes: Only count the bytes of both caches for known shapes; measure nothing, write nothing.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        output: Folder for decode.jsonl, to which rows are appended; benchmarks/results, and runs/bench with
            --quick.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.bench import decode, record
    from longnet.bench.attention import GateError
    from longnet.measurement import take_device

    if sizes:
        refuse_unused("is of measurements, and --sizes makes none: give one of them", quick=quick, output=output)
    place = take_device(device, option="--device")
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
    output = _folder(output, quick=quick)
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


@app.command(name="distributed")
def bench_distributed(
    *,
    quick: bool = False,
    ranks: int | None = None,
    repeats: int | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Time a training step of one sequence across processes against that of one process; count bytes and memory.

    Args:
        quick: Shorter slices: about a minute on two cores, where the whole takes some five.
        ranks: Processes, of one thread each; as many cores must be free. 2 unless given.
        repeats: Counted rounds of each case; figures are their medians.
        output: Folder for distributed.jsonl, to which rows are appended; benchmarks/results, and runs/bench
            with --quick.
    """
    import torch
    from rich.console import Console

    from longnet.bench import distributed, record
    from longnet.bench.attention import GateError
    from longnet.measurement import refuse_beyond_memory

    settings = distributed.QUICK if quick else distributed.Settings()
    for name, number in (("ranks", ranks), ("repeats", repeats)):
        if number is not None:
            at_least_one(**{name: number})
            settings = dataclasses.replace(settings, **{name: number})
    refuse_beyond_memory(settings.ranks * _RANK, f"--ranks {settings.ranks:,}", "as many as cores are free")
    output = _folder(output, quick=quick)
    console = Console(highlight=False)
    try:
        rows = list(distributed.run(settings))
    except GateError as error:
        sys.exit(f"longnet: {error}")
    (scaling,), (traffic,) = ([row for row in rows if row["case"] == case] for case in ("scaling", "traffic"))
    console.print(
        f"{settings.tokens_per_rank:,} tokens a rank, {scaling['pattern']}: one process {scaling['alone_s']:.2f} s, "
        f"{settings.ranks} each for itself {scaling['side_by_side_s']:.2f} s, {settings.ranks} with one sequence "
        f"{scaling['together_s']:.2f} s"
    )
    console.print(
        f"weak scaling 1 → {settings.ranks}: {scaling['efficiency']:.1%}; against processes side by side "
        f"{scaling['efficiency_side_by_side']:.1%}; the busiest rank computes {scaling['flops_over_alone']:.3f} × the "
        "FLOPs of one process"
    )
    received, back = (", ".join(map(_size, traffic[f"{way}_bytes"])) for way in ("forward", "backward"))
    console.print(f"received by each rank, as the closed form says: forward {received}; backward {back}")
    for row in rows:
        if row["case"] == "memory":
            peaks, steps = (", ".join(map(_size, row[name])) for name in ("peak_bytes", "step_bytes"))
            console.print(f"peak memory of each of {row['ranks']}: {peaks}, of which the step {steps}")
    record.append(rows, output / "distributed.jsonl", torch.device("cpu"))
    console.print(f"rows in {output / 'distributed.jsonl'}")


@app.command(name="kernels")
def bench_kernels(
    *,
    quick: bool = False,
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Compile the fused kernels for sm_80, sm_90a and sm_100a, which needs no GPU: registers, spills, shared memory.

    Args:
        quick: Compile one head dim in bfloat16 for sm_90a alone.
        output: Folder for triton_kernels.jsonl, which is written anew; benchmarks/results, or runs/bench if quick.
    """
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longnet.attention.backends.triton import launch
    from longnet.bench import kernels, record

    if not launch.is_installed():
        raise ValueError("compiling the fused kernels needs Triton: pip install 'longnet-torch[triton]'")
    file = _folder(output, quick=quick) / "triton_kernels.jsonl"
    names = ("kernel", "architecture", "dtype", "head_dim", "registers", "spilled_bytes", "shared_bytes")
    table = Table(*names, "rows × keys", title="compiled, not run", box=box.SIMPLE)
    rows = [kernels.compile_one(*case) for case in (kernels.QUICK if quick else kernels.cases())]
    for row in rows:
        table.add_row(*(str(row[name]) for name in names), f"{row['rows']} × {row['keys']}")
    Console().print(table)
    file.unlink(missing_ok=True)
    record.append(rows, file, torch.device("cpu"))


def _folder(output: Path | None, *, quick: bool) -> Path:
    """Make the folder of the results: the repository's own only for measurements that are whole."""
    folder = output or (Path("runs/bench") if quick else Path("benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:,.1f} {unit}"


@app.command(name="slides")
def bench_slides(
    *,
    tiles: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    dense_tiles: int | None = None,
    device: str = "auto",
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Encode slides with random weights of GigaPath's size: seconds, peak memory, and dense attention beside it.

    Args:
        tiles: Of a slide; 2500 10000 50000 if not given.
        dense_tiles: Measure dense attention up to so many tiles; 10000 if not given.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        output: Folder for slides.jsonl, to which rows are appended; benchmarks/results if not given.
    """
    from longnet.bench import record, slides
    from longnet.measurement import take_device

    place = take_device(device, option="--device")
    output = _folder(output, quick=False)
    at_least_one(tiles=min(tiles, default=1))
    try:
        for row in slides.run(
            tiles or slides.TILES, place, dense_tiles=slides.DENSE_TILES if dense_tiles is None else dense_tiles
        ):
            record.append([row], output / "slides.jsonl", place)
            print(", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in row.items()), flush=True)  # fmt: skip
    except slides.GateError as error:
        sys.exit(f"longnet: {error}")
    print(f"rows in {output / 'slides.jsonl'}")
