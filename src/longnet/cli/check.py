"""Checks that several commands make of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """Return the device called "cpu" or "cuda", or with "auto" CUDA where there is one; raise ValueError for others."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but this machine has no CUDA device: leave --device away")
    return device


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for the first option, named as its keyword, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
