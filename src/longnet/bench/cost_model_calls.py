"""The model of costs for what is not a whole sequence: one rank's slice of it, with a halo, and one decoded token."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Tile
from longnet.attention.slices import SliceLayout, lay_out_slice
from longnet.attention.streaming import StreamState
from longnet.bench.cost_model import Device, Row, combined_bytes, kernel_bytes, kernel_launches, rows_of


def slice_costs(
    device: Device, tokens: int, ranks: int, pattern: DilationPattern, *, num_heads: int = 32, head_dim: int = 128
) -> Iterator[Row]:
    """Yield a row for each path and direction of the rank with most to do, causal, bfloat16, one sequence.

    Attention and its exchange alone: rows are picked out for others by plain copies, which are not counted. The rows
    travel while own tiles are computed. Dense attention is ring attention, whose blocks of keys and values of all
    other ranks travel while it computes; it is shared out evenly, which causal rings are not without care.
    """
    layouts = [slice_layout(tokens, ranks, rank, pattern, num_heads) for rank in range(ranks)]
    layout = max(layouts, key=lambda layout: layout.tiles.pairs)
    received = 2 * 2 * head_dim * max(sum(layout.received_counts), sum(layout.sent_counts))
    dense = 4 * head_dim * num_heads * (tokens * (tokens + 1) // 2) / ranks
    flops = 4 * head_dim * layout.tiles.pairs
    for index, (way, factor) in enumerate((("forward", 1.0), ("backward", 2.5))):
        rate = device.dense_flops[index]
        dense_travel = (1 + 2 * index) * 2 * 2 * head_dim * num_heads * tokens * (ranks - 1) // ranks
        dense_seconds = max(factor * dense / rate, dense_travel / device.link_bytes_per_second)
        for path in ("tiles", "fused"):
            share = 1.0 if path == "tiles" else device.fused_share
            own, halo = (
                factor * 4 * head_dim * sum(tile.pairs for tile in tiles) / (rate * share)
                + head_dim * _slice_bytes(tiles, path, way) / device.bytes_per_second
                for tiles in (layout.tiles.own, layout.tiles.halo)
            )
            rows = num_heads * tokens // ranks
            moved = head_dim * sum(_slice_bytes(tiles, path, way) for tiles in (layout.tiles.own, layout.tiles.halo))
            rest = head_dim * _rest_bytes(layout, path, way, rows)
            moved += rest
            launches = slice_launches(layout, path, way, tokens // ranks, num_heads)
            travel = received / device.link_bytes_per_second
            total = max(own, travel) + halo + rest / device.bytes_per_second
            total = max(total, launches * device.launch_seconds)
            yield {
                "case": "slice",
                "tokens": tokens,
                "head_dim": head_dim,
                "ranks": ranks,
                "way": way,
                "path": path,
                "flops": factor * flops,
                "bytes": moved,
                "exchanged": received,
                "launches": launches,
                "model_s": total,
                "dense_model_s": dense_seconds,
                "flop_ratio": dense / flops,
                "model_speedup": dense_seconds / total,
                "of_ideal": dense_seconds / total / (dense / flops),
            }


def slice_layout(tokens: int, ranks: int, rank: int, pattern: DilationPattern, num_heads: int) -> SliceLayout:
    """Return what a rank computes and exchanges, causal, one sequence in even slices, as the op lays it out."""
    edges = tuple(tokens * index // ranks for index in range(ranks + 1))
    return lay_out_slice(
        pattern, runs=(Run(0, 1, 0, tokens),), edges=edges, rank=rank, batch_size=1, num_heads=num_heads,
        num_kv_heads=num_heads, is_causal=True, device=torch.device("cpu"),
    )  # fmt: skip


def slice_launches(layout: SliceLayout, path: str, way: str, tokens: int, num_heads: int) -> int:
    """Count the launches of a rank's attention, casts among them, without rooms that are set to zero.

    Backward, gradients of the halo's rows are added tile by tile on the tiled path, and in another launch on the fused
    one, as is the halo's share of dq.
    """
    own, halo = layout.tiles.own, layout.tiles.halo
    if path == "fused":
        return 2 + 1 if way == "forward" else 4 + 1 + 3  # out, or dq, dk and dv, are cast
    count = sum(kernel_launches(way, tiles, tokens, num_heads, is_planned=False) for tiles in (own, halo))
    if way == "forward":
        return count + 2
    return count + 2 * kernel_launches("forward", halo, tokens, num_heads) + 2 * 3 + 2


def _slice_bytes(tiles: tuple[Tile, ...], path: str, way: str) -> int:
    """Return the bytes that one channel of the tiles' kernels moves, as `cost_model` counts them."""
    if path == "tiles":
        return kernel_bytes(way, tiles, is_planned=False)
    total = 0
    for tile in tiles:
        queries, keys, _ = rows_of(tile)
        total += (
            4 * keys + (2 + 8) * queries if way == "forward" else 8 * keys + 12 * queries + 8 * (queries + 2 * keys)
        )
    return total


