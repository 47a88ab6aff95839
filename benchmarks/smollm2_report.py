"""What smollm2.py, smollm2_masks.py and smollm2_ruler.py have measured so far, as rows and a page in results/smollm2:

python benchmarks/smollm2_report.py runs/smollm2
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from smollm2 import CONTEXTS, HEAD_DIM, HEADS, LENGTHS, PATTERNS, rows_of

from longnet import DilationPattern
from longnet.evaluation.perplexity import mean_difference

RESULTS = Path(__file__).parent / "results" / "smollm2"
Row = dict[str, Any]


def share_of_dense(pattern: str | None, tokens: int) -> float:
    """Return attention's FLOPs over those of dense causal attention."""
    dense = DilationPattern((tokens,), (1,))
    kept = dense if pattern is None else DilationPattern.parse(pattern)
    asked = {"tokens": tokens, "num_heads": HEADS, "head_dim": HEAD_DIM, "is_causal": True}
    return kept.flops(**asked) / dense.flops(**asked)


def table(head: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    rows = [f"| {' | '.join(map(str, line))} |" for line in ([*head], *lines)]
    return "\n".join([rows[0], "|" + "---|" * len([*head]), *rows[1:]]) + "\n"


def named(system: str, healed: int) -> str:
    """Return what the page calls a system."""
    return f"{system}, healed on {healed:,} tokens" if healed else f"{system}, as converted"


def loss_table(rows: list[Row], kind: str, title: str) -> str:
    """Return each system's losses, and their distance from dense attention healed on as many tokens, files paired."""
    losses: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        losses.setdefault((row["system"], row["healed"]), {})[row["file"]] = row[kind]
    lines = []
    for (system, healed), files in losses.items():
        cells = []
        for column in rows[0][kind]:
            cells.append(f"{mean(each[column] for each in files.values()):.3f}")
            pairs = [(files[name], other) for name, other in losses.get(("dense", healed), {}).items() if name in files]
            if pairs and system != "dense":
                change = mean_difference(np.array([own[column] - other[column] for own, other in pairs]))
                error = np.nan if change.standard_error is None else change.standard_error
                cells[-1] += f" ({change.mean:+.3f} ± {error:.3f})"
        lines.append([named(system, healed), len(files), *cells])
    return table([title, "files", *rows[0][kind]], lines)


def headline(rows: list[Row]) -> list[str]:
    """Return what the losses say of each system that has been healed: what is left, and whether far tokens help."""
    losses: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        losses.setdefault((row["system"], row["healed"]), {})[row["file"]] = row
    said = []
    for (system, healed), files in losses.items():
        if system == "dense" or not healed or ("dense", healed) not in losses:
            continue
        last = list(next(iter(files.values()))["by_position"])[-1]
        before, after = (
            mean(
                losses[system, tokens][name]["by_position"][last] - losses["dense", tokens][name]["by_position"][last]
                for name in files
            )
            for tokens in (0, healed)
        )
        context = {each: mean(row["by_context"][each] for row in files.values()) for each in (*map(str, CONTEXTS),)}
        best = min(context, key=lambda each: context[each])
        said.append(
            f"- `{system}` at positions {last}: {before:+.3f} nats from dense attention as converted, {after:+.3f} "
            f"when both have healed on {healed:,} tokens. Of its contexts {best} is best: {context[best]:.3f}, "
            f"{context[str(CONTEXTS[-1])]:.3f} with {CONTEXTS[-1]}."
        )
    return [*said, ""]


def healing_table(steps: dict[str, list[Row]]) -> str:
    """Return the training loss, and its distance from dense attention's on the same tokens, five steps a line."""
    lines = []
    taken = [*zip(*steps.values(), strict=False)]
    for first in range(0, len(taken), 5):
        five = taken[first : first + 5]
        losses = [mean(step["loss"] for step in system) for system in zip(*five, strict=True)]
        lines.append([f"{five[-1][0]['tokens']:,}", *(f"{loss:.3f} ({loss - losses[0]:+.3f})" for loss in losses)])
    return table(["tokens seen", *steps], lines)


def ruler_table(rows: list[Row]) -> str:
    """Return the mean score, its standard error and the questions of each task, length and system."""
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["length"]), {})[named(row["system"], row["healed"])] = row["scores"]
    columns = list(dict.fromkeys(name for cells in scores.values() for name in cells))
    lines = []
    for (task, length), cells in scores.items():
        told = []
        for name in columns:
            found = mean_difference(np.array(cells[name])) if name in cells else None
            told.append(
                f"{found.mean:.2f} ± {found.standard_error:.2f} ({len(cells[name])})" if found is not None else "–"
            )
        lines.append([task, length, *told])
    return table(["task", "tokens", *columns], lines)


