"""Launching the fused kernels: what they cannot run on, their tables on the device, and the sizes of their blocks."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Whole

NAME = "triton"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2_E = 1.4426950408889634
_MIN_PROGRAMS = 1024  # some for each of the 132 multiprocessors of an H100


class Blocks(NamedTuple):
    """How a kernel is cut: rows of queries and of keys at a time, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why the fused kernels cannot run on such tensors, or None when they can."""
    if not is_installed():
        return "needs Triton, which CUDA builds of PyTorch bring along: pip install 'longnet-torch[triton]'"
    if device.type != "cuda" and not is_interpreted():
        return f"runs on CUDA, not on {device.type} (but for Triton's interpreter, TRITON_INTERPRET=1)"
    if dtype not in _DTYPES:
        return f"has no {dtype}"
    if dtype == torch.float32 and head_dim > 128:
        return f"has float32 up to a head dim of 128, beyond which its sums spill from the registers, got {head_dim}"
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"needs a head dim that is a multiple of 8 from 16 to 256, got {head_dim}"
    return None


def is_installed() -> bool:
    """Say whether Triton is at hand."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, which it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, whole: Whole, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dilated attention in one launch.

    Args:
        q: (B, H, Tq, D), the last Tq positions, last stride 1.
        k: (B, G, T, D), likewise.
        v: (B, G, T, D), likewise.
        sinks: (H,) or (B, H, Tq), logits of one more key of value 0, or None.
        whole: what attends to what.
        scale: factor on q·k.

    Returns:
        out (B, H, Tq, D) like q and lse (B, H, Tq), float32, contiguous; 0 and −inf, or the sink's logit, for padding.
    """
    from longnet.attention.backends.triton import forward  # which decides, once, whether it is interpreted

    batch_size, num_heads, tokens, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not whole.is_complete:
        out.zero_()
        lse.copy_(_per_query(sinks, q)) if sinks is not None else lse.fill_(-torch.inf)
    blocks = forward_blocks(q.dtype, head_dim)
    tables = _tables(whole.pattern, k.shape[1], q.device)
    length = block_length(tables.most, blocks.rows, tokens * batch_size * num_heads)
    work = _work(whole.runs, length, k.shape[2] - tokens, q.device)
    if not work.shape[0]:
        return out, lse
    acc = torch.empty(*q.shape, dtype=torch.float32, device=q.device)
    logits = lse if sinks is None else _per_query(sinks, q)
    _launch(
        forward.attend, (work.shape[0], num_heads),
        q, k, v, logits, out, acc, lse, tables.branches, tables.offsets, work,
        len(whole.pattern.branches), tables.covering, num_heads, k.shape[1], tokens, k.shape[2] - tokens, length,
        scale * _LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *logits.stride(),
        CAUSAL=whole.is_causal, HAS_SINKS=sinks is not None, ROWS=blocks.rows, KEYS=blocks.keys,
        D=head_dim, DP=padded(head_dim), UPCAST=is_interpreted(),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, whole: Whole, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in two launches; the same bits at every run.

    Args:
        dout: (B, H, Tq, D), last stride 1, like all tensors.
        q: as in `attend`, like k and v.
        k: (B, G, T, D).
        v: (B, G, T, D).
        out: (B, H, Tq, D), of the one softmax.
        lse: (B, H, Tq), sinks included.
        whole: as in `attend`.
        scale: factor on q·k.
    """
    from longnet.attention.backends.triton import backward

    num_heads, tokens, head_dim = q.shape[1:]
    num_kv_heads, all_tokens = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not (whole.is_complete and tokens == all_tokens):
        for grad in (dq, dk, dv):
            grad.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    blocks, key_blocks = query_blocks(q.dtype, head_dim), key_blocks_of(q.dtype, head_dim)
    tables = _tables(whole.pattern, num_kv_heads, q.device)
    count, skipped = len(whole.pattern.branches), all_tokens - tokens
    constants: dict[str, Any] = {
        "CAUSAL": whole.is_causal, "D": head_dim, "DP": padded(head_dim), "UPCAST": is_interpreted(),
    }  # fmt: skip
    length = block_length(tables.most, blocks.rows, lse.numel())
    work = _work(whole.runs, length, skipped, q.device)
    if not work.shape[0]:
        return dq, dk, dv
    acc = torch.empty(*q.shape, dtype=torch.float32, device=q.device)
    _launch(
        backward.backward_queries, (work.shape[0], num_heads),
        dout, q, k, v, out, lse, delta, dq, acc, tables.branches, tables.offsets, work,
        count, tables.covering, num_heads, num_kv_heads, tokens, skipped, length, scale, scale * _LOG2_E,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dq.stride()[:3],
        **constants, ROWS=blocks.rows, KEYS=blocks.keys, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    length = block_length(tables.most, key_blocks.keys, k.shape[0] * num_kv_heads * all_tokens)
    work = _work(whole.runs, length, 0, q.device)
    sums = torch.empty(2, *k.shape, dtype=torch.float32, device=q.device)
    _launch(
        backward.backward_keys, (work.shape[0], num_kv_heads),
        dout, q, k, v, lse, delta, dk, dv, sums, tables.branches, tables.offsets, work,
        count, num_heads, num_kv_heads, all_tokens, tokens, skipped, length, k.numel(), scale, scale * _LOG2_E,
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        **constants, ROWS=key_blocks.rows, KEYS=key_blocks.keys,
        num_warps=key_blocks.warps, num_stages=key_blocks.stages,
    )  # fmt: skip
    return dq, dk, dv


def merge_(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Do what `longnet.attention.merge.merge_` does, in one launch. The tensors are (batch, heads, rows, …)."""
    from longnet.attention.backends.triton import merge

    batch_size, num_heads, count, head_dim = out.shape
    rows = max(16, 4096 // padded(head_dim))
    _launch(
        merge.merge, (-(-count // rows), num_heads, batch_size),
        out, lse, tile_out, tile_lse, count,
        *out.stride()[:3], *lse.stride(), *tile_out.stride()[:3], *tile_lse.stride(),
        ROWS=rows, D=head_dim, DP=padded(head_dim), num_warps=4,
    )  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch on the device of the first tensor, which Triton would not ask for."""
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        kernel[grid](x, *arguments, **constants)


def padded(head_dim: int) -> int:
    """Return the power of two that head_dim channels are computed as."""
    return int(2 ** math.ceil(math.log2(head_dim)))


def forward_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return how the forward kernel is cut; benchmarks/results/triton_kernels.jsonl says what that compiles to."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2)
    if head_dim <= 64:
        return Blocks(64, 64, 4, 3)
    return Blocks(128, 64, 8, 2) if head_dim <= 128 else Blocks(64, 32, 8, 2)


def query_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return how the kernel of dq is cut."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1)
    if head_dim <= 64:
        return Blocks(64, 64, 4, 2)
    return Blocks(64, 32, 8, 2) if head_dim <= 128 else Blocks(32, 32, 8, 1)


def key_blocks_of(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return how the kernel of dk and dv is cut."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1) if head_dim <= 64 else Blocks(32, 32, 8, 1)
    if head_dim <= 32:
        return Blocks(32, 64, 4, 2)
    if head_dim <= 64:
        return Blocks(32, 64, 8, 2)
    return Blocks(32, 64, 8, 1) if head_dim <= 128 else Blocks(32, 32, 8, 1)


class _Tables(NamedTuple):
    """A pattern on the device: those of its branches that thin their queries first.

    Attributes:
        branches: (N, 3) int32, length, rate, distance of the queries.
        offsets: (N, G) int32.
        covering: the last branch if every query is in it, else −1.
        most: the largest distance of queries or keys.
    """

    branches: Tensor
    offsets: Tensor
    covering: int
    most: int


@functools.lru_cache(maxsize=256)
def _tables(pattern: DilationPattern, num_kv_heads: int, device: torch.device) -> _Tables:
    branches = sorted(pattern.branches, key=lambda branch: -branch[1])
    rows = [(length, rate, 1 if pattern.queries == "all" else rate) for length, rate in branches]
    offsets = [[pattern.offset(rate, head, num_kv_heads) for head in range(num_kv_heads)] for _, rate in branches]
    return _Tables(
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(offsets, dtype=torch.int32, device=device),
        len(rows) - 1 if rows[-1][2] == 1 else -1,
        branches[0][1],
    )


@functools.lru_cache(maxsize=64)
def _work(runs: tuple[Run, ...], length: int, skipped: int, device: torch.device) -> Tensor:
    """Return (blocks, 4) int32: batch row, document's start and stop, the block's first position; late ones first.

    Documents travel to the device as they lie in memory, which waits for nothing.
    """
    blocks = [
        (row, run.start, run.stop, first)
        for run in runs
        for row in range(run.row, run.row + run.rows)
        for first in range(max(0, skipped - run.start) // length * length, run.stop - run.start, length)
    ]
    blocks.sort(key=lambda block: -block[3])  # with causality they are the longest
    work = torch.tensor(blocks, dtype=torch.int32).view(-1, 4)
    return work.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else work.to(device)


def block_length(most: int, rows: int, all_rows: int) -> int:
    """Return how many positions a program owns: enough to fill a block of rows of the widest branch, if there are."""
    length = max(4 * rows, 64)
    while length < rows * most and all_rows // (2 * length) >= _MIN_PROGRAMS:
        length *= 2
    return length


def _per_query(sinks: Tensor, q: Tensor) -> Tensor:
    return (sinks[:, None] if sinks.ndim == 1 else sinks).expand(q.shape[:3])
