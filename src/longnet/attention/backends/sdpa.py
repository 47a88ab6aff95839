"""Attention of one tile through the operators behind PyTorch's scaled_dot_product_attention.

Those that return a log-sum-exp and whose backward accepts one from outside: called with the *merged* output and
log-sum-exp, a tile's backward gives its share of the exact gradient of the one softmax. Every kernel here takes
q (batch, heads, M, D) and k, v (batch, heads, N, D) with any strides but a last one of 1, M ≥ 1, N ≥ 1, and answers in
natural logarithms: lse (batch, heads, M), float32, or float64 for float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1
_aten = torch.ops.aten
_Grads = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """One operator pair. `is_causal` has q and k of the same rows; `out` and `lse` of the backward are merged ones."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Say why this kernel cannot run on such tensors, or None when it can."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        """Return (dq, dk, dv)."""


class FlashCPU:
    """ATen's flash attention for the CPU."""

    name = "flash (CPU)"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
        return dq, dk, dv


class _CUDA:
    """What the CUDA kernels share: the dtypes of the tensor cores, and the refusals common to them."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    capability = (8, 0)
    head_dims = 256

    def is_enabled(self) -> bool:
        raise NotImplementedError

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA, not on {device.type}"
        if dtype not in self.dtypes:
            return f"has no {dtype}"
        if head_dim > self.head_dims or head_dim % 8:
            return f"needs a head dim that is a multiple of 8 up to {self.head_dims}, got {head_dim}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < self.capability:
            return f"needs compute capability {self.capability}, got {torch.cuda.get_device_capability(device)}"
        if not self.is_enabled():
            return "is switched off in torch.backends.cuda"
        return None


class CuDNN(_CUDA):
    """cuDNN's fused attention, the fastest on Hopper and later."""

    name = "cuDNN"
    capability = (9, 0)
    head_dims = 128

    def is_enabled(self) -> bool:
        return bool(torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if k.shape[2] == 1:  # which cuDNN refuses
            return FlashCUDA().attend(q, k, v, is_causal=is_causal, scale=scale)
        q, k, v = (_int32_addressable(x) for x in (q, k, v))
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.reshape(q.shape[:3])

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        if k.shape[2] == 1:
            return FlashCUDA().attend_backward(dout, q, k, v, out, lse, is_causal=is_causal, scale=scale)
        dout, q, k, v, out = (_int32_addressable(x) for x in (dout, q, k, v, out))
        unused = q.new_empty((), dtype=torch.int64)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused,
            None, None, None, q.shape[2], k.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class FlashCUDA(_CUDA):
    """FlashAttention-2 as PyTorch ships it."""

    name = "flash (CUDA)"

    def is_enabled(self) -> bool:
        return torch.backends.cuda.is_flash_attention_available() and bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_int32_addressable(x) for x in (q, k, v))
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return out, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        dout, q, k, v, out = (_int32_addressable(x) for x in (dout, q, k, v, out))
        unused = q.new_empty((), dtype=torch.uint64)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, is_causal, unused, unused, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class Efficient(_CUDA):
    """The memory-efficient kernel: float32 too, and older GPUs."""

    name = "memory-efficient (CUDA)"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    capability = (5, 0)
    head_dims = 2**16

    def is_enabled(self) -> bool:
        return bool(torch.backends.cuda.mem_efficient_sdp_enabled())  # type: ignore[no-untyped-call]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_int32_addressable(x) for x in (q, k, v))
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
        return out, lse[..., : q.shape[2]]  # its rows are padded to a multiple of 32

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        dout, q, k, v, out = (_int32_addressable(x) for x in (dout, q, k, v, out))
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
        unused = q.new_empty((), dtype=torch.int64)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, lse, unused, unused, 0.0, (True, True, True, False), is_causal, scale=scale
        )
        return dq, dk, dv


class Math:
    """Plain PyTorch, any device and float dtype, all M·N scores of a call at once. The last resort; float64 on CUDA."""

    name = "math"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if dtype.is_floating_point and dtype.itemsize >= 2 else f"has no {dtype}"

    def _scores(self, q: Tensor, k: Tensor, *, is_causal: bool, scale: float) -> Tensor:
        scores = (q * scale) @ k.mT
        if is_causal:
            rows = torch.arange(q.shape[2], device=q.device)
            scores = scores.masked_fill(rows[:, None] < rows, -torch.inf)
        return scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_at_least_float32(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, is_causal=is_causal, scale=scale)
            lse = torch.logsumexp(scores, -1)
            return torch.exp(scores - lse.unsqueeze(-1)) @ v, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> _Grads:
        dout, q, k, v, out = (_at_least_float32(x) for x in (dout, q, k, v, out))
        with torch.autocast(q.device.type, enabled=False):
            p = torch.exp(self._scores(q, k, is_causal=is_causal, scale=scale) - lse.unsqueeze(-1))
            ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
            return ds @ k, ds.mT @ q, p.mT @ dout


KERNELS: tuple[Kernel, ...] = (FlashCPU(), CuDNN(), FlashCUDA(), Efficient(), Math())  # the fastest first


def refusals(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Say of each kernel that cannot run on such tensors why."""
    reasons = {kernel.name: kernel.refusal(device, dtype, head_dim) for kernel in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _int32_addressable(x: Tensor) -> Tensor:
    """Return x, copied where its last element lies 2³¹ or more from its first: CUDA kernels index with 32 bits."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if span <= _INT32_MAX else x.contiguous()