def _rest_bytes(layout: SliceLayout, path: str, way: str, rows: int) -> int:
    """Return the bytes that one channel moves beside the kernels: parts put together, halo's gradients, casts."""
    own, halo = layout.tiles.own, layout.tiles.halo
    if path == "fused":
        return (1 if way == "forward" else 3) * (4 + 2) * rows
    if way == "forward":
        return combined_bytes(way, (*own, *halo), rows)
    # dk and dv are written in float32, since rows come home to them, and then cast.
    total = combined_bytes(way, own, rows) + sum(2 * rows_of(tile)[0] for tile in halo) + 2 * (2 + 4 + 2) * rows
    return total + sum(2 * (2 + 4 + 4) * rows_of(tile)[2] for tile in halo)


def token_costs(
    device: Device, tokens: int, pattern: DilationPattern, *, num_heads: int = 32, head_dim: int = 128
) -> Iterator[Row]:
    """Yield a row for each path of one decoded token, bfloat16, one sequence, the last of `tokens`.

    Dense attention reads all keys and values in two launches, a program's share and what adds the shares up. The ideal
    is the ratio of the rows that are read. Only the fused path can be replayed from a CUDA graph.
    """
    row = 2 * 2 * head_dim * num_heads
    own = 3 * 2 * head_dim * num_heads  # q, out, and the new row, about
    rows = token_pairs(tokens, pattern, num_heads) / num_heads
    dense_seconds = max(row * tokens / device.bytes_per_second, 2 * device.launch_seconds)
    launches = {"tiles": token_launches(tokens, pattern, num_heads), "fused": 1}
    for path, count in launches.items():
        seconds = max((row * rows + own) / device.bytes_per_second, count * device.launch_seconds)
        yield {
            "case": "token",
            "tokens": tokens,
            "head_dim": head_dim,
            "way": "one token",
            "path": path,
            "flops": 4 * head_dim * num_heads * rows,
            "bytes": row * rows + own,
            "launches": count,
            "model_s": seconds,
            "dense_model_s": dense_seconds,
            "flop_ratio": tokens / rows,
            "model_speedup": dense_seconds / seconds,
            "of_ideal": dense_seconds / seconds / (tokens / rows),
        }


def token_pairs(tokens: int, pattern: DilationPattern, num_heads: int) -> int:
    """Count the keys that all heads of the last of `tokens` see, a key in several branches several times."""
    position, pairs = tokens - 1, 0
    for branch, head in itertools.product(pattern.all_branches, range(num_heads)):
        inside, offset = position % branch.length, pattern.offset(branch.rate, head, num_heads)
        if branch.is_dense or inside % branch.rate == offset:
            pairs += branch.kept_rows(inside + 1, offset)
    return pairs


def token_launches(tokens: int, pattern: DilationPattern, num_heads: int) -> int:
    """Count the launches of the tiled path for the last of `tokens`, as a state runs it, each merge one of Triton's."""
    state = StreamState(
        pattern, batch_size=1, num_kv_heads=num_heads, head_dim=8, dtype=torch.bfloat16, device=torch.device("cpu"),
        start=tokens - 1,
    )  # fmt: skip
    state.first = [0]
    token = torch.zeros(1, num_heads, 1, 8, dtype=torch.bfloat16)
    with _Launches("cpu") as there:
        state.attend(token, token, token, scale=None)
    counts: dict[str, int] = dict(there.counts)
    return sum(counts.values()) - 6 * counts.get("aten::lerp_.Tensor", 0)  # plain PyTorch merges in seven


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Counts operators that compute on a device, or bring something there: neither views nor what only makes room."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._device_type = device_type

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function._schema.returns
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in results)
        made = function(*args, **(kwargs or {}))
        is_there = any(x.device.type == self._device_type for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        if is_there and not is_view and not any(name in function.name() for name in ("empty", "promote_types")):
            self.counts[function.name()] += 1
        return made
