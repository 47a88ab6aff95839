"""What a measurement is worth: where it ran, how long it took, how much memory, and ratios that hold."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
import resource
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_MEMORY = Path("/proc/meminfo")


def take_device(name: str, *, option: str = "train.device") -> torch.device:
    """Return the device called "cpu" or "cuda", or with "auto" a GPU where there is one, to compute on from here.

    On a CPU, whatever this process computes from here on takes numbers below 1.2e-38 for 0. Attention that has learned
    where to look makes many, e^-90 and the like, and each takes a processor some hundred cycles: a trained model then
    learns at a third of its speed. Threads that torch has begun before go on as they were: call this first.

    Args:
        name: one of the three.
        option: where the user named it, for the error.

    Raises:
        ValueError: another name, or "cuda" on a machine without a GPU that torch can use.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{option} must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{option} = 'cuda', but torch finds no GPU on this machine: choose auto (a CPU, then), or install a CUDA "
            "build of torch where there is a GPU"
        )
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu" and torch.set_flush_denormal(True):
        warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # numpy 1's, which sees it
    return device


def refuse_beyond_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise ValueError where what is asked for cannot fit the device's memory, swap included, whatever else is there.

    Args:
        needed: bytes, of what is certainly held at one time.
        what: needs them.
        remedy: what to give instead.
        device: that holds them; the CPU when None.
    """
    if device is not None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        swap = re.search(r"SwapTotal:\s*(\d+) kB", _MEMORY.read_text()) if _MEMORY.exists() else None
        there += 1024 * int(swap[1]) if swap else 0
    if needed > there:
        raise ValueError(
            f"{what} needs at least {needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f}: give {remedy}"
        )


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions, commit and time that every figure carries."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def interleaved(cases: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of each case in each of `repeats` rounds; a round runs every case once.

    Shared machines drift; within a round the cases meet the same machine, so the median of their ratios holds. Each
    round begins with another case, so that none always finds the caches that one and the same left behind. A first
    round is not counted.
    """
    rounds: list[list[float]] = [[] for _ in cases]
    for first in range(1 + repeats):
        for turn in range(len(cases)):
            index = (first + turn) % len(cases)
            rounds[index].append(seconds(cases[index], device))
    return [times[1:] for times in rounds]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio of two cases."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def peak_bytes(device: torch.device, *, reset: bool = False) -> int:
    """Return the most memory that this process has held: on a GPU, or in main memory where it computes there.

    Args:
        device: where it computes.
        reset: begin anew, from what is held now.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:  # Linux: getrusage would count what the parent process once held
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])


def seconds(case: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    case()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _commit() -> str:
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"longnet-torch {importlib.metadata.version('longnet-torch')}"
    return commit.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 'some'} cores"
