"""Registration with PyTorch: attention over tiles as an op, with its exact gradient, its shapes and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.combined import Keys, attend_combined, combines, differentiate_combined
from longnet.attention.fused import is_fused
from longnet.attention.merge import differentiate_sinks, merge_sinks_
from longnet.attention.plan import Tile, Whole
from longnet.attention.tiles import (
    attend_tiles,
    differentiate_tiles,
    empty_like,
    empty_lse,
    laid_out_like,
    rows_dense,
)


class Part(NamedTuple):
    """Tiles over some of the batch rows and some of the keys.

    Attributes:
        tiles: count batch rows and keys within the part.
        rows: its batch rows, where `keys` are given.
        keys: gives, on a device, the positions of its keys, which are copied; None for all, as they lie.
    """

    tiles: tuple[Tile, ...]
    rows: slice = slice(None)
    keys: Callable[[torch.device], Tensor] | None = None


class Layout(NamedTuple):
    """The parts of one call; `is_complete` when `is_first` tiles of the first part write every query."""

    parts: Iterable[Part]
    is_complete: bool


Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def register(
    name: str, settings: str, lay_out: Callable[..., Layout], as_one: Callable[..., Whole] | None = None
) -> Forward:
    """Make the op `longnet::name` and its backward, `longnet::name_backward`, of a layout.

    Args:
        name: of the op.
        settings: the schema of the arguments that `lay_out` takes after q, k and bounds.
        lay_out: (q, k, bounds, *settings) → which tiles make up the attention.
        as_one: the same → the attention as one, for a backend that needs no tiles; None where there is no such backend.

    Returns:
        (q, k, v, bounds, sinks, *settings, scale, backend) → out (B, H, Tq, D), lse (B, H, Tq), which has no gradient;
        bounds are (n, 3) int64, (batch row, start, stop) of each run of real tokens, or None where every token is real;
        sinks are (H,) or (B, H, Tq), logits of one more key of value 0, or None.
    """
    forward, backward = implement(lay_out, as_one)
    qkv, rest = "Tensor q, Tensor k, Tensor v", f"{settings}, float scale, str backend"
    op: Any = torch.library.custom_op(
        f"longnet::{name}",
        forward,
        mutates_args=(),
        schema=f"({qkv}, Tensor? bounds, Tensor? sinks, {rest}) -> (Tensor, Tensor)",
    )
    op_backward: Any = torch.library.custom_op(
        f"longnet::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor dout, {qkv}, Tensor out, Tensor lse, Tensor? bounds, {rest}) -> (Tensor, Tensor, Tensor)",
    )

    def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, bounds, sinks, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, *output, bounds, sinks)

    def differentiate(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bounds, sinks = ctx.saved_tensors
        grads = op_backward(dout, q, k, v, out, lse, bounds, *ctx.settings)
        dsinks = differentiate_sinks(dout, out, lse, sinks) if sinks is not None and ctx.needs_input_grad[4] else None
        return (*grads, None, dsinks, *(None,) * len(ctx.settings))

    def count(q: Tensor, k: Tensor, _v: Tensor, bounds: Tensor | None, _sinks: Any, *settings: Any, **_: Any) -> int:
        parts = lay_out(q, k, bounds, *settings[:-2]).parts
        return 4 * q.shape[3] * sum(tile.pairs for part in parts for tile in part.tiles)

    def count_backward(
        _dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _out: Any,
        _lse: Any,
        bounds: Tensor | None,
        *rest: Any,
        **_: Any,
    ) -> int:
        return count(q, k, v, bounds, None, *rest) * 5 // 2  # five matrix products where the forward has two

    op.register_fake(lambda q, *_: (empty_like(rows_dense(q)).to(q.dtype), empty_lse(rows_dense(q))))
    op_backward.register_fake(
        lambda _dout, *qkv_and_rest: tuple(empty_like(rows_dense(x)).to(x.dtype) for x in qkv_and_rest[:3])
    )
    op.register_autograd(differentiate, setup_context=keep_for_backward)
    register_flop_formula(getattr(torch.ops.longnet, name), get_raw=True)(count)
    register_flop_formula(getattr(torch.ops.longnet, f"{name}_backward"), get_raw=True)(count_backward)
    return op  # type: ignore[no-any-return]


def implement(lay_out: Callable[..., Layout], as_one: Callable[..., Whole] | None = None) -> tuple[Forward, Backward]:
    """Return what `register` makes ops of: functions of plain tensors."""

    def fused(
        whole: Callable[..., Whole],
        backend: str,
        q: Tensor,
        k: Tensor,
        bounds: Tensor | None,
        settings: Iterable[Any],
        *,
        backward: bool,
    ) -> bool:
        def tiles() -> Iterable[Tile]:
            return (tile for part in lay_out(q, k, bounds, *settings).parts for tile in part.tiles)

        return is_fused(backend, q, k, lambda: whole(q, k, bounds, *settings), tiles, backward=backward)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, sinks: Tensor | None, *settings_scale_backend: Any
    ) -> tuple[Tensor, Tensor]:
        *settings, scale, backend = settings_scale_backend
        if as_one and fused(as_one, backend, q, k, bounds, settings, backward=False):
            q, k, v = (rows_dense(x) for x in (q, k, v))
            out, fused_lse = launch.attend(q, k, v, sinks, as_one(q, k, bounds, *settings), scale=scale)
            return out, laid_out_like(fused_lse, empty_lse(q))
        kernels = dispatch.choose(backend, q.device, q.dtype, q.shape[3])
        parts, is_complete = lay_out(q, k, bounds, *settings)
        q, k, v = (rows_dense(x) for x in (q, k, v))
        if as_one and combines(q):
            sources = [Keys(part.tiles, k, v) for part in parts]
            whole, skipped = as_one(q, k, bounds, *settings), k.shape[2] - q.shape[2]
            return attend_combined(kernels, sources, q, sinks, whole, skipped=skipped, scale=scale)
        out, lse = empty_like(q), empty_lse(q)
        if not is_complete:
            out.zero_()
            lse.fill_(-torch.inf)
        for part in parts:
            if part.keys is None:
                out, lse = attend_tiles(kernels, part.tiles, q, k, v, out, lse, scale=scale)
            else:
                positions = part.keys(k.device)
                k_seen, v_seen = (x[part.rows].index_select(2, positions) for x in (k, v))
                attend_tiles(
                    kernels, part.tiles, q[part.rows], k_seen, v_seen, out[part.rows], lse[part.rows], scale=scale
                )
        if sinks is not None:
            merge_sinks_(out, lse, sinks)
        return out.to(q.dtype), lse

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: Tensor | None,
        *settings_scale_backend: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *settings, scale, backend = settings_scale_backend
        if as_one and fused(as_one, backend, q, k, bounds, settings, backward=True):
            dout, q, k, v = (rows_dense(x) for x in (dout, q, k, v))
            return launch.attend_backward(dout, q, k, v, out, lse, as_one(q, k, bounds, *settings), scale=scale)
        kernels = dispatch.choose(backend, q.device, q.dtype, q.shape[3])
        parts, is_complete = lay_out(q, k, bounds, *settings)
        dout, q, k, v = (rows_dense(x) for x in (dout, q, k, v))
        if as_one and combines(q):
            sources = [Keys(part.tiles, k, v) for part in parts]
            room = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            whole = as_one(q, k, bounds, *settings)
            return differentiate_combined(kernels, sources, dout, q, out, lse, room, whole, scale=scale)
        dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
        if not (is_complete and q.shape[2] == k.shape[2]):
            for grad in (dq, dk, dv):
                grad.zero_()
        for part in parts:
            if part.keys is None:
                dq, dk, dv = differentiate_tiles(
                    kernels, part.tiles, dout, q, k, v, out, lse, (dq, dk, dv), scale=scale
                )
                continue
            rows, positions = part.rows, part.keys(k.device)
            k_seen, v_seen = (x[rows].index_select(2, positions) for x in (k, v))
            dk_seen, dv_seen = empty_like(k_seen).zero_(), empty_like(v_seen).zero_()
            differentiate_tiles(
                kernels, part.tiles, dout[rows], q[rows], k_seen, v_seen, out[rows], lse[rows],
                (dq[rows], dk_seen, dv_seen), scale=scale,
            )  # fmt: skip
            dk[rows].index_add_(2, positions, dk_seen)
            dv[rows].index_add_(2, positions, dv_seen)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    return forward, backward


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype of an autocast that is on: as PyTorch's own operators do, float64 stays."""
    device_type = tensors[0].device.type
    if not _is_autocast(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which no autocast is on, for a device that may know none (meta)."""
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


def _is_autocast(device_type: str) -> bool:
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace the question; what is compiled computes on a device
        return device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
