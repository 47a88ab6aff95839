"""Tiles, computed: the loops that every attention over a plan shares, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.cuda import INT32_MAX
from longnet.attention.backends.dispatch import Kernels
from longnet.attention.plan import Tile
from longnet.attention.views import Block, blocks

_ALIGNMENT = 16  # bytes that kernels off the CPU load at once
_CPU_CALL_BYTES = 4 * 2**20  # of output a thread: it stays in cache until it is merged, and memory stays small


def attend_tiles(
    kernels: Kernels, tiles: Iterable[Tile], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Fold what `tiles` see into `out` and `lse`: in place, but for a first tile that is taken as it comes.

    Args:
        kernels: compute a tile each.
        tiles: rows of q against rows of k and v.
        q: (B, H, Tq, D), last stride 1.
        k: (B, G, Tk, D), last stride 1.
        v: (B, G, Tk, D), last stride 1.
        out: (B, H, Tq, D), from `empty_like`; written where a tile is its queries' first, else merged into.
        lse: (B, H, Tq), from `empty_lse`.
        scale: factor on q·k.

    Returns:
        out and lse, the ones given where no tile is its queries' first.
    """
    merge = dispatch.merge_on(q.device, q.dtype)
    for tile in tiles:
        kernel = kernels.of(tile)
        for block in blocks(tile, (q, out, lse), (k, v), max_rows(q), groups_heads=kernel.groups_heads):
            tile_out, tile_lse = kernel.attend(
                block.q(q), packed(block, k), packed(block, v), is_causal=tile.is_causal, scale=scale
            )
            if block.q_first:
                out, lse = _write(out, block.q(out), tile_out), _write(lse, block.q(lse), tile_lse)
            else:
                merge(block.q(out), block.q(lse), tile_out, tile_lse)
    return out, lse


def differentiate_tiles(
    kernels: Kernels,
    tiles: Iterable[Tile],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the tiles' shares of dq, dk, dv to `grads`, as `attend_tiles` does; `out` and `lse` are the merged ones.

    Args:
        kernels: compute a tile each.
        tiles: as in `attend_tiles`.
        dout: (B, H, Tq, D), last stride 1.
        q: as in `attend_tiles`, like k and v.
        k: (B, G, Tk, D).
        v: (B, G, Tk, D).
        out: (B, H, Tq, D), of the one softmax over all tiles of a query.
        lse: (B, H, Tq).
        grads: dq, dk, dv from `empty_like`; zero where no tile is the first.
        scale: factor on q·k.

    Returns:
        dq, dk, dv, the ones given where no tile is the first.
    """
    dq, dk, dv = grads
    for tile in tiles:
        kernel = kernels.of(tile)
        q_like, kv_like = (dout, q, out, lse, dq), (k, v, dk, dv)
        for block in blocks(tile, q_like, kv_like, max_rows(q), groups_heads=kernel.groups_heads):
            parts = kernel.attend_backward(
                block.q(dout), block.q(q), block.kv(k), block.kv(v), block.q(out), block.q(lse),
                is_causal=tile.is_causal, scale=scale,
            )  # fmt: skip
            dq = _accumulate(dq, block.q(dq), parts[0], is_first=block.q_first)
            dk_part, dv_part = (part.sum(block.shared, keepdim=True) if block.shared else part for part in parts[1:])
            dk = _accumulate(dk, block.kv_once(dk), dk_part, is_first=block.kv_first)
            dv = _accumulate(dv, block.kv_once(dv), dv_part, is_first=block.kv_first)
    return dq, dk, dv


def packed(block: Block, x: Tensor) -> Tensor:
    """View the rows of keys or values; on the CPU close together where several phases of queries read them.

    Rows a power of two apart fall into few sets of the cache, and are fetched anew for each phase: at a rate of 64 the
    kernel takes 11 % longer. Laid side by side they are 1/rate of the keys, once a call.
    """
    rows = block.kv(x)
    if x.device.type != "cpu" or block.tile.k_rate == 1 or not block.shared:
        return rows
    return block.kv_once(x).contiguous().expand(rows.shape)


def rows_dense(x: Tensor) -> Tensor:
    """Return x as kernels can read it, copied if need be.

    Its last stride is 1 and its rows do not overlap: ATen's CPU kernel reads garbage, silently, where the last stride
    is another; where rows overlap (`unfold`), what is allocated in their layout is no layout. Off the CPU its rows
    begin at multiples of 16 bytes, which kernels there load at once; such a copy has the strides that `empty_like`
    gives to x, so that results are laid out alike with and without it. Axes of one entry count too: a single row has
    any stride, 1 where (B, H, D, T) was transposed, and kernels refuse by the stride before they look at the size.
    """
    overlaps = 0 < x.stride(2) < x.shape[3] and x.shape[2] > 1
    if x.stride(3) != 1 or overlaps:
        return x.clone(memory_format=torch.contiguous_format)
    if x.device.type == "cpu" or isinstance(x, FakeTensor):
        return x
    steps = _ALIGNMENT // x.itemsize
    strides = [
        -(-x.shape[3] // steps) * steps if size == 1 and stride % steps else stride
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    if (*strides, 1) != x.stride():
        x = x.as_strided(x.shape, (*strides, 1))
    return x if is_aligned(x) else x.clone()


def is_aligned(x: Tensor) -> bool:
    """Say whether all rows of x (…, D) begin at multiples of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % _ALIGNMENT == 0 and all(step * x.dtype.itemsize % _ALIGNMENT == 0 for step in steps)


def empty_like(x: Tensor) -> Tensor:
    """Return room for partial results of x's shape and strides: at least float32, since in bfloat16 they drift."""
    return torch.empty_like(x, dtype=_accumulator_dtype(x.dtype))


def laid_out_like(x: Tensor, room: Tensor) -> Tensor:
    """Return x in the strides of `room`, copied into it if need be."""
    return x if x.stride() == room.stride() else room.copy_(x)


def empty_lse(q: Tensor) -> Tensor:
    """Return room for the log-sum-exp of queries (B, H, Tq, D): (B, H, Tq), at least float32."""
    return torch.empty_like(q[..., 0], dtype=_accumulator_dtype(q.dtype))


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _accumulate(total: Tensor, view: Tensor, part: Tensor, *, is_first: bool) -> Tensor:
    if is_first:
        return _write(total, view, part)
    view.add_(part)
    return total


def _write(total: Tensor, view: Tensor, part: Tensor) -> Tensor:
    """Copy `part` into `view`, a view of `total`; where it is all of `total` and laid out alike, take it instead.

    At 2K tokens the pages of another output, touched anew at each call, cost as much as all merging.
    """
    if view.numel() == total.numel() and view.stride() == part.stride() and view.dtype == part.dtype:
        return part.as_strided(total.shape, total.stride())
    view.copy_(part)
    return total


def max_rows(q: Tensor) -> int:
    """Return how many rows of queries like q (B, H, Tq, D) a kernel call should have at most."""
    if q.device.type != "cpu":
        return INT32_MAX
    return _CPU_CALL_BYTES * torch.get_num_threads() // (q.shape[3] * q.dtype.itemsize)
