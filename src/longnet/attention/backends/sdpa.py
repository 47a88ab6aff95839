"""Attention of one tile through operators of PyTorch: what a kernel is, and those that need no CUDA.

Operators that return a log-sum-exp and whose backward accepts one from outside: called with the *merged* output and
log-sum-exp, a tile's backward gives its share of the exact gradient of the one softmax. Every kernel here takes
q (batch, heads, M, D) and k, v (batch, heads, N, D) with any strides but a last one of 1, M ≥ 1, N ≥ 1, and answers in
natural logarithms: lse (batch, heads, M), float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_aten = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """One operator pair. `is_causal` has q and k of the same rows; `out` and `lse` of the backward are merged ones.

    Attributes:
        name: for logs and errors.
        groups_heads: takes k and v of fewer heads than q, each for as many consecutive heads of q.
    """

    name: str
    groups_heads: bool

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Say why this kernel cannot run on such tensors, or None when it can."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        """Return (dq, dk, dv)."""


class FlashCPU:
    """ATen's flash attention for the CPU."""

    name = "flash (CPU)"
    groups_heads = False

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
    ) -> Grads:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
        return dq, dk, dv


class Math:
    """Plain PyTorch, any device and float dtype. The last resort; float64 on CUDA.

    Never more than `_MAX_SCORES` scores exist at once: a call is cut along its batch, its heads and its query rows.
    """

    name = "math"
    groups_heads = False

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if dtype.is_floating_point and dtype.itemsize >= 2 else f"has no {dtype}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q, dtype=dtype), torch.empty_like(q[..., 0], dtype=dtype)
        with torch.autocast(q.device.type, enabled=False):
            for rows, keys in _pieces(q, k, is_causal=is_causal):
                scores = _scores(q[rows].to(dtype), k[keys].to(dtype), rows[2].start, is_causal=is_causal, scale=scale)
                lse[rows] = torch.logsumexp(scores, -1)
                out[rows] = torch.exp(scores - lse[rows].unsqueeze(-1)) @ v[keys].to(dtype)
        return out, lse

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
    ) -> Grads:
        dtype = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q, dtype=dtype)
        dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            for rows, keys in _pieces(q, k, is_causal=is_causal):
                q_rows, k_rows, v_rows, dout_rows = (
                    x[piece].to(dtype) for x, piece in ((q, rows), (k, keys), (v, keys), (dout, rows))
                )
                scores = _scores(q_rows, k_rows, rows[2].start, is_causal=is_causal, scale=scale)
                p = torch.exp(scores - lse[rows].unsqueeze(-1))
                delta = (dout_rows * out[rows].to(dtype)).sum(-1, keepdim=True)
                ds = p * (dout_rows @ v_rows.mT - delta) * scale
                dq[rows] = ds @ k_rows
                dk[keys] += ds.mT @ q_rows
                dv[keys] += p.mT @ dout_rows
        return dq, dk, dv


_MAX_SCORES = 2**26  # 256 MiB in float32
_Piece = tuple[slice, slice, slice]  # of batch, heads, rows


def _pieces(q: Tensor, k: Tensor, *, is_causal: bool) -> Iterator[tuple[_Piece, _Piece]]:
    """Yield query rows, and the keys that they see, of at most `_MAX_SCORES` pairs."""
    batch, heads, q_rows, _ = q.shape
    k_rows = k.shape[2]
    rows_at_once = max(1, _MAX_SCORES // k_rows)
    heads_at_once = max(1, rows_at_once // q_rows)
    batch_at_once = max(1, heads_at_once // heads)
    for b in range(0, batch, batch_at_once):
        for h in range(0, heads, heads_at_once):
            for start in range(0, q_rows, rows_at_once):
                entries = slice(b, b + batch_at_once), slice(h, h + heads_at_once)
                rows = slice(start, min(start + rows_at_once, q_rows))
                yield (*entries, rows), (*entries, slice(0, rows.stop if is_causal else k_rows))


def _scores(q: Tensor, k: Tensor, start: int, *, is_causal: bool, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    if is_causal:
        rows = torch.arange(start, start + q.shape[2], device=q.device)
        keys = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(rows[:, None] < keys, -torch.inf)
    return scores
