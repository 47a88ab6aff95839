"""Attention of one tile on CUDA: the operators behind PyTorch's scaled_dot_product_attention, called past its checks.

So the checks that matter are here, and what those operators leave unsaid. Each fact is from the sources of PyTorch
2.13 (`aten/src/ATen/native/cudnn/MHA.cpp`, `native/transformers/cuda`): no shape on meta tensors shows one of them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from longnet.attention.backends.sdpa import Grads

INT32_MAX = 2**31 - 1
_aten = torch.ops.aten


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
        if torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < self.capability:
                return f"needs compute capability {self.capability}, got {capability}"
            reason = self._refusal_of(capability, dtype, head_dim)
            if reason is not None:
                return reason
        if not self.is_enabled():
            return "is switched off in torch.backends.cuda"
        return None

    def _refusal_of(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        return None


class CuDNN(_CUDA):
    """cuDNN's fused attention, the fastest on Hopper and data-centre Blackwell.

    It builds an execution plan, tens of milliseconds and more, for each new shape and stride, and keeps all of them.
    A plan that could not be built is kept, too, as a null that the next call follows. A backward plan is looked up by
    the strides of q, k and v alone, of which those of out and dout therefore have to follow.
    """

    name = "cuDNN"
    groups_heads = True
    capability = (9, 0)
    head_dims = 128

    def is_enabled(self) -> bool:
        return bool(torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type == "cuda" and torch.version.hip is not None:
            return "is not part of ROCm"
        return super().refusal(device, dtype, head_dim)

    def _refusal_of(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        # The conditions under which scaled_dot_product_attention itself prefers cuDNN.
        if capability not in ((9, 0), (10, 0), (10, 3)):
            return f"is preferred on compute capability 9.0, 10.0 and 10.3 only, got {capability}"
        version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if version is None or version <= 91500:
            return f"is trusted after version 9.15.0 (91500), got {version}"
        if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
            return "is deprioritized by TORCH_CUDNN_SDPA_DEPRIORITIZED"
        if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
            return "expects another layout of the log-sum-exp under TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            return "is not deterministic, as torch.use_deterministic_algorithms wants it"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.reshape(q.shape[:3])

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        dout, out = (_laid_out_like(x, q) for x in (dout, out))
        unused = q.new_empty((), dtype=torch.int64)
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused,
            None, None, None, q.shape[2], k.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class FlashCUDA(_CUDA):
    """FlashAttention-2 as PyTorch ships it. Its strides have 64 bits."""

    name = "flash (CUDA)"
    groups_heads = True

    def is_enabled(self) -> bool:
        return torch.backends.cuda.is_flash_attention_available() and bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]

    def _refusal_of(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        if 192 < head_dim <= 224 and ((8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)):
            return f"has no backward for head dims of 200 to 224 on compute capability {capability}, got {head_dim}"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return out, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        unused = q.new_empty((), dtype=torch.uint64)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, is_causal, unused, unused, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class Efficient(_CUDA):
    """The memory-efficient kernel: float32 too, and older GPUs.

    Its offsets of heads and rows within a batch entry have 32 bits, and its backward takes rows of `out` to be
    heads · D apart, whatever their stride.
    """

    name = "memory-efficient (CUDA)"
    groups_heads = False
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    capability = (5, 0)
    head_dims = 2**16

    def is_enabled(self) -> bool:
        return bool(torch.backends.cuda.mem_efficient_sdp_enabled())  # type: ignore[no-untyped-call]

    def _refusal_of(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        if dtype == torch.bfloat16 and capability < (8, 0):
            return f"has bfloat16 from compute capability (8, 0) on, got {capability}"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if not all(_fits_int32(x) for x in (q, k, v)):
            parts = [
                self._attend(*(_fitting(x[:, head : head + 1]) for x in (q, k, v)), is_causal=is_causal, scale=scale)
                for head in range(q.shape[1])
            ]
            return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)
        return self._attend(q, k, v, is_causal=is_causal, scale=scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
        return out, lse[..., : q.shape[2]]  # its rows are padded to a multiple of 32, but for ROCm's

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        tensors = (dout, q, k, v, out, lse)
        if not all(_fits_int32(x) for x in tensors[:4]):
            parts = []
            for head in range(q.shape[1]):
                of_head = (_fitting(x[:, head : head + 1]) for x in tensors)
                parts.append(self._attend_backward(*of_head, is_causal=is_causal, scale=scale))
            dq, dk, dv = (torch.cat(grads, 1) for grads in zip(*parts, strict=True))
            return dq, dk, dv
        return self._attend_backward(*tensors, is_causal=is_causal, scale=scale)

    def _attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        if torch.version.hip is None:
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        unused = q.new_empty((), dtype=torch.int64)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, lse.contiguous(), unused, unused, 0.0, (True, True, True, False), is_causal,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


def _laid_out_like(x: Tensor, q: Tensor) -> Tensor:
    """Return x in the strides that PyTorch gives to an output for q, copied if need be."""
    result = torch.empty_like(q)
    return x if x.stride() == result.stride() else result.copy_(x)


def _fits_int32(x: Tensor) -> bool:
    extents = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return sum(extents[1:3]) <= INT32_MAX


def _fitting(x: Tensor) -> Tensor:
    return x if _fits_int32(x) else x.contiguous()
