"""What a measurement is worth: where it ran, how long it took, and the file that keeps it."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import longnet


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions, commit and time that every row carries."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append(rows: Sequence[Mapping[str, Any]], path: Path, device: torch.device) -> None:
    """Append rows, each with its provenance, to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = provenance(device)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**about, **row}) + "\n")


def interleaved(cases: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of each case in each of `repeats` rounds; a round runs every case once.

    Shared machines drift; within a round the cases meet the same machine, so the median of their ratios holds. A first
    round is not counted.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(1 + repeats):
        for case, times in zip(cases, seconds, strict=True):
            times.append(_seconds(case, device))
    return [times[1:] for times in seconds]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio of two cases."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _seconds(case: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    case()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _commit() -> str:
    source = Path(longnet.__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=source, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"longnet-torch {importlib.metadata.version('longnet-torch')}"
    return commit.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 'some'} cores"
