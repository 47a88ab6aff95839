"""Which kernel computes what: by the kind of tensors, and by what the plan knows of a tile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longnet.attention.backends.cuda import INT32_MAX, CuDNN, Efficient, FlashCUDA
from longnet.attention.backends.sdpa import FlashCPU, Grads, Kernel, Math
from longnet.attention.backends.triton import launch
from longnet.attention.merge import merge_
from longnet.attention.plan import Tile

Backend = Literal["auto", "reference", "sdpa", "triton"]
KERNELS: tuple[Kernel, ...] = (FlashCPU(), CuDNN(), FlashCUDA(), Efficient(), Math())  # the fastest first
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """What computes the tiles of one call.

    Attributes:
        general: takes any tile.
        repeated: takes tiles whose shapes come again at every step, and that have rows enough; it may cost much when
            a shape is new. The same as `general` where there is nothing faster.
    """

    general: Kernel
    repeated: Kernel

    def of(self, tile: Tile) -> Kernel:
        """Return the kernel for a tile."""
        return self.repeated if tile.is_whole and min(tile.q_rows, tile.k_rows) > 1 else self.general


class Planned:
    """A kernel that builds a plan for each shape, with another one for the shapes that it cannot have.

    A shape that it refused is never offered again: cuDNN's null plan would be followed. Nor are views that share heads
    by a stride of 0, or whose offsets need more than the 32 bits that cuDNN's plans are looked up by.
    """

    def __init__(self, first: Kernel, second: Kernel) -> None:
        self.name = f"{first.name}, {second.name}"
        self.groups_heads = first.groups_heads and second.groups_heads
        self._first, self._second = first, second
        self._refused: set[tuple[Any, ...]] = set()

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return self._second.refusal(device, dtype, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._try("attend", (q, k, v), (q, k, v), is_causal=is_causal, scale=scale)
        return result

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        tensors = (dout, q, k, v, out, lse)
        grads: Grads = self._try("attend_backward", tensors, (q, k, v), is_causal=is_causal, scale=scale)
        return grads

    def _try(
        self, way: str, tensors: tuple[Tensor, ...], keyed: tuple[Tensor, ...], *, is_causal: bool, scale: float
    ) -> Any:
        shapes = tuple((tuple(x.shape), x.stride()) for x in keyed)
        key = way, is_causal, keyed[0].device, keyed[0].dtype, shapes
        if key not in self._refused and all(_can_plan(x) for x in tensors[:5]):
            try:
                return getattr(self._first, way)(*tensors, is_causal=is_causal, scale=scale)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # no refusals: the plan is there, or nothing is
                raise
            except RuntimeError as error:
                self._refused.add(key)
                _log.warning(
                    "%s refused %s of %s; %s takes it: %s", self._first.name, way, shapes, self._second.name, error
                )
        return getattr(self._second, way)(*tensors, is_causal=is_causal, scale=scale)


def _can_plan(x: Tensor) -> bool:
    extents = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return sum(extents) <= INT32_MAX and all(extent or size == 1 for extent, size in zip(extents, x.shape, strict=True))


def is_fused(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Say whether a backend computes a call as one, without tiles.

    Raises:
        ValueError: it does, and cannot run on such tensors; the message says why.
    """
    if backend != launch.NAME:
        return False
    reason = launch.refusal(device, dtype, head_dim)
    if reason is not None:
        raise ValueError(
            f'backend="triton" cannot run on {dtype} tensors on {device}: it {reason}. Take "auto" (models: "dilated")'
        )
    return True


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Return the kernels of a tiled backend for tensors of a kind.

    `"auto"` says at DEBUG, once, what it took and why not the others. It never takes `"reference"`, whose cost is
    quadratic.

    Raises:
        ValueError: an unknown backend, or one that cannot run on such tensors; the message says why.
    """
    return _choose(backend, device, dtype, head_dim, _switches())


def _switches() -> tuple[bool, ...]:
    """Return the switches of PyTorch that a choice depends on and that a program may turn at any time."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
    )


@functools.lru_cache(maxsize=256)  # the answer takes 30 µs to find, and is asked for at every call
def _choose(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, _switched: tuple[bool, ...]
) -> Kernels:
    if backend == launch.NAME:
        raise ValueError(f'backend="{backend}" computes dilated_attention as one, and nothing else yet: take "auto"')
    if backend not in ("auto", "sdpa"):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    refused = refusals(device, dtype, head_dim)
    able = [kernel for kernel in KERNELS if kernel.name not in refused]
    reasons = [f"{name} {reason}" for name, reason in refused.items()]
    if not able:
        raise ValueError(
            f"backend={backend!r} cannot run on {dtype} tensors on {device}: {'; '.join(reasons)}. "
            "Cast to float32 or bfloat16"
        )
    first, *others = able
    said = "; ".join(reasons) or "first choice"
    if isinstance(first, CuDNN):
        general = others[0]
        _log.debug(
            "%s on %s, head dim %d: kernel %s for whole segments, %s for all else (%s)",
            dtype, device, head_dim, first.name, general.name, said,
        )  # fmt: skip
        return Kernels(general, Planned(first, general))
    _log.debug("%s on %s, head dim %d: kernel %s (%s)", dtype, device, head_dim, first.name, said)
    return Kernels(first, first)


def merge_on(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Return what folds a tile into an output of a dtype: one launch of Triton's on CUDA, in float32, or `merge_`.

    The launch has to prove itself, once a process and device: it is compiled there, and compared with `merge_`.
    """
    return merge_ if dtype == torch.float64 else _float32_merge_on(device)


@functools.lru_cache(maxsize=64)
def _float32_merge_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    doing, otherwise = "merging in one launch", "plain PyTorch merges"
    return launch.merge_ if proves_itself(device, _disagreement, doing=doing, otherwise=otherwise) else merge_


def proves_itself(
    device: torch.device,
    disagreement: Callable[[torch.device], float],
    *,
    doing: str,
    otherwise: str,
    tolerance: float = 1e-5,
) -> bool:
    """Say whether a launch of Triton's runs on a device, and agrees there with what it stands for.

    It warns where not, and tells at DEBUG where it does.

    Args:
        device: only on CUDA there is such a launch.
        disagreement: compiles and runs it there, and returns by how much numbers of order 1 differ.
        doing: what the launch does, for the warning.
        otherwise: what is done in its place.
        tolerance: of the disagreement.
    """
    if device.type != "cuda" or not launch.is_installed():
        return False
    try:
        error = disagreement(device)
    except launch.failures() as raised:  # no compiler, or one that fails
        reason = f"could not run: {raised}"
    else:
        if error <= tolerance:
            _log.debug("%s on %s: agrees to %.1e with what it stands for", doing, device, error)
            return True
        reason = f"was off by {error:.1e}"
    _log.warning("%s %s; %s on %s", doing, reason, otherwise, device)
    return False


def _disagreement(device: torch.device) -> float:
    """Return how far one launch is from `merge_` on numbers of order 1, strided, and with a row that is new."""
    generator = torch.Generator().manual_seed(0)
    out, part = torch.randn(2, 2, 37, 3, 64, generator=generator).to(device).transpose(2, 3)
    lse, part_lse = torch.randn(2, 2, 3, 37, generator=generator).to(device)
    lse[:, :, 5] = -torch.inf
    results = []
    for merge in (launch.merge_, merge_):
        merged = out.clone(), lse.clone()
        merge(*merged, part.to(torch.bfloat16), part_lse)
        results.append(merged)
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def refusals(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Say of each kernel that cannot run on such tensors why."""
    reasons = {kernel.name: kernel.refusal(device, dtype, head_dim) for kernel in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}
