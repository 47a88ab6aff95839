"""Attention to own rows and to rows from elsewhere, forward and backward: one code, whoever holds the others.

A call has a stretch of a sequence at hand. What else its queries see of their segments is the *halo*: the kept rows of
each branch, one after the other, at places that the caller chooses. Who brings them is the caller's: an exchange with
other ranks (`sequence_parallel`), a state in memory (`streaming`), or that state and a log on disk (`chunks`). Own rows
are attended to while others may still travel, and the gradients of those are told before own ones are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.tables import AT_HAND, EVERYWHERE, HALO
from longnet.attention.combined import Keys, attend_combined, combines, differentiate_combined
from longnet.attention.merge import merge_sinks_
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Tile, Whole, plan
from longnet.attention.tiles import attend_tiles, differentiate_tiles, empty_like, empty_lse, laid_out_like


class HaloLayout(NamedTuple):
    """The tiles of one call.

    Attributes:
        own: of its own queries and keys.
        is_complete: the `is_first` ones among them write every query.
        halo: of its own queries and the halo's keys.
        whole: both as one, for a backend that needs no tiles.
    """

    own: tuple[Tile, ...]
    is_complete: bool
    halo: tuple[Tile, ...]
    whole: Whole

    @property
    def pairs(self) -> int:
        """The (query, key) pairs of all tiles."""
        return sum(tile.pairs for tile in (*self.own, *self.halo))


@functools.lru_cache(maxsize=64)
def lay_out(
    pattern: DilationPattern,
    *,
    runs: tuple[Run, ...],
    tokens: int,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    earlier: tuple[int, ...],
    later: tuple[int, ...] = (),
) -> HaloLayout:
    """Lay out the attention of `tokens` positions at hand, whose runs may begin before them and end after them.

    Args:
        pattern: the branches.
        runs: what attends to one another, in positions at hand.
        tokens: T.
        batch_size: B.
        num_heads: H.
        num_kv_heads: G.
        is_causal: hide the keys after each query.
        earlier: per branch, where in the halo its rows from before the tokens at hand begin.
        later: those from after them; none where attention is causal.
    """
    tiles, is_complete = plan(
        pattern, runs=runs, batch_size=batch_size, q_tokens=tokens, k_tokens=tokens, num_heads=num_heads,
        num_kv_heads=num_kv_heads, is_causal=is_causal, is_partial=True,
    )  # fmt: skip
    queries = sum(run.rows * (run.stop - max(0, run.start + run.first)) for run in runs)
    return HaloLayout(
        own=tuple(tile for tile in tiles if not tile.is_kept),
        is_complete=is_complete,
        halo=tuple(
            replace(tile, k_start=tile.k_start + (later if tile.is_later else earlier)[tile.branch])
            for tile in tiles
            if tile.is_kept
        ),
        whole=Whole(
            pattern,
            runs,
            is_causal,
            is_complete=queries == batch_size * tokens,
            earlier=earlier,
            later=later,
        ),
    )


Pair = Tensor | tuple[Tensor, Tensor]  # of keys and values, (B, G, rows, D) each


def attend(
    backend: str,
    layout: HaloLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    halo: Pair | Callable[[], Pair],
    sinks: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the rows at hand and to the halo's.

    Args:
        backend: as in `dilated_attention`, but for the oracle.
        layout: of the call.
        q: (B, H, T, D), last stride 1, as `rows_dense` returns it.
        k: (B, G, T, D), last stride 1.
        v: (B, G, T, D), last stride 1.
        halo: its keys and values, or what waits for them: it is called, once, after the rows at hand have been seen.
        sinks: (H,) or (B, H, T), logits of one more key of value 0, or None.
        scale: factor on q·k.

    Returns:
        out (B, H, T, D) like q and lse (B, H, T), at least float32; 0 and −inf, or the sink's logit, for queries that
        have seen nothing.
    """
    if _is_fused(backend, q):
        out, lse = _attend_fused(layout, q, k, v, halo, scale=scale)
    elif combines(q):
        sources = _own_first(layout, k, v, halo)
        return attend_combined(_kernels(backend, q), sources, q, sinks, layout.whole, skipped=0, scale=scale)
    else:
        out, lse = empty_like(q), empty_lse(q)
        if not layout.is_complete:
            out.zero_()
            lse.fill_(-torch.inf)
        for tiles, keys, values, _ in _own_first(layout, k, v, halo):
            out, lse = attend_tiles(_kernels(backend, q), tiles, q, keys, values, out, lse, scale=scale)
    if sinks is not None:
        merge_sinks_(out, lse, sinks)
    return out.to(q.dtype), lse