def masks_table(rows: list[Row]) -> str:
    """Return each mask's distance from dense attention and from the window, files paired, and what it costs."""
    losses: dict[str, dict[str, float]] = {}
    for row in rows:
        losses.setdefault(row["system"], {})[row["file"]] = row["loss"]
    shares = {row["system"]: row["flops"] for row in rows}
    lines = []
    for system, files in losses.items():
        cells = []
        for base in ("dense", "window"):
            pairs = [(files[name], other) for name, other in losses[base].items() if name in files]
            change = mean_difference(np.array([own - other for own, other in pairs]))
            cells.append("–" if system == base else f"{change.mean:+.3f} ± {change.standard_error:.3f}")
        lines.append([system, f"{shares[system]:.3f}", len(files), *cells])
    return table(["system", "attention FLOPs", "files", "from dense", "from the window"], lines)


def page(steps: dict[str, list[Row]], rows: dict[str, list[Row]]) -> str:
    """Return the report."""
    parts = ["# SmolLM2-135M-Instruct, dilated and healed\n", *headline(rows["loss"])]
    parts.append(table(
        ["system", "pattern", *(f"attention FLOPs at {tokens:,}" for tokens in CONTEXTS)],
        [[name, f"`{pattern}`" if pattern else "sdpa", *(f"{share_of_dense(pattern, n):.3f}" for n in CONTEXTS)]
         for name, pattern in PATTERNS.items()],
    ))  # fmt: skip
    if rows["loss"]:
        parts.append("## Loss on held-out files\n\nNats a token, and the distance ± its standard error over files from "
                     "dense attention healed on as many tokens. By context: the same last tokens of each file's first "
                     "8,192, with so many tokens, theirs counted. By position: all tokens of the 8,192.\n")  # fmt: skip
        parts += [
            loss_table(rows["loss"], "by_context", "context"),
            loss_table(rows["loss"], "by_position", "position"),
        ]
    lengths = ", ".join(map(str, LENGTHS))
    parts.append("## Healing\n\nTraining loss, the mean of five steps, and its distance from dense attention's on the "
                 f"same tokens. Steps are sequences of {lengths} tokens, over and over.\n")  # fmt: skip
    parts.append(healing_table(steps))
    if rows["decode"]:
        parts += ["## Token by token up to 8,192\n", table(
            ["system", "cache, MiB", "decoding: speed over dense", "reading: speed over dense"],
            [[row["system"], f"{row['cache_bytes'] / 2**20:.1f}", f"{row['speed_over_dense']:.2f}",
              f"{row['prefill_speed_over_dense']:.2f}"] for row in rows["decode"]],
        )]  # fmt: skip
    if rows["masks"]:
        parts += ["## What does the harm\n\nNats a token at positions 2,048 to 4,095 of held-out files, as converted, "
                  "patterns of half the length, under dense masks (smollm2_masks.py). First token: the text's first "
                  "key is seen by all queries in all heads. Last 512: a window that slides. Far: `4096:8;all`.\n",
                  masks_table(rows["masks"])]  # fmt: skip
    if rows["ruler"]:
        parts += ["## RULER\n\nMean score ± its standard error (questions, the first of the same).\n",
                  ruler_table(rows["ruler"])]  # fmt: skip
    return "\n".join(parts)


def report(work: Path) -> None:
    """Write the rows, the steps of healing and the page."""
    if not (work / "base").is_dir():
        sys.exit(f"{work} is no folder that smollm2.py filled: give that folder")
    RESULTS.mkdir(parents=True, exist_ok=True)
    files = {name: work / f"heal-{name}.pt" for name in PATTERNS}
    steps = {
        name: torch.load(file, weights_only=True, map_location="cpu")["steps"]
        for name, file in files.items()
        if file.exists()
    }
    rows = {name: rows_of(work / f"{name}.jsonl") for name in ("loss", "decode", "masks", "ruler")}
    (RESULTS / "heal.json").write_text(json.dumps(steps, indent=1) + "\n")
    for name, kept in ((name, kept) for name, kept in rows.items() if kept):
        (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (RESULTS / "report.md").write_text(page(steps, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that smollm2.py filled")
    report(parser.parse_args().work)
