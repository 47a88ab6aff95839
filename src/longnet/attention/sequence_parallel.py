"""Dilated attention over a sequence that lies across the ranks of a process group (arXiv:2307.02486 §3).

Each rank holds a slice. It sends the kept rows of its keys and values that other ranks need, attends to its own rows
while they travel, then to those that came; backward, the gradients of the rows that came go home. The result is that
of one device; the traffic does not grow with the length.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import register_flop_formula

from longnet.attention.backends import dispatch
from longnet.attention.halo import attend, differentiate, put_rows, take_home, take_rows
from longnet.attention.merge import differentiate_sinks
from longnet.attention.pattern import PATTERN_SCHEMA, DilationPattern, pattern_of
from longnet.attention.plan import runs_of
from longnet.attention.slices import SliceLayout, lay_out_slice
from longnet.attention.tiles import empty_like, empty_lse, rows_dense


@dataclass(frozen=True, eq=False)
class Slices:
    """How one sequence lies across the ranks of a group; the same on all of them, but for `rank`.

    Attributes:
        edges: (P + 1,) int64 on the CPU: rank p holds the positions edges[p] … edges[p + 1] − 1.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of each run of real tokens, in positions of the whole
            sequence.
        rank: this one.
        group: name of the process group; None where the slices are chunks, and one process has them all.
    """

    edges: Tensor
    bounds: Tensor
    rank: int
    group: str | None

    @property
    def start(self) -> Tensor:
        """Position of this rank's first token, an int64 scalar on the CPU."""
        return self.edges[self.rank]


def group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the process group of a mesh with one axis.

    Raises:
        ValueError: a mesh of several axes.
        TypeError: no mesh.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f'a sequence lies along one axis, got a mesh with {mesh.ndim}: pass mesh["sp"]')
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def gather_slices(group: dist.ProcessGroup, x: Tensor, bounds: Tensor | None) -> Slices:
    """Tell all ranks of a group how long each slice is and where its real tokens lie: 2·B + 2 numbers a rank.

    Args:
        group: holds one sequence, in rank order.
        x: (B, T, …), for the slice's shape and device.
        bounds: (B, 3), `padding_bounds` of this rank's slice; None where every token is real.

    Raises:
        ValueError: on every rank, batches of different sizes, or a row whose real tokens have gaps.
    """
    edges, of_sequence = _gather(bounds, x.shape[0], x.shape[1], group.group_name, x.device)
    return Slices(edges, of_sequence, dist.get_rank(group), group.group_name)


@torch.library.custom_op("longnet::gather_slices", mutates_args=())
def _gather(bounds: Tensor | None, rows: int, tokens: int, group: str, device: torch.device) -> tuple[Tensor, Tensor]:
    mine = torch.zeros(rows, 4, dtype=torch.int64)
    mine[:, 0], mine[:, 1] = tokens, rows
    if bounds is None:
        mine[:, 3] = tokens
    else:
        mine[:, 2:] = bounds[:, 1:]
    ranks = dist.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    all_ranks = _wait(torch.ops._c10d_functional.all_gather_into_tensor(mine.to(device), ranks, group))
    lengths, sizes, starts, stops = all_ranks.cpu().view(-1, rows, 4).unbind(2)
    if (sizes != rows).any():
        raise ValueError(f"every rank must hold a slice of the same rows, got batches of {sizes[:, 0].tolist()}")
    edges = torch.nn.functional.pad(lengths[:, 0].cumsum(0), (1, 0))
    is_empty = starts >= stops
    starts, stops = starts + edges[:-1, None], stops + edges[:-1, None]
    first = torch.where(is_empty, edges[-1], starts).amin(0)
    last = torch.where(is_empty, 0, stops).amax(0)
    torn = ((stops - starts).clamp(min=0).sum(0) != (last - first).clamp(min=0)).nonzero().flatten().tolist()
    if torn:
        raise ValueError(
            "padding_mask: the real tokens of a row must lie side by side across all ranks, with padding only before "
            f"or after; rows {torn[:8]} have gaps"
        )
    first = torch.minimum(first, last)
    return edges, torch.stack([torch.arange(rows), first, last], 1)


@_gather.register_fake
def _(bounds: Tensor | None, rows: int, tokens: int, group: str, device: torch.device) -> tuple[Tensor, Tensor]:
    ranks = dist.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    return torch.empty(ranks + 1, dtype=torch.int64), torch.empty(rows, 3, dtype=torch.int64)


def attend_slice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    slices: Slices,
    *,
    is_causal: bool,
    scale: float,
    sinks: Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend with this rank's queries to the keys of all ranks.

    Every rank of the group must call it, forward and backward, as often as the others.

    Args:
        q: (B, H, T, D), this rank's slice, T = edges[rank + 1] − edges[rank].
        k: (B, G, T, D).
        v: (B, G, T, D).
        pattern: the branches.
        slices: how the sequence lies across the ranks.
        is_causal: hide the keys after each query.
        scale: factor on q·k.
        sinks: (H,) or (B, H, T) of this rank's queries, as in `dilated_attention`.
        backend: as in `dilated_attention`, but for the oracle.

    Returns:
        out (B, H, T, D) and lse (B, H, T) of the slice, as `dilated_attention`'s.

    Raises:
        ValueError: a slice of another length than `slices` tells.
    """
    out, lse, _ = _op(
        q, k, v, sinks, slices.bounds, slices.edges, slices.rank, slices.group, *pattern.arguments, is_causal, scale,
        backend,
    )  # fmt: skip
    return out, lse


def make_halo(received: Tensor, layout: SliceLayout, batch_size: int, num_kv_heads: int) -> Tensor:
    """Put rows (n, tensors, D) that came where the halo's tiles look for them: (tensors, B, G, halo_rows, D)."""
    shape = (received.shape[1], batch_size, num_kv_heads, layout.halo_rows, received.shape[2])
    halo = received.new_zeros(shape)
    put_rows(halo, layout.received, received)
    return halo