def _own_first(layout: HaloLayout, k: Tensor, v: Tensor, halo: Pair | Callable[[], Pair]) -> Iterator[Keys]:
    yield Keys(layout.own, k, v)
    halo_k, halo_v = halo() if callable(halo) else halo
    yield Keys(layout.halo, halo_k, halo_v)


def _attend_fused(
    layout: HaloLayout, q: Tensor, k: Tensor, v: Tensor, halo: Pair | Callable[[], Pair], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out and lse, at least float32: of one launch, or of two if the halo is still on its way."""
    given = None if callable(halo) else (halo[0], halo[1])
    out, lse = launch.attend(
        q, k, v, None, layout.whole, scale=scale, halo=given, sources=EVERYWHERE if given else AT_HAND,
        out=empty_like(q),
    )  # fmt: skip
    if callable(halo):
        rows = halo()
        if layout.halo:
            out, lse = launch.attend(
                q, *_unread(q, rows), None, layout.whole, scale=scale, halo=(rows[0], rows[1]), sources=HALO, out=out,
                lse=lse,
            )  # fmt: skip
    return out, laid_out_like(lse, empty_lse(q))


def differentiate(
    backend: str,
    layout: HaloLayout,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    halo: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    tell: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and the gradient of the halo (2, B, G, rows, D); all but dq at least float32.

    Args:
        backend: as in `attend`, like layout, q, k, v and scale.
        layout: of the call.
        dout: (B, H, T, D), last stride 1.
        q: (B, H, T, D).
        k: (B, G, T, D).
        v: (B, G, T, D).
        halo: (2, B, G, rows, D), keys and values.
        out: (B, H, T, D), of all keys.
        lse: (B, H, T), of all keys.
        scale: factor on q·k.
        tell: takes the halo's gradient as soon as it is there, before the rest is computed.
    """
    dhalo = empty_like(halo).zero_()
    given = layout, dout, q, k, v, halo, out, lse, dhalo
    if _is_fused(backend, q):
        return *_differentiate_fused(*given, scale, tell), dhalo
    kernels = _kernels(backend, q)
    if combines(q):
        room = torch.empty_like(q), empty_like(k), empty_like(v)
        sources = _halo_first(layout, k, v, halo, dhalo, tell)
        grads = differentiate_combined(kernels, sources, dout, q, out, lse, room, layout.whole, scale=scale)
        return *grads, dhalo
    dq_halo = empty_like(q).zero_() if layout.halo else empty_like(q)
    rows = dq_halo, dhalo[0], dhalo[1]
    differentiate_tiles(kernels, layout.halo, dout, q, halo[0], halo[1], out, lse, rows, scale=scale)
    if tell is not None:
        tell(dhalo)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if not layout.is_complete:
        for grad in (dq, dk, dv):
            grad.zero_()
    dq, dk, dv = differentiate_tiles(kernels, layout.own, dout, q, k, v, out, lse, (dq, dk, dv), scale=scale)
    return dq.add_(dq_halo) if layout.halo else dq, dk, dv, dhalo


def _halo_first(
    layout: HaloLayout, k: Tensor, v: Tensor, halo: Tensor, dhalo: Tensor, tell: Callable[[Tensor], None] | None
) -> Iterator[Keys]:
    yield Keys(layout.halo, halo[0], halo[1], (dhalo[0], dhalo[1]))
    if tell is not None:
        tell(dhalo)
    yield Keys(layout.own, k, v)


def _differentiate_fused(
    layout: HaloLayout,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    halo: Tensor,
    out: Tensor,
    lse: Tensor,
    dhalo: Tensor,
    scale: float,
    tell: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and write the halo's: at once, or the halo's first where they are waited for."""
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if not layout.whole.is_complete:
        for grad in (dq, dk, dv):
            grad.zero_()
    lse, rows, whole = lse.contiguous(), (halo[0], halo[1]), layout.whole
    delta = torch.empty_like(lse)
    dq_halo = None
    if layout.halo and tell is not None:
        dq_halo = empty_like(q).zero_()
        launch.differentiate_queries(
            dout, q, _unread(q, rows), rows, out, lse, delta, whole, dq_halo, scale=scale, sources=HALO
        )
        launch.differentiate_halo(dout, q, rows, lse, delta, whole, (dhalo[0], dhalo[1]), scale=scale)
    if tell is not None:
        tell(dhalo)
    sources = EVERYWHERE if layout.halo and tell is None else AT_HAND
    launch.differentiate_queries(dout, q, (k, v), rows, out, lse, delta, whole, dq, scale=scale, sources=sources)
    launch.differentiate_keys(dout, q, (k, v), lse, delta, whole, (dk, dv), scale=scale)
    if layout.halo and tell is None:
        launch.differentiate_halo(dout, q, rows, lse, delta, whole, (dhalo[0], dhalo[1]), scale=scale)
    return dq if dq_halo is None else dq.add_(dq_halo), dk, dv


def _is_fused(backend: str, q: Tensor) -> bool:
    return dispatch.is_fused(backend, q.device, q.dtype, q.shape[3])


def _kernels(backend: str, q: Tensor) -> dispatch.Kernels:
    return dispatch.choose(backend, q.device, q.dtype, q.shape[3])


def _unread(q: Tensor, halo: Pair) -> tuple[Tensor, Tensor]:
    """Return what has the shape of the keys and values at hand, which nothing reads."""
    like = q[:, : halo[0].shape[1]]
    return like, like


class Rows(NamedTuple):
    """Rows of a tensor (B, G, T, D): (n,) int64 each. `x[rows]` is (n, D)."""

    batch: Tensor
    head: Tensor
    position: Tensor


class Pieces(NamedTuple):
    """Rows, in pieces in which no row comes twice.

    Attributes:
        rows: all of them.
        sizes: of the pieces, one after the other.
    """

    rows: Rows
    sizes: list[int]


def take_rows(tensors: Iterable[Tensor], pieces: Pieces) -> Tensor:
    """Return rows of tensors (B, G, T, D), side by side: (n, tensors, D)."""
    return torch.stack([x[pieces.rows] for x in tensors], 1)


def put_rows(tensors: Iterable[Tensor], pieces: Pieces, rows: Tensor) -> None:
    """Write rows (n, tensors, D) into tensors (B, G, T, D), none of them twice."""
    for x, new in zip(tensors, rows.unbind(1), strict=True):
        x[pieces.rows] = new.to(x.dtype)


def take_home(came: Tensor, pieces: Pieces, grads: Iterable[Tensor]) -> None:
    """Add gradients (n, tensors, D) of rows that were given away to those of all rows, (B, G, T, D) each.

    Piece by piece: a row that several branches keep comes several times, and adding those at once would do it in an
    order that threads decide.
    """
    for grad, rows in zip(grads, came.unbind(1), strict=True):
        at = zip(*(torch.split(column, pieces.sizes) for column in pieces.rows), strict=True)
        for piece, part in zip(at, torch.split(rows.to(grad.dtype), pieces.sizes), strict=True):
            grad[piece] += part
