"""Attention to own rows and to rows from elsewhere, forward and backward: one code, whoever holds the others.

A call has a stretch of a sequence at hand. What else its queries see of their segments is the *halo*: the kept rows of
each branch, one after the other, at places that the caller chooses. Who brings them is the caller's: an exchange with
other ranks (`sequence_parallel`), a state in memory (`streaming`), or that state and a log on disk (`chunks`). Own and
halo are functions of their own, so that rows can travel between the two; who has both takes them together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.tables import EVERYWHERE, HALO
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


Pair = Tensor | tuple[Tensor, Tensor]  # of keys and values


def attend_own(
    backend: str, layout: HaloLayout, q: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the rows at hand.

    Args:
        backend: as in `dilated_attention`, but for the oracle.
        layout: of the call.
        q: (B, H, T, D), last stride 1, as `rows_dense` returns it.
        k: (B, G, T, D), last stride 1.
        v: (B, G, T, D), last stride 1.
        scale: factor on q·k.

    Returns:
        out (B, H, T, D) and lse (B, H, T), at least float32; 0 and −inf for queries that have seen nothing.
    """
    out, lse = empty_like(q), empty_lse(q)
    if _is_fused(backend, q):
        out, fused_lse = launch.attend(q, k, v, None, layout.whole, scale=scale, out=out)
        return out, laid_out_like(fused_lse, lse)
    if not layout.is_complete:
        out.zero_()
        lse.fill_(-torch.inf)
    return attend_tiles(_kernels(backend, q), layout.own, q, k, v, out, lse, scale=scale)


def attend_halo(
    backend: str, layout: HaloLayout, q: Tensor, halo: Pair, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Fold the halo's keys and values, (B, G, rows, D) each, into what `attend_own` returned."""
    if not _is_fused(backend, q):
        return attend_tiles(_kernels(backend, q), layout.halo, q, halo[0], halo[1], out, lse, scale=scale)
    if not layout.halo:
        return out, lse
    out, fused_lse = launch.attend(
        q, *_unread(q, halo), None, layout.whole, scale=scale, halo=(halo[0], halo[1]), sources=HALO, out=out,
        lse=lse.contiguous(),
    )  # fmt: skip
    return out, laid_out_like(fused_lse, lse)


def attend_both(
    backend: str, layout: HaloLayout, q: Tensor, k: Tensor, v: Tensor, halo: Pair, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the rows at hand and to the halo's: `attend_own` and `attend_halo`, in one launch where that is one."""
    if not _is_fused(backend, q):
        out, lse = attend_own(backend, layout, q, k, v, scale=scale)
        return attend_halo(backend, layout, q, halo, out, lse, scale=scale)
    out, lse = launch.attend(
        q, k, v, None, layout.whole, scale=scale, halo=(halo[0], halo[1]), sources=EVERYWHERE, out=empty_like(q)
    )
    return out, laid_out_like(lse, empty_lse(q))


def differentiate_halo(
    backend: str,
    layout: HaloLayout,
    dout: Tensor,
    q: Tensor,
    halo: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
) -> tuple[Tensor | None, Tensor]:
    """Return the halo's share of dq, None where no query sees it, and the gradient of the halo (2, B, G, rows, D).

    Both at least float32. `out` and `lse` are those of all keys.
    """
    dhalo = empty_like(halo).zero_()
    if not layout.halo:
        return None, dhalo
    dq = empty_like(q).zero_()
    if _is_fused(backend, q):
        lse, rows, grads = lse.contiguous(), (halo[0], halo[1]), (dhalo[0], dhalo[1])
        delta = torch.empty_like(lse)
        launch.differentiate_queries(
            dout, q, _unread(q, halo), rows, out, lse, delta, layout.whole, dq, scale=scale, sources=HALO
        )
        launch.differentiate_halo(dout, q, rows, lse, delta, layout.whole, grads, scale=scale)
    else:
        differentiate_tiles(
            _kernels(backend, q), layout.halo, dout, q, halo[0], halo[1], out, lse, (dq, dhalo[0], dhalo[1]),
            scale=scale,
        )  # fmt: skip
    return dq, dhalo


def differentiate_own(
    backend: str,
    layout: HaloLayout,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq_halo: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, with the halo's share, dk and dv of the rows at hand, at least float32."""
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    is_fused = _is_fused(backend, q)
    if not (layout.whole.is_complete if is_fused else layout.is_complete):
        for grad in (dq, dk, dv):
            grad.zero_()
    if is_fused:
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        launch.differentiate_queries(dout, q, (k, v), None, out, lse, delta, layout.whole, dq, scale=scale)
        launch.differentiate_keys(dout, q, (k, v), lse, delta, layout.whole, (dk, dv), scale=scale)
    else:
        dq, dk, dv = differentiate_tiles(
            _kernels(backend, q), layout.own, dout, q, k, v, out, lse, (dq, dk, dv), scale=scale
        )
    if dq_halo is not None:
        dq.add_(dq_halo)
    return dq, dk, dv


def differentiate_both(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and the gradient of the halo, as `differentiate_halo` and `differentiate_own` do."""
    if not (layout.halo and _is_fused(backend, q)):
        dq_halo, dhalo = differentiate_halo(backend, layout, dout, q, halo, out, lse, scale=scale)
        grads = differentiate_own(backend, layout, dout, q, k, v, out, lse, dq_halo, scale=scale)
        return *grads, dhalo
    dq, dk, dv, dhalo = empty_like(q), empty_like(k), empty_like(v), empty_like(halo).zero_()
    if not layout.whole.is_complete:
        for grad in (dq, dk, dv):
            grad.zero_()
    lse, rows = lse.contiguous(), (halo[0], halo[1])
    delta = torch.empty_like(lse)
    launch.differentiate_queries(
        dout, q, (k, v), rows, out, lse, delta, layout.whole, dq, scale=scale, sources=EVERYWHERE
    )
    launch.differentiate_keys(dout, q, (k, v), lse, delta, layout.whole, (dk, dv), scale=scale)
    launch.differentiate_halo(dout, q, rows, lse, delta, layout.whole, (dhalo[0], dhalo[1]), scale=scale)
    return dq, dk, dv, dhalo


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
