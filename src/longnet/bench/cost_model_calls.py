"""The model of costs for what is not a whole sequence: one rank's slice of it, with a halo, and one decoded token."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Tile
from longnet.attention.slices import SliceLayout, lay_out_slice
from longnet.attention.streaming import StreamState
from longnet.attention.views import blocks
from longnet.bench.cost_model import Device, Row


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
            seconds, moved, launches = [], 0.0, 0
            for tiles in (layout.tiles.own, layout.tiles.halo):
                bytes_ = head_dim * sum(_bytes_of(tile, path, way) for tile in tiles)
                computed = factor * 4 * head_dim * sum(tile.pairs for tile in tiles)
                seconds.append(computed / (rate * share) + bytes_ / device.bytes_per_second)
                moved += bytes_
                if path == "tiles":
                    launches += slice_launches(tiles, tokens // ranks, num_heads, way)
                elif tiles:
                    launches += index + 1
            casts = (1, 3)[index] * (4 + 2) * num_heads * head_dim * tokens // ranks
            launches += (1, 3)[index]
            moved += casts
            travel = received / device.link_bytes_per_second
            total = max(seconds[0], travel) + seconds[1] + casts / device.bytes_per_second
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


def slice_launches(tiles: tuple[Tile, ...], tokens: int, num_heads: int, way: str) -> int:
    """Count the launches of tiles that are merged one by one, each by one launch of Triton's; casts are not among them.

    Backward, a call's log-sum-exp is copied, and the three results are added up.
    """
    x = torch.empty(1, tokens, num_heads, 64, device="meta").transpose(1, 2)
    count = 0
    for tile in tiles:
        calls = blocks(tile, (x,), (x,), 2**31 - 1, groups_heads=True)
        count += len(calls) * (5 if way == "backward" else 3 if tile.is_first else 2)
    return count


def _bytes_of(tile: Tile, path: str, way: str) -> int:
    """Return the bytes that one channel of a tile moves, as `cost_model` counts them."""
    repeats = math.prod(axis.size for axis in tile.axes)
    queries, keys = tile.q_rows * repeats, tile.k_rows * repeats
    summing = 8 if path == "fused" else 2 + (2 + 4 if tile.is_first else 2 + 4 + 4)
    if way == "forward":
        return 4 * keys + (2 + summing) * queries
    return 2 * (4 * keys + 3 * 2 * queries) + summing * (queries + 2 * keys)


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
    for (length, rate), head in itertools.product(pattern.branches, range(num_heads)):
        inside, offset = position % length, pattern.offset(rate, head, num_heads)
        if pattern.queries == "all" or inside % rate == offset:
            pairs += max(0, (inside - offset) // rate + 1)
    return pairs


def token_launches(tokens: int, pattern: DilationPattern, num_heads: int) -> int:
    """Count the launches of the tiled path for the last of `tokens`, as a state runs it, each merge one of Triton's."""
    state = StreamState(
        pattern, batch_size=1, num_kv_heads=num_heads, head_dim=8, dtype=torch.bfloat16, device=torch.device("cpu"),
        start=tokens - 1,
    )  # fmt: skip
    state.first = [0]
    token = torch.zeros(1, num_heads, 1, 8, dtype=torch.bfloat16)
    with _Launches() as there:
        state.attend(token, token, token, scale=None)
    counts: dict[str, int] = dict(there.counts)
    return sum(counts.values()) - 6 * counts.get("aten::lerp_.Tensor", 0)  # plain PyTorch merges in seven


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Counts operators that compute: neither views nor what only makes room."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function._schema.returns
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in results)
        if not is_view and not any(name in function.name() for name in ("empty", "promote_types")):
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))
