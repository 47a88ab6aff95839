"""Launching the fused kernels: what they cannot run on, and the sizes of their blocks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends.triton.blocks import (
    MIN_PROGRAMS,
    architecture_of,
    block_length,
    combine_blocks,
    decode_blocks,
    forward_blocks,
    key_blocks,
    padded,
    query_blocks,
)
from longnet.attention.backends.triton.parts import ROW_BYTES, Part, entries_of, placed, table_of
from longnet.attention.backends.triton.tables import (
    AT_HAND,
    active_on,
    edges_on,
    halo_work_of,
    places_of,
    spans_of,
    tables_of,
    work_of,
)
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Whole

NAME = "triton"
Pair = tuple[Tensor, Tensor]  # of keys and values
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2_E = 1.4426950408889634
_ROWS_A_SPLIT = 256  # of a state, for a program to be worth its start


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


def failures() -> tuple[type[Exception], ...]:
    """Return what a first launch raises where it cannot be compiled, or does not fit the device."""
    from triton.errors import TritonError  # no RuntimeError: ptxas that fails, too much shared memory

    return TritonError, RuntimeError, OSError, subprocess.CalledProcessError


def is_interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, which it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    whole: Whole,
    *,
    scale: float,
    halo: Pair | None = None,
    sources: range = AT_HAND,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dilated attention in one launch.

    Args:
        q: (B, H, Tq, D), the last Tq positions, last stride 1.
        k: (B, G, T, D), likewise.
        v: (B, G, T, D), likewise.
        sinks: (H,) or (B, H, Tq), logits of one more key of value 0, or None.
        whole: what attends to what.
        scale: factor on q·k.
        halo: keys and values (B, G, rows, D) of runs that reach beyond those at hand, last stride 1.
        sources: which keys: those at hand, the halo's, or both.
        out: where to write the output, in any float dtype, last stride 1; like q when None.
        lse: (B, H, Tq), contiguous, of what `out` has seen so far, and both are gone on with, in place; None for none.

    Returns:
        out (B, H, Tq, D) and lse (B, H, Tq), float32, contiguous; 0 and −inf, or the sink's logit, for padding.
    """
    from longnet.attention.backends.triton import forward  # which decides, once, whether it is interpreted

    batch_size, num_heads, tokens, head_dim = q.shape
    is_more = lse is not None
    if out is None:
        out = torch.empty_like(q)
    if lse is None:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if not whole.is_complete:
            out.zero_()
            lse.copy_(_per_query(sinks, q)) if sinks is not None else lse.fill_(-torch.inf)
    blocks = forward_blocks(q.dtype, head_dim, architecture_of(q.device), has_halo=sources != AT_HAND)
    tables = tables_of(whole.pattern, k.shape[1], q.device)
    length = block_length(tables.most, blocks.rows, tokens * batch_size * num_heads)
    work = work_of(spans_of(whole, sources, k.shape[2] - tokens), length, q.device)
    if not work.shape[0]:
        return out, lse
    acc = torch.empty(*q.shape, dtype=torch.float32, device=q.device)
    logits = lse if sinks is None else _per_query(sinks, q)
    halo_k, halo_v = halo or (k, v)
    _launch(
        forward.attend, (work.shape[0], num_heads),
        q, k, v, halo_k, halo_v, logits, out, acc, lse, tables.branches, tables.offsets,
        places_of(whole, q.device), work, len(whole.pattern.all_branches), tables.covering, num_heads, k.shape[1],
        tokens, k.shape[2] - tokens, length,
        int(is_more), scale * _LOG2_E,
        *_strides(q, k, v, halo_k, halo_v, out), *logits.stride(),
        CAUSAL=whole.is_causal, HAS_SINKS=sinks is not None, FROM=sources.start, TO=sources.stop, STEP=sources.step,
        ROWS=blocks.rows, KEYS=blocks.keys, D=head_dim, DP=padded(head_dim), UPCAST=is_interpreted(),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, whole: Whole, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of a call without a halo, in two launches; the same bits at every run.

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
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not (whole.is_complete and q.shape[2] == k.shape[2]):
        for grad in grads:
            grad.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    differentiate_queries(dout, q, (k, v), None, out, lse, delta, whole, grads[0], scale=scale)
    differentiate_keys(dout, q, (k, v), lse, delta, whole, grads[1:], scale=scale)
    return grads


def differentiate_queries(
    dout: Tensor,
    q: Tensor,
    kv: Pair,
    halo: Pair | None,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    whole: Whole,
    dq: Tensor,
    *,
    scale: float,
    sources: range = AT_HAND,
) -> None:
    """Write dq, what keys of some sources give to it, and rowsum(dout · out) into `delta`, both like lse contiguous.

    Queries that see nothing of the sources are left as they are. Arguments are those of `attend_backward`, and
    `attend`'s `halo` and `sources`; lse and delta are contiguous, dq has any float dtype.
    """
    from longnet.attention.backends.triton import backward

    num_heads, tokens, head_dim = q.shape[1:]
    k, v = kv
    num_kv_heads, skipped = k.shape[1], k.shape[2] - tokens
    blocks = query_blocks(q.dtype, head_dim, architecture_of(q.device), has_halo=sources != AT_HAND)
    tables = tables_of(whole.pattern, num_kv_heads, q.device)
    length = block_length(tables.most, blocks.rows, lse.numel())
    work = work_of(spans_of(whole, sources, skipped), length, q.device)
    if not work.shape[0]:
        return
    acc = torch.empty(*q.shape, dtype=torch.float32, device=q.device)
    halo_k, halo_v = halo or kv
    _launch(
        backward.backward_queries, (work.shape[0], num_heads),
        dout, q, k, v, halo_k, halo_v, out, lse, delta, dq, acc,
        tables.branches, tables.offsets, places_of(whole, q.device), work,
        len(whole.pattern.all_branches), tables.covering, num_heads, num_kv_heads, tokens, skipped, length,
        scale, scale * _LOG2_E,
        *_strides(dout, q, k, v, halo_k, halo_v, out, dq),
        CAUSAL=whole.is_causal, FROM=sources.start, TO=sources.stop, STEP=sources.step,
        ROWS=blocks.rows, KEYS=blocks.keys, D=head_dim, DP=padded(head_dim), UPCAST=is_interpreted(),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def differentiate_keys(
    dout: Tensor, q: Tensor, kv: Pair, lse: Tensor, delta: Tensor, whole: Whole, grads: Pair, *, scale: float
) -> None:
    """Write dk and dv of the keys at hand; those in no run are left. As `differentiate_queries`, after it."""
    from longnet.attention.backends.triton import backward

    num_heads, tokens, head_dim = q.shape[1:]
    (k, v), (dk, dv) = kv, grads
    num_kv_heads, all_tokens = k.shape[1:3]
    blocks = key_blocks(q.dtype, head_dim, architecture_of(q.device))
    tables = tables_of(whole.pattern, num_kv_heads, q.device)
    length = block_length(tables.most, blocks.keys, k.shape[0] * num_kv_heads * all_tokens)
    work = work_of(spans_of(whole, AT_HAND, 0), length, q.device, late_first=not whole.is_causal)
    if not work.shape[0]:
        return
    sums = torch.empty(2, *k.shape, dtype=torch.float32, device=q.device)
    _launch(
        backward.backward_keys, (work.shape[0], num_kv_heads),
        dout, q, k, v, lse, delta, dk, dv, sums, tables.branches, tables.offsets, work,
        len(whole.pattern.all_branches), num_heads, num_kv_heads, all_tokens, tokens, all_tokens - tokens, length,
        k.shape[0] * num_kv_heads * all_tokens, scale, scale * _LOG2_E, *_strides(dout, q, k, v, dk, dv),
        CAUSAL=whole.is_causal, ROWS=blocks.rows, KEYS=blocks.keys, D=head_dim, DP=padded(head_dim),
        UPCAST=is_interpreted(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def differentiate_halo(
    dout: Tensor, q: Tensor, halo: Pair, lse: Tensor, delta: Tensor, whole: Whole, grads: Pair, *, scale: float
) -> None:
    """Write dk and dv of the halo's rows; those that no query sees are left as they are. As `differentiate_keys`."""
    from longnet.attention.backends.triton import backward

    head_dim, num_kv_heads = q.shape[3], halo[0].shape[1]
    blocks = key_blocks(q.dtype, head_dim, architecture_of(q.device))
    tables = tables_of(whole.pattern, num_kv_heads, q.device)
    work = halo_work_of(whole, blocks.keys, q.device)
    if not work.shape[0]:
        return
    _launch(
        backward.backward_halo, (work.shape[0], num_kv_heads),
        dout, q, *halo, lse, delta, *grads, tables.branches, tables.offsets, places_of(whole, q.device), work,
        q.shape[1], num_kv_heads, q.shape[2], scale, scale * _LOG2_E, *_strides(dout, q, *halo, *grads),
        ROWS=blocks.rows, KEYS=blocks.keys, D=head_dim, DP=padded(head_dim),
        UPCAST=is_interpreted(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


class Step(NamedTuple):
    """What a state's next token needs on the device, beside the state: where its sequences stand, and scratch.

    Attributes:
        positions: (2, B) int64, of the next token, which a launch moves on by one, and of the first token.
        part: (B, G, splits, H / G, D) float32.
        part_lse: (B, G, splits, H / G) float32.
        counts: (B · G + B,) int32, zeros.
    """

    positions: Tensor
    part: Tensor
    part_lse: Tensor
    counts: Tensor


def step_of(q: Tensor, keys: Tensor) -> Step:
    """Return what `decode` needs for queries like q (B, H, 1, D) and a state (B, G, rows, D); positions are zeros."""
    batch_size, num_heads, _, head_dim = q.shape
    num_kv_heads, rows = keys.shape[1:3]
    programs = batch_size * num_kv_heads
    splits = max(1, min(MIN_PROGRAMS // programs, -(-rows // _ROWS_A_SPLIT)))
    part = torch.empty(batch_size, num_kv_heads, splits, num_heads // num_kv_heads, head_dim, device=q.device)
    positions = torch.zeros(2, batch_size, dtype=torch.int64, device=q.device)
    counts = torch.zeros(programs + batch_size, dtype=torch.int32, device=q.device)
    return Step(positions, part, torch.empty_like(part[..., 0]), counts)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    pattern: DilationPattern,
    edges: tuple[int, ...],
    step: Step,
    active: tuple[bool, ...],
    *,
    scale: float,
) -> Tensor:
    """Attend with one token of each sequence, and keep of it what later ones need, in one launch.

    Args:
        q: (B, H, 1, D), last stride 1.
        k: (B, G, 1, D), likewise.
        v: (B, G, 1, D), likewise.
        keys: (B, G, rows, D), the state's, into which rows are written.
        values: (B, G, rows, D), likewise.
        sinks: (H,) or (B, H, 1), or None.
        pattern: the branches.
        edges: where each branch's rows begin in the state, and where the last one's end.
        step: from `step_of`; its positions move on.
        active: whether each batch row has a token.
        scale: factor on q·k.

    Returns:
        out (B, H, 1, D) like q; 0 where a batch row has no token.
    """
    from longnet.attention.backends.triton import decode as kernels

    batch_size, num_heads, _, head_dim = q.shape
    num_kv_heads, splits = step.part.shape[1:3]
    out = torch.empty_like(q)
    tables = tables_of(pattern, num_kv_heads, q.device)
    logits = q[..., 0] if sinks is None else _per_query(sinks, q)
    blocks = decode_blocks(q.dtype, head_dim)
    _launch(
        kernels.decode, (splits, num_kv_heads, batch_size),
        q, k, v, keys, values, logits, out, step.part, step.part_lse, step.counts, *step.positions,
        active_on(active, q.device), tables.branches, tables.offsets, edges_on(pattern, edges, q.device),
        len(pattern.all_branches), num_heads, num_kv_heads, batch_size, splits, scale * _LOG2_E,
        *(step for x in (q, k, v) for step in x.stride()[:2]), *_strides(keys, values), *out.stride()[:2],
        *logits.stride()[:2],
        HAS_SINKS=sinks is not None, ROWS=max(blocks.rows, padded(num_heads // num_kv_heads)), KEYS=blocks.keys,
        D=head_dim, DP=padded(head_dim), UPCAST=is_interpreted(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


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


def can_combine(*parts: Tensor) -> bool:
    """Say whether `combine` can read such parts: rows of whole 16 bytes."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % ROW_BYTES == 0
        and all(step * x.itemsize % ROW_BYTES == 0 for step in x.stride()[:-1])
        for x in parts
    )


def combine(
    parts: list[Part],
    out: Tensor,
    lse: Tensor | None,
    sinks: Tensor | None,
    whole: Whole,
    *,
    skipped: int,
    is_more: bool = False,
) -> None:
    """Write a result whose parts tiles have computed, in one launch; what lies in no run is left.

    Args:
        parts: of one dtype, whose rows begin at multiples of 16 bytes.
        out: (B, H, T, D) of any float dtype, dense, last stride 1.
        lse: (B, H, T), float32, of the softmax; None where parts are added up.
        sinks: (H,) or (B, H, T), logits of one more key of value 0, or None.
        whole: what attends to what.
        skipped: positions at hand before the first of the result's.
        is_more: earlier parts are in `out` and `lse`, and count.
    """
    from longnet.attention.backends.triton import combine as kernels

    head_dim, like = out.shape[3], parts[0].out
    blocks = combine_blocks(like.dtype, head_dim)
    table = table_of(
        tuple(placed(part, out) for part in parts), out.shape[:3], out.stride()[:3], like.itemsize, whole, skipped,
        blocks.rows, out.device,
    )  # fmt: skip
    is_softmax = lse is not None
    lse = out[..., 0] if lse is None else lse
    logits = lse if sinks is None else _per_query(sinks, out)
    _launch(
        kernels.combine, (table.work.shape[0], out.shape[1]),
        out, lse, logits, like, entries_of(table, parts, out.device), table.layers, table.bases, table.work,
        table.layers.shape[0], out.shape[1], int(is_more), *out.stride()[:3], *lse.stride(), *logits.stride(),
        SOFTMAX=is_softmax, HAS_SINKS=sinks is not None, ROWS=blocks.rows, D=head_dim, DP=padded(head_dim),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch on the device of the first tensor, which Triton would not ask for."""
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        kernel[grid](x, *arguments, **constants)


def _strides(*tensors: Tensor) -> Iterator[int]:
    return (step for x in tensors for step in x.stride()[:3])


def _per_query(sinks: Tensor, q: Tensor) -> Tensor:
    return (sinks[:, None] if sinks.ndim == 1 else sinks).expand(q.shape[:3])
