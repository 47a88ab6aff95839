"""How the fused kernels are cut: what a program owns, and how much of it is computed at a time.

benchmarks/results/triton_kernels.jsonl says what that compiles to, and h100.jsonl what was measured on an H100.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

MIN_PROGRAMS = 1024  # some for each of the 132 multiprocessors of an H100
_HOPPER = 90  # whose 227 KB of shared memory hold what spills elsewhere, or does not fit


class Blocks(NamedTuple):
    """How a kernel is cut: rows of queries and of keys at a time, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> int:
    """Return a GPU's compute capability as two digits, 90 for an H100; 0 for what is no CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def combine_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return how `combine` is cut: 16 numbers of a result a thread, 8 in float32 or of short rows, or it spills."""
    numbers = 1024 if dtype == torch.float32 else 2048
    return Blocks(max(4, min(64, numbers // padded(head_dim))), 0, 4, 1)


def padded(head_dim: int) -> int:
    """Return the power of two that head_dim channels are computed as."""
    return int(2 ** math.ceil(math.log2(head_dim)))


def forward_blocks(dtype: torch.dtype, head_dim: int, architecture: int, *, has_halo: bool = False) -> Blocks:
    """Return how the forward kernel is cut."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2)
    if head_dim <= 64:
        return Blocks(64, 64, 4, 3)
    if head_dim <= 128:
        return Blocks(64, 64, 8, 2) if has_halo else Blocks(128, 64, 8, 3 if architecture == _HOPPER else 2)
    return Blocks(64, 32, 8, 1)


def query_blocks(dtype: torch.dtype, head_dim: int, architecture: int, *, has_halo: bool = False) -> Blocks:
    """Return how the kernel of dq is cut."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1)
    if architecture == _HOPPER and 64 < head_dim <= 128 and not has_halo:
        return Blocks(128, 64, 8, 3)
    if head_dim <= 64:
        return Blocks(64, 32 if has_halo else 64, 4, 2)
    return Blocks(64, 32, 8, 2) if head_dim <= 128 else Blocks(32, 32, 8, 1)


def key_blocks(dtype: torch.dtype, head_dim: int, architecture: int) -> Blocks:
    """Return how the kernel of dk and dv is cut."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1) if head_dim <= 64 else Blocks(32, 32, 8, 1)
    if architecture == _HOPPER and 64 < head_dim <= 128:
        return Blocks(64, 128, 8, 1)
    if head_dim <= 32:
        return Blocks(32, 64, 4, 2)
    if head_dim <= 64:
        return Blocks(32, 64, 8, 2)
    return Blocks(32, 64, 8, 1) if head_dim <= 128 else Blocks(32, 32, 8, 1)


def decode_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return how the kernel of one token is cut; rows are the query heads of a key/value head, more where need be."""
    return Blocks(16, 32 if dtype == torch.float32 or head_dim > 128 else 64, 4, 2)


def block_length(most: int, rows: int, all_rows: int) -> int:
    """Return how many positions a program owns: enough to fill a block of rows of the widest branch, if there are."""
    length = max(4 * rows, 64)
    while length < rows * most and all_rows // (2 * length) >= MIN_PROGRAMS:
        length *= 2
    return length
