"""Tiles, put together at once: what kernels return stays where it lies until one launch reads all of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.dispatch import Kernels
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.parts import ROW_BYTES, Part
from longnet.attention.merge import per_query
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Tile, Whole, plan, runs_of
from longnet.attention.tiles import attend_tiles, differentiate_tiles, empty_like, empty_lse, max_rows, packed
from longnet.attention.views import Block, blocks

_MOST_RESULTS = 6  # parts of so many results' bytes are put together before more of them come: memory has an end


class Keys(NamedTuple):
    """Keys and values (B, G, rows, D), last stride 1, and the tiles that read them.

    Attributes:
        tiles: rows of queries against rows of these.
        k: the keys.
        v: the values.
        grads: at least float32, their gradients so far, to which the tiles' are added; None where they lie at the
            queries' own positions, and their gradients are put together as the queries' are.
    """

    tiles: Iterable[Tile]
    k: Tensor
    v: Tensor
    grads: tuple[Tensor, Tensor] | None = None


def combines(q: Tensor) -> bool:
    """Say whether the parts that tiles of queries like q give are put together at once, where they lie.

    That is a launch of Triton's, which has to prove itself on a device first. The addresses that it reads are a call's
    own, so a CUDA graph, which outlives the call, must not hold it.
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return _combines_on(q.device) and q.dtype != torch.float64 and q.shape[3] * q.dtype.itemsize % ROW_BYTES == 0


def attend_combined(
    kernels: Kernels, sources: Iterable[Keys], q: Tensor, sinks: Tensor | None, whole: Whole, *, skipped: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (B, H, Tq, D) like q and lse (B, H, Tq) of all tiles, sinks included.

    Args:
        kernels: compute a tile each.
        sources: are taken one after the other, so that rows may still be on their way.
        q: (B, H, Tq, D), last stride 1.
        sinks: (H,) or (B, H, Tq), logits of one more key of value 0, or None.
        whole: what attends to what.
        skipped: positions at hand before the first query.
        scale: factor on q·k.
    """
    lse = empty_lse(q)
    result = _Result(torch.empty_like(q), lse, sinks, whole, skipped)
    for tiles, k, v, _ in sources:
        for tile in tiles:
            kernel, out = kernels.of(tile), result.room
            for block in blocks(tile, (q, out, lse), (k, v), max_rows(q), groups_heads=kernel.groups_heads):
                tile_out, tile_lse = kernel.attend(
                    block.q(q), packed(block, k), packed(block, v), is_causal=tile.is_causal, scale=scale
                )
                result.add(_part(tile, whole, block.q(out), tile_out, tile_lse))
    return result.total(), lse


def differentiate_combined(
    kernels: Kernels,
    sources: Iterable[Keys],
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    whole: Whole,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of all tiles, as `attend_combined` does.

    Args:
        kernels: compute a tile each.
        sources: as in `attend_combined`.
        dout: (B, H, Tq, D), last stride 1.
        q: (B, H, Tq, D), last stride 1.
        out: (B, H, Tq, D), of the one softmax over all tiles of a query.
        lse: (B, H, Tq).
        grads: room for dq, dk, dv, laid out like q and the keys and values at the queries' positions.
        whole: what attends to what.
        scale: factor on q·k.
    """
    skipped = grads[1].shape[2] - q.shape[2]
    dq, dk, dv = (_Result(grad, None, None, whole, skip) for grad, skip in zip(grads, (skipped, 0, 0), strict=True))
    dk.is_complete = dv.is_complete = dk.is_complete and not skipped
    for tiles, k, v, room in sources:
        for tile in tiles:
            kernel = kernels.of(tile)
            kv_room = room or (dk.room, dv.room)
            q_like, kv_like = (dout, q, out, lse, dq.room), (k, v, *kv_room)
            of_rows: dict[int, tuple[Block, list[tuple[Tensor, ...]]]] = {}  # calls that share their keys
            for block in blocks(tile, q_like, kv_like, max_rows(q), groups_heads=kernel.groups_heads):
                tile_dq, *found = kernel.attend_backward(
                    block.q(dout), block.q(q), block.kv(k), block.kv(v), block.q(out), block.q(lse),
                    is_causal=tile.is_causal, scale=scale,
                )  # fmt: skip
                dq.add(_part(tile, whole, block.q(dq.room), tile_dq))
                once = tuple(part.sum(block.shared, keepdim=True) if block.shared else part for part in found)
                rows_at = int(block.kv_once(kv_room[0]).storage_offset())
                of_rows.setdefault(rows_at, (block, []))[1].append(once)
            for block, calls in of_rows.values():
                for result, place, parts in zip((dk, dv), kv_room, zip(*calls, strict=True), strict=True):
                    part, rows = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0), block.kv_once(place)
                    if room:
                        rows.add_(part)
                    else:
                        result.add(Part(tile.branch, 1, rows, part, None))
    return dq.total(), dk.total(), dv.total()


