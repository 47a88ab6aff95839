"""Which kernel computes a call."""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch

from longnet.attention.backends import sdpa

Backend = Literal["auto", "reference", "sdpa"]
_log = logging.getLogger(__name__)


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> sdpa.Kernel:
    """Return the kernel of a tiled backend for tensors of a kind.

    `"auto"` says at DEBUG, once, what it took and why not the others. It never takes `"reference"`, whose cost is
    quadratic.

    Raises:
        ValueError: an unknown backend, or one that cannot run on such tensors; the message says why.
    """
    if backend not in ("auto", "sdpa"):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    refused = sdpa.refusals(device, dtype, head_dim)
    for kernel in sdpa.KERNELS:
        if kernel.name not in refused:
            _log_choice(kernel.name, device, dtype, head_dim, tuple(refused.items()))
            return kernel
    reasons = "; ".join(f"{name} {reason}" for name, reason in refused.items())
    raise ValueError(
        f"backend={backend!r} cannot run on {dtype} tensors on {device}: {reasons}. Cast to float32 or bfloat16"
    )


@functools.lru_cache(maxsize=256)  # once for each kind of tensor
def _log_choice(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, refused: tuple[tuple[str, str], ...]
) -> None:
    reasons = "; ".join(f"{other} {reason}" for other, reason in refused) or "first choice"
    _log.debug("%s on %s, head dim %d: kernel %s (%s)", dtype, device, head_dim, name, reasons)
