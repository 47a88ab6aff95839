"""dilated_attention(): the op, its checks, and which tiles it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longnet.attention import reference
from longnet.attention.backends import dispatch
from longnet.attention.pattern import PATTERN_SCHEMA, DilationPattern, pattern_of
from longnet.attention.plan import Whole, plan, runs_of
from longnet.attention.registration import Layout, Part, cast_under_autocast, register, without_autocast
from longnet.attention.sequence_parallel import attend_slice, gather_slices, group_of

# Keywords of scaled_dot_product_attention, and what to do instead.
_REFUSED = {
    "attn_mask": "an arbitrary mask cannot be honoured: is_causal, padding_mask (True for a real token) and cu_seqlens "
    "say what is hidden",
    "enable_gqa": "grouped heads need no flag: k and v with fewer heads than q are shared out among them",
    "key_padding_mask": "the op takes padding_mask, True for a real token: pass the opposite, ~key_padding_mask",
}


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: dispatch.Backend = ...,
    mesh: DeviceMesh | ProcessGroup | None = ...,
) -> Tensor: ...


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: dispatch.Backend = ...,
    mesh: DeviceMesh | ProcessGroup | None = ...,
) -> tuple[Tensor, Tensor]: ...


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: dispatch.Backend = "auto",
    mesh: DeviceMesh | ProcessGroup | None = None,
    **refused: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend along `pattern`: one softmax over the multiset union of the branches' keys (arXiv:2307.02486 eq. 3-15).

    A query that a branch keeps attends to the keys that the branch keeps in the same segment; a key that three
    branches see counts three times. Gradients are exact: the mixture weights are not detached. Only q, k, v, out and
    lse are kept for the backward pass, which cannot itself be differentiated.

    Args:
        q: (B, H, Tq, D), float64, float32, bfloat16 or float16, any strides. With Tq < T its rows are the last Tq
            positions (cached decoding).
        k: (B, G, T, D) with H a multiple of G; query head h reads key/value head h // (H / G).
        v: (B, G, T, D).
        pattern: segment lengths, dilation rates, which queries, head offsets. Any T, multiple of nothing. Where k holds
            some of a layer's heads, as under tensor parallelism, `pattern.shard` says which.
        is_causal: hide the keys after each query.
        scale: factor on q·k, D ** -0.5 when None.
        padding_mask: (B, T) bool, True for a real token. The real tokens of a row lie side by side; segments count
            from the first of them. Output is 0 in the padding, which is never read.
        cu_seqlens: (n + 1,) int32 or int64, 0 … T: boundaries of n documents packed end to end in a batch of 1. Each
            attends within itself, its segments counted from its first token.
        sinks: (H,) or (B, H, Tq), any float dtype: logits of one more key of value 0, which every query sees.
            Not in the paper.
        dropout_p: only 0.
        return_lse: return the log-sum-exp too.
        backend: `"sdpa"` computes tiles with the kernels behind scaled_dot_product_attention, `"reference"` a dense
            mask in O(T²), `"triton"` one fused kernel of our own on CUDA, `"auto"` the fastest that can run, by what
            has been measured, never the oracle.
        mesh: an axis of ranks, across which the sequence lies: q, k, v, padding_mask and the result are this rank's
            slice of it, in rank order, of any length; cu_seqlens are those of the whole sequence. Every rank calls,
            and goes backward, with the same pattern and settings. Tq = T.

        refused: keywords of scaled_dot_product_attention that cannot be honoured, and are told so.

    Returns:
        out (B, H, Tq, D) like q; a query that no branch keeps, or that is padding, gets 0. With `return_lse` also lse
        (B, H, Tq), natural logarithm, −inf for such a query (its sink's logit, where there are sinks), float32 (float64
        for float64). lse carries no gradient.

    Raises:
        ValueError: shapes, devices, dtypes or masks that do not fit; a backend that cannot run.
        TypeError: `pattern` is no DilationPattern, or `mesh` no mesh.
        NotImplementedError: dropout_p other than 0.
    """
    for name in refused:
        raise TypeError(f"{name}: {_REFUSED.get(name, 'dilated_attention has no such keyword')}")
    q, k, v = cast_under_autocast(q, k, v)
    _check(q, k, v, pattern, padding_mask, cu_seqlens, sinks, dropout_p)
    if mesh is not None:
        if q.shape[2] != k.shape[2] or backend == "reference":
            raise ValueError('across ranks there must be as many queries as keys, and a backend but the oracle: "auto"')
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        slices = gather_slices(
            group_of(mesh), k.transpose(1, 2), None if padding_mask is None else padding_bounds(padding_mask)
        )
        if cu_seqlens is not None:
            slices = replace(slices, bounds=document_bounds(cu_seqlens, int(slices.edges[-1])))
        out, lse = attend_slice(
            q, k, v, pattern, slices, is_causal=is_causal, scale=scale, sinks=sinks, backend=backend
        )
        return (out, lse.detach()) if return_lse else out
    bounds = None
    if padding_mask is not None:
        bounds = padding_bounds(padding_mask)
    elif cu_seqlens is not None:
        bounds = document_bounds(cu_seqlens, k.shape[2])
    out, lse = attend_within(
        q, k, v, pattern, bounds=bounds, is_causal=is_causal, scale=scale, sinks=sinks, backend=backend
    )
    return (out, lse.detach()) if return_lse else out


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    *,
    bounds: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    sinks: Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `dilated_attention` where masks have been read into bounds, as a model does once for all its layers.

    Args:
        q: (B, H, Tq, D), checked, like k and v.
        k: (B, G, T, D).
        v: (B, G, T, D).
        pattern: the branches.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of each run of real tokens, as `padding_bounds` and
            `document_bounds` give them; None where every token is real.
        is_causal: hide the keys after each query.
        scale: factor on q·k, D ** -0.5 when None.
        sinks: (H,) or (B, H, Tq), as in `dilated_attention`.
        backend: as in `dilated_attention`.

    Returns:
        out (B, H, Tq, D) and lse (B, H, Tq).
    """
    q, k, v = cast_under_autocast(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        with without_autocast(q.device.type):
            out, lse = reference.attend(q, k, v, pattern, bounds=bounds, is_causal=is_causal, scale=scale, sinks=sinks)
            return out, lse.to(torch.promote_types(lse.dtype, torch.float32))
    return _op(q, k, v, bounds, sinks, *pattern.arguments, is_causal, scale, backend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    if not isinstance(pattern, DilationPattern):
        raise TypeError(
            f"pattern must be a DilationPattern, got {type(pattern).__name__}: DilationPattern.parse reads text"
        )
    if dropout_p != 0:
        raise NotImplementedError(
            f"dilated attention has no attention dropout yet, got dropout_p={dropout_p}: set it to 0 "
            "(attention_dropout=0.0 in a model's configuration), and drop out the output instead"
        )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (batch, heads, tokens, head dim), got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must be alike, and share batch and head dim with q, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {shapes}")
    if q.shape[3] == 0:
        raise ValueError(f"the head dim must be at least 1, got {shapes}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"there must be at least as many keys as queries, whose rows are the last ones, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if sinks is not None and (
        sinks.shape not in (q.shape[1:2], q.shape[:3]) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        raise ValueError(
            f"sinks must be (query heads,) = {tuple(q.shape[1:2])} or (batch, query heads, queries) = "
            f"{tuple(q.shape[:3])}, floating point, on {q.device}, got {tuple(sinks.shape)} {sinks.dtype} "
            f"on {sinks.device}"
        )
    if padding_mask is not None and cu_seqlens is not None:
        raise ValueError("give padding_mask or cu_seqlens, not both: packed documents need no padding")
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool, True for real tokens, got {padding_mask.dtype}: mask.bool()")
        if padding_mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"padding_mask must be (batch, tokens of k) = {(k.shape[0], k.shape[2])}, "
                f"got {tuple(padding_mask.shape)}"
            )
    if cu_seqlens is not None:
        if k.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs documents into a batch of 1, got a batch of {k.shape[0]}")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be (documents + 1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )


@torch.library.custom_op("longnet::padding_bounds", mutates_args=())
def padding_bounds(padding_mask: Tensor) -> Tensor:
    """Return (B, 3) int64 on the CPU: (batch row, first real token, one past the last) of each row of a mask.

    Raises:
        ValueError: a row whose real tokens do not lie side by side.
    """
    mask = padding_mask.cpu()
    rows, tokens = mask.shape
    counts = mask.sum(1)
    starts = mask.int().argmax(1) if tokens else counts
    starts = torch.where(counts > 0, starts, 0)
    positions = torch.arange(tokens)
    run = (positions >= starts[:, None]) & (positions < (starts + counts)[:, None])
    torn = (run != mask).any(1).nonzero().flatten().tolist()
    if torn:
        raise ValueError(
            "padding_mask: the real tokens of a row must lie side by side, with padding only before or after; "
            f"rows {torn[:8]} have gaps. Several documents in a row are packed with cu_seqlens"
        )
    return torch.stack([torch.arange(rows), starts, starts + counts], 1)


@padding_bounds.register_fake
def _(padding_mask: Tensor) -> Tensor:
    return padding_mask.new_empty((padding_mask.shape[0], 3), dtype=torch.int64, device="cpu")


@torch.library.custom_op("longnet::document_bounds", mutates_args=())
def document_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return (n, 3) int64 on the CPU: (0, start, stop) of each of the n documents packed into `tokens` tokens.

    Raises:
        ValueError: boundaries that do not rise from 0 to `tokens`.
    """
    edges = cu_seqlens.to("cpu", torch.int64)
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != tokens or (edges.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {edges.tolist()[:16]}")
    return torch.stack([torch.zeros_like(edges[:-1]), edges[:-1], edges[1:]], 1)


@document_bounds.register_fake
def _(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return cu_seqlens.new_empty((cu_seqlens.shape[0] - 1, 3), dtype=torch.int64, device="cpu")


def _lay_out(q: Tensor, k: Tensor, bounds: Tensor | None, *arguments_and_causal: Any) -> Layout:
    *arguments, is_causal = arguments_and_causal
    tiles, is_complete = plan(
        pattern_of(*arguments),
        runs=runs_of(bounds, k.shape[0], k.shape[2]),
        batch_size=q.shape[0],
        q_tokens=q.shape[2],
        k_tokens=k.shape[2],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        is_causal=is_causal,
    )
    return Layout([Part(tiles)], is_complete)


def _as_one(q: Tensor, k: Tensor, bounds: Tensor | None, *arguments_and_causal: Any) -> Whole:
    *arguments, is_causal = arguments_and_causal
    runs = runs_of(bounds, k.shape[0], k.shape[2])
    skipped = k.shape[2] - q.shape[2]
    queries = sum(run.rows * max(0, run.stop - max(run.start, skipped)) for run in runs)
    return Whole(pattern_of(*arguments), runs, is_causal, is_complete=queries == q.shape[0] * q.shape[2])


_op = register("dilated_attention", f"{PATTERN_SCHEMA}, bool is_causal", _lay_out, _as_one)
