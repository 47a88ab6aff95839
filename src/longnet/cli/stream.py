"""`longnet stream`: one sequence of any length, read from files in constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from longnet.cli.check import at_least_one, check_folder


def stream(
    model: Path,
    files: Annotated[list[str], cyclopts.Parameter(negative=())],
    *,
    tokenizer: str | None = None,
    text_field: str = "text",
    suffixes: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    exclude: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    skip_damaged: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    fasta_case: Literal["keep", "upper", "lower"] = "keep",
    fasta_n: Literal["keep", "drop"] = "keep",
    chunk: int = 65_536,
    tokens: Annotated[int | None, cyclopts.Parameter(("--tokens", "-n"))] = None,
    output: Annotated[Path, cyclopts.Parameter(("--output", "-o"))] = Path("runs/stream"),
    save_every: int = 2**26,
    resume: bool = False,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: Literal["auto", "triton"] = "auto",
) -> None:
    """Read files as ONE sequence, exactly and in constant memory; write loss and perplexity by position.

    Writes stream.json and stream.svg into the output folder, and from time to time the state, from which --resume goes
    on after an interruption.

    Args:
        model: Folder of a run of `longnet train`, or of any Hugging Face causal language model whose config
            holds a dilation pattern.
        files: Files, folders, globs, as `longnet prepare` takes them, and the same tokens: a token ends each
            document.
        tokenizer: As of `longnet prepare`; the model's own if not given.
        text_field: Field of records that holds the text; a.b is field b of field a.
        suffixes: What to take from folders, instead of text and source code.
        exclude: Files and folders to leave out.
        skip_damaged: Leave out and count records and ends of files that are damaged.
        fasta_case: Letters of FASTA files: as they are, or all upper, or all lower case.
        fasta_n: N in FASTA files: kept, or dropped.
        chunk: Tokens of one forward pass. Changes memory and speed, not the result.
        tokens: Stop after so many.
        output: Folder for results and state.
        save_every: Tokens between two saves of the state.
        resume: Go on from the state in the output folder, if there is one.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        dtype: Of weights and state.
        backend: Of dilated attention: "triton" is one fused kernel, on CUDA (docs/gpu.md).
    """
    import gc
    import json

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from longnet.cli.model import load_model
    from longnet.data.corpus import describe
    from longnet.data.documents import Reading
    from longnet.evaluation import stream as reading
    from longnet.measurement import provenance, take_device
    from longnet.model.patterns import dilated_by, pattern_of
    from longnet.plots.charts import draw_by_position

    check_folder(output)
    at_least_one(chunk=chunk, save_every=save_every, **({} if tokens is None else {"tokens": tokens}))
    _hold_memory()
    place = take_device(device, option="--device")
    loaded, folder, _, trained = load_model(model, place, dilated_by(backend), getattr(torch, dtype))
    source = reading.open_source(
        files, tokenizer, folder, loaded.config.vocab_size, suffixes=suffixes, exclude=exclude,
        reading=Reading(text_field, skip_damaged=skip_damaged, fasta_case=fasta_case, fasta_n=fasta_n),
    )  # fmt: skip
    gc.freeze()  # what is imported stays: without, each collection walks all of it, on one core
    columns = (
        "{task.fields[read]:,} tokens",
        "{task.fields[speed]:,.0f}/s",
        "perplexity {task.fields[perplexity]:.3f}",
    )
    console = Console(markup=False)
    sums = reading.Sums()
    with Progress(
        BarColumn(),
        *map(TextColumn, columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=tokens or source.corpus.size, read=0, speed=0.0, perplexity=float("nan"))
        for sums in reading.stream(
            loaded, source, output, chunk=chunk, tokens=tokens, save_every=save_every, resume=resume
        ):
            rows = sums.by_position()
            progress.update(
                task, completed=sums.tokens if tokens else source.position, read=sums.tokens,
                speed=sums.tokens / sums.seconds, perplexity=rows[-1]["perplexity"],
            )  # fmt: skip
    if not sums.tokens:
        console.print(f"nothing left to read: {output / 'stream.json'} is of the whole", markup=False)
        return
    pattern = pattern_of(loaded.config)
    about = {
        **provenance(place),
        "model": {
            "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
            "layers": loaded.config.num_hidden_layers,
            "hidden_size": loaded.config.hidden_size,
            "pattern": str(pattern),
            "dtype": dtype,
        },
        "files": len(source.corpus.files),
        "bytes_of_files": source.corpus.size,
        "left_out": dict(sorted(source.skipped.items())),
        "is_bytes": source.encoder.tokenizer is None,
        "chunk": chunk,
        "tokens": sums.tokens,
        "loss": sums.loss,
        "seconds": sums.seconds,
        "tokens_per_second": sums.tokens / sums.seconds,
        "cpu_seconds": sums.cpu_seconds,
        "peak_bytes": sums.peak_bytes,
        "peak_bytes_at_16m_tokens": sums.peak_bytes_early,
        "state_rows": pattern.state_rows(tokens=max(*pattern.segment_lengths, pattern.global_tokens)),
        "by_position": sums.by_position(),
    }
    (output / "stream.json").write_text(json.dumps(about, indent=1) + "\n")
    mark = None if trained is None or trained > sums.tokens else (trained, "training length")
    if len(about["by_position"]) > 1:  # the first position has no place on the axis
        draw_by_position(about["by_position"], output / "stream.svg", mark=mark)
    growth = "" if sums.peak_bytes_early is None else f", {sums.peak_bytes / sums.peak_bytes_early:.3f} × that at 16M"
    console.print(
        f"loss {sums.loss:.4f} nats per token; {sums.tokens / sums.seconds:,.0f} tokens/s, "
        f"{sums.tokens / sums.cpu_seconds:,.0f} per CPU second; "
        f"peak memory {sums.peak_bytes / 2**20:,.0f} MiB{growth}; in {output}{describe(source.skipped)}",
        highlight=False,
        markup=False,
    )


def _hold_memory() -> None:
    """Have the C library keep freed memory: every chunk asks for the same again, and new pages are zeroed first.

    Measured: 7 % more tokens a second at chunks of 65,536.
    """
    import ctypes
    import ctypes.util

    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is not None:  # glibc
        trim_threshold, mmap_threshold, most = -1, -3, 2**30
        mallopt(trim_threshold, most)
        mallopt(mmap_threshold, most)