@contextlib.contextmanager
def counted_exchanges() -> Iterator[list[int]]:
    """Give a list to which each exchange of rows within adds the bytes that it brings to this rank."""
    _counts.append([])
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


_counts: list[list[int]] = []


def _exchange(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: str) -> Tensor:
    """Start sending rows (n, …), so many to each rank; `_wait` gives those that come."""
    result: Tensor = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), received, sent, group)
    for count in _counts:
        count.append(result.nbytes)
    return result


def _wait(rows: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(rows)
    return result


def _lay_out(q: Tensor, k: Tensor, bounds: Tensor, edges: Tensor, rank: int, *settings: Any) -> SliceLayout:
    *arguments, is_causal, _scale, _backend = settings
    all_edges = tuple(edges.tolist())
    if all_edges[rank + 1] - all_edges[rank] != q.shape[2]:
        raise ValueError(
            f"rank {rank} holds the positions {all_edges[rank]} … {all_edges[rank + 1] - 1}, got {q.shape[2]} queries"
        )
    return lay_out_slice(
        pattern_of(*arguments),
        runs=runs_of(bounds, q.shape[0], all_edges[-1]),
        edges=all_edges,
        rank=rank,
        batch_size=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        is_causal=is_causal,
        device=q.device,
    )


_SETTINGS = (
    f"Tensor bounds, Tensor edges, SymInt rank, str group, {PATTERN_SCHEMA}, bool is_causal, float scale, str backend"
)


@torch.library.custom_op(
    "longnet::dilated_attention_slice",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bounds: Tensor,
    edges: Tensor,
    rank: int,
    group: str,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse and the halo of keys and values, (2, B, G, rows, D), which the backward pass reads again."""
    layout, scale, backend = _lay_out(q, k, bounds, edges, rank, *settings), *settings[-2:]
    received = k.new_empty(0, 2, k.shape[3])
    if layout.is_exchanging:
        received = _exchange(take_rows((k, v), layout.sent), layout.sent_counts, layout.received_counts, group)
    q, k, v = (rows_dense(x) for x in (q, k, v))

    @functools.cache
    def halo() -> Tensor:
        came = _wait(received) if layout.is_exchanging else received
        return make_halo(came, layout, k.shape[0], k.shape[1])

    out, lse = attend(backend, layout.tiles, q, k, v, halo, sinks, scale=scale)
    return out, lse, halo()


@torch.library.custom_op(
    "longnet::dilated_attention_slice_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor halo, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    halo: Tensor,
    bounds: Tensor,
    edges: Tensor,
    rank: int,
    group: str,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, scale, backend = _lay_out(q, k, bounds, edges, rank, *settings), *settings[-2:]
    dout, q, k, v = (rows_dense(x) for x in (dout, q, k, v))
    # The halo first: its gradients travel while the rest is computed.
    coming = []

    def send_home(dhalo: Tensor) -> None:
        home = take_rows(dhalo, layout.received).to(k.dtype)
        coming.append(_exchange(home, layout.received_counts, layout.sent_counts, group))

    tell = send_home if layout.is_exchanging else None
    dq, dk, dv, _ = differentiate(backend, layout.tiles, dout, q, k, v, halo, out, lse, scale=scale, tell=tell)
    for rows in coming:
        take_home(_wait(rows), layout.sent, (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, bounds, edges, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, edges, sinks)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, sinks = ctx.saved_tensors
    grads = _op_backward(dout, *saved, *ctx.settings)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        _, _, _, out, lse, *_ = saved
        dsinks = differentiate_sinks(dout, out, lse, sinks)
    return (*grads, dsinks, *(None,) * (2 + len(ctx.settings)))


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()  # depends on where documents end
    dense = rows_dense(q)
    return empty_like(dense).to(q.dtype), empty_lse(dense), k.new_empty(2, k.shape[0], k.shape[1], rows, k.shape[3])


@_op_backward.register_fake
def _(_dout: Tensor, *qkv_and_rest: Any) -> tuple[Tensor, ...]:
    return tuple(empty_like(rows_dense(x)).to(x.dtype) for x in qkv_and_rest[:3])


_op.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _count(q: Tensor, k: Tensor, _v: Tensor, _sinks: Tensor | None, *settings: Any, **_: Any) -> int:
    bounds, edges, rank, _group, *rest = settings
    layout = _lay_out(q, k, bounds, edges, rank, *rest)
    return 4 * q.shape[3] * layout.tiles.pairs


def _count_backward(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _lse: Tensor, _halo: Tensor, *rest: Any, **_: Any
) -> int:
    return _count(q, k, v, None, *rest) * 5 // 2


register_flop_formula(torch.ops.longnet.dilated_attention_slice, get_raw=True)(_count)
register_flop_formula(torch.ops.longnet.dilated_attention_slice_backward, get_raw=True)(_count_backward)