class _Result:
    """A result, (B, H, T, D), and the parts that give to it and still lie where kernels left them."""

    def __init__(self, room: Tensor, lse: Tensor | None, sinks: Tensor | None, whole: Whole, skipped: int) -> None:
        self.room = room
        self.is_complete = whole.is_complete
        self._lse, self._sinks, self._whole, self._skipped = lse, sinks, whole, skipped
        self._dtype = room.dtype
        self._parts: list[Part] = []
        self._is_more = False

    def add(self, part: Part) -> None:
        """Keep a part; many of them are put together first, into float32."""
        held = sum(held.out.nbytes for held in self._parts)
        if held and held >= _MOST_RESULTS * self.room.numel() * part.out.itemsize:
            if not self._is_more:
                self.room = empty_like(self.room)
            self._put_together(None)
        self._parts.append(part if launch.can_combine(part.out) else part._replace(out=part.out.contiguous()))

    def total(self) -> Tensor:
        """Return what all parts give, in the dtype of the room that was given."""
        self._put_together(self._sinks)
        return self.room.to(self._dtype)

    def _put_together(self, sinks: Tensor | None) -> None:
        if not self._is_more and not (self.is_complete and self._parts):
            self.room.zero_()
            if self._lse is not None:
                own = self._sinks
                self._lse.fill_(-torch.inf) if own is None else self._lse.copy_(per_query(own, self._lse))
        if self._parts:
            launch.combine(
                self._parts, self.room, self._lse, sinks, self._whole, skipped=self._skipped, is_more=self._is_more
            )
        self._is_more = True
        self._parts.clear()


def _part(tile: Tile, whole: Whole, rows: Tensor, out: Tensor, lse: Tensor | None = None) -> Part:
    """Return what a tile gives to its queries: all of them come in as many phases as they are apart."""
    return Part(tile.branch, tile.q_rate if whole.pattern.queries == "all" else 1, rows, out, lse)


@functools.lru_cache(maxsize=64)
def _combines_on(device: torch.device) -> bool:
    """Say whether `launch.combine` runs on a device, and agrees there with the tiles put together one by one."""
    doing, otherwise = "putting tiles together in one launch", "they are merged one by one"
    return dispatch.proves_itself(device, _disagreement, doing=doing, otherwise=otherwise)


def _disagreement(device: torch.device) -> float:
    """Return how far the two ways are apart on numbers of order 1: out, log-sum-exp, gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens = 100
    q, dout = torch.randn(2, 1, tokens, 4, 64, generator=generator).to(device).transpose(2, 3)
    k, v = torch.randn(2, 1, tokens, 2, 64, generator=generator).to(device).transpose(2, 3)
    runs = runs_of(None, 1, tokens)
    kernels = dispatch.choose("auto", device, q.dtype, 64)
    errors = []
    for queries in ("kept", "all"):
        pattern = DilationPattern((16, 48, 64), (1, 2, 3), queries=queries)
        tiles, _ = plan(
            pattern, runs=runs, batch_size=1, q_tokens=tokens, k_tokens=tokens, num_heads=4, num_kv_heads=2,
            is_causal=True,
        )  # fmt: skip
        whole = Whole(pattern, runs, True, True)
        out, lse = attend_tiles(kernels, tiles, q, k, v, empty_like(q), empty_lse(q), scale=0.125)
        room = empty_like(q), empty_like(k), empty_like(v)
        want = out, lse, *differentiate_tiles(kernels, tiles, dout, q, k, v, out, lse, room, scale=0.125)
        room = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        got = (
            *attend_combined(kernels, [Keys(tiles, k, v)], q, None, whole, skipped=0, scale=0.125),
            *differentiate_combined(kernels, [Keys(tiles, k, v)], dout, q, out, lse, room, whole, scale=0.125),
        )
        errors += [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
    return max(errors)
