"""ATen's CUDA attention as its sources have it, in plain PyTorch on the CPU: layouts, paddings, faults and refusals.

What PyTorch 2.13 does with the strides that it is given is here; how it computes is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention.backends.sdpa import Math


def _expanded(q: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in kv)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = Math().attend(q, *_expanded(q, k, v), is_causal=is_causal, scale=scale)
    return torch.empty_like(q).copy_(out), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, ...]:
    keys, values = _expanded(q, k, v)
    dq, *rest = Math().attend_backward(dout, q, keys, values, out, lse, is_causal=is_causal, scale=scale)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in rest)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class Aten:
    """The six operators; `calls` counts them by name. `refuses`: shapes of q for which cuDNN finds no plan."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses: set[tuple[int, ...]] = set()
        self.plans: dict[object, tuple[tuple[int, ...], ...] | None] = {}

    def _plan(self, way: str, keyed: tuple[Tensor, ...], unkeyed: tuple[Tensor, ...], is_causal: bool):
        """MHA.cpp looks a plan up by q, k and v, keeps one that failed, and follows it at the next call."""
        key = (way, is_causal, *((tuple(x.shape), x.stride()) for x in keyed))
        if key not in self.plans:
            if tuple(keyed[0].shape) in self.refuses:
                self.plans[key] = None
                raise RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.")
            self.plans[key] = tuple(x.stride() for x in unkeyed)
        plan = self.plans[key]
        assert plan is not None, "segmentation fault"
        return plan

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, p, is_causal, debug, *, scale):
        self.calls.append("cuDNN")
        assert min(q.shape[2], k.shape[2]) > 1
        assert all(stride for x in (q, k, v) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
        self._plan("forward", (q, k, v), (), is_causal)
        out, lse = _forward(q, k, v, is_causal, scale)
        return out, lse.unsqueeze(-1), None

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, p, is_causal, *, scale
    ):
        self.calls.append("cuDNN backward")
        strides = self._plan("backward", (q, k, v), (dout, out, lse), is_causal)
        dout, out, lse = (x.as_strided(x.shape, stride) for x, stride in zip((dout, out, lse), strides, strict=True))
        return _backward(dout, q, k, v, out, lse.squeeze(-1), is_causal, scale)

    def _scaled_dot_product_flash_attention(self, q, k, v, p, is_causal, debug, *, scale):
        self.calls.append("flash")
        return *_forward(q, k, v, is_causal, scale), None

    def _scaled_dot_product_flash_attention_backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, is_causal, seed, offset, *, scale
    ):
        self.calls.append("flash backward")
        assert lse.is_contiguous()
        return _backward(dout, q, k, v, out, lse, is_causal, scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, with_lse, p, is_causal, *, scale):
        self.calls.append("efficient")
        assert q.shape[1] == k.shape[1] == v.shape[1]
        out, lse = _forward(q, k, v, is_causal, scale)
        padded = lse if torch.version.hip else torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)
        return out, padded, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, dout, q, k, v, bias, out, lse, seed, offset, p, mask, is_causal, *, scale
    ):
        self.calls.append("efficient backward")
        rows = q.shape[2]
        assert lse.shape[-1] == (rows if torch.version.hip else -(-rows // 32) * 32)
        # kernel_backward.h: o_strideM() is num_heads * head_dim_value
        out = out.as_strided(out.shape, (out.stride(0), out.stride(1), out.shape[1] * out.shape[3], 1))
        return *_backward(dout, q, k, v, out, lse[..., :rows], is_causal, scale), None
