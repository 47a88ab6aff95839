"""`longnet bench attention --model h100`: what each path should cost on a GPU, by FLOPs, bytes and launches.

A model, not a measurement: seconds are FLOPs over a rate, plus bytes over a bandwidth, or the launches if the host
needs longer. It says what is worth building, and what a measured figure has to be compared with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longnet.attention.backends.triton.blocks import block_length, forward_blocks
from longnet.attention.branches import kept_rows
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Tile, plan, runs_of
from longnet.attention.views import blocks

Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What the model takes a GPU to reach: assumptions, from data sheets and others' published measurements.

    Attributes:
        dense_flops: useful FLOPs a second of the best dense kernel in bfloat16, forward and backward, long causal rows.
        fused_share: of that, what a Triton kernel of the FlashAttention kind reaches.
        bytes_per_second: that a streaming kernel reaches.
        launch_seconds: host time of a launch, Python included.
        link_bytes_per_second: that a rank sends and receives at a time, within a node.
        diagonal: rows and keys of the blocks that kernels compute whole on the diagonal.
    """

    dense_flops: tuple[float, float]
    fused_share: float
    bytes_per_second: float
    launch_seconds: float
    link_bytes_per_second: float
    diagonal: int = 128


DEVICES = {
    "h100": Device((600e12, 480e12), 0.65, 2.8e12, 8e-6, 4e11),
    "a100": Device((190e12, 160e12), 0.9, 1.7e12, 8e-6, 2.5e11),
}


def costs(
    device: Device, tokens: int, pattern: DilationPattern, *, num_heads: int = 32, head_dim: int = 128
) -> Iterator[Row]:
    """Yield a row for each path and direction, causal, bfloat16, one sequence: the tiled path and the fused kernel.

    `of_ideal` is the share of the ideal speed-up over the dense kernel, the ratio of their FLOPs, that a path reaches.
    """
    dense = 4 * head_dim * num_heads * (tokens * (tokens + 1) // 2)
    flops = pattern.flops(tokens=tokens, num_heads=num_heads, head_dim=head_dim, is_causal=True)
    tiles = plan(
        pattern, runs=runs_of(None, 1, tokens), batch_size=1, q_tokens=tokens, k_tokens=tokens,
        num_heads=num_heads, num_kv_heads=num_heads, is_causal=True,
    ).tiles  # fmt: skip
    for index, (way, factor) in enumerate((("forward", 1.0), ("backward", 2.5))):
        rate = device.dense_flops[index]
        dense_seconds = factor * dense / rate
        for path in ("tiles", "fused"):
            waste = _waste(device, path, tokens, pattern, num_heads, head_dim)
            if path == "tiles":
                moved: float = head_dim * (kernel_bytes(way, tiles) + combined_bytes(way, tiles, tokens * num_heads))
                # What puts parts together reads addresses, which are sent before.
                launches = kernel_launches(way, tiles, tokens, num_heads) + 2 * (1 + 2 * index)
            else:
                moved = num_heads * head_dim * _fused_bytes(way, tokens, pattern)
                launches = index + 1
            share = 1.0 if path == "tiles" else device.fused_share
            computing = factor * flops * waste / (rate * share)
            seconds = max(computing + moved / device.bytes_per_second, launches * device.launch_seconds)
            yield {
                "case": "model",
                "tokens": tokens,
                "head_dim": head_dim,
                "way": way,
                "path": path,
                "flops": factor * flops,
                "computed_over_useful": waste,
                "bytes": moved,
                "launches": launches,
                "model_s": seconds,
                "dense_model_s": dense_seconds,
                "flop_ratio": dense / flops,
                "model_speedup": dense_seconds / seconds,
                "of_ideal": dense_seconds / seconds / (dense / flops),
            }


def kernel_launches(way: str, tiles: Iterable[Tile], tokens: int, num_heads: int, *, is_planned: bool = True) -> int:
    """Count the launches of tiles, from the views that they are cut into, without what puts their parts together.

    Backward, a kernel reads a copy of the log-sum-exp, and gradients of keys that queries of several phases or heads
    share are added up. With `is_planned`, cuDNN takes whole segments, and copies out and dout of rows that are thinned.
    """
    x = torch.empty(1, tokens, num_heads, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    count = 0
    for tile in tiles:
        calls = blocks(tile, (x,), (x,), 2**31 - 1, groups_heads=True)
        count += len(calls)
        if way == "forward":
            continue
        rows = [call.q(x) for call in calls]
        if is_planned and tile.is_whole and min(tile.q_rows, tile.k_rows) > 1:
            count += 2 * sum(view.stride() != torch.empty_like(view).stride() for view in rows)
        at = Counter(call.kv_once(x).storage_offset() for call in calls)  # calls that share their keys: stack, sum
        count += len(calls) + 2 * sum(bool(call.shared) for call in calls) + 2 * 2 * sum(n > 1 for n in at.values())
    return count


def _waste(device: Device, path: str, tokens: int, pattern: DilationPattern, num_heads: int, head_dim: int) -> float:
    """Return the pairs that are computed over those that count: whole blocks on the diagonal, rows left empty."""
    cut = forward_blocks(torch.bfloat16, head_dim, 0)
    length = block_length(max(pattern.dilation_rates), cut.rows, tokens * num_heads)
    computed = useful = 0.0
    for segment, rate in pattern.branches:
        keys = kept_rows(min(segment, tokens), rate, 0)
        q_rate = 1 if pattern.queries == "all" else rate
        queries = tokens / q_rate
        useful += queries * (keys + 1) / 2
        diagonal = device.diagonal if path == "tiles" else cut.keys + cut.rows * q_rate / rate
        rows = min(length, segment) / q_rate
        empty = 1.0 if path == "tiles" else -(-rows // cut.rows) * cut.rows / rows
        computed += queries * (keys + diagonal) / 2 * empty
    return computed / useful


def kernel_bytes(way: str, tiles: Iterable[Tile], *, is_planned: bool = True) -> int:
    """Return the bytes that one channel of the kernels of tiles moves, in 16 bits, parts written included."""
    total = 0
    for tile in tiles:
        queries, keys, once = rows_of(tile)
        if way == "forward":
            total += 4 * once + (2 + 2) * queries
            continue
        total += 2 * (4 * once + 3 * 2 * queries)  # q, out, dout and k, v read, by each of its two passes
        total += 2 * (2 + 2) * queries if is_planned and tile.q_rate > 1 else 0  # out and dout, copied for cuDNN
        total += 2 * (queries + 2 * keys)
        total += 2 * 2 * (keys + once) if keys > once else 0  # added up over the queries that share a key
    return total


def combined_bytes(way: str, tiles: Iterable[Tile], rows: int) -> int:
    """Return the bytes that one channel moves as parts of so many rows are put together: all read, one sum written."""
    counts = [rows_of(tile) for tile in tiles]
    total = 2 * (sum(queries for queries, _, _ in counts) + rows)
    return total if way == "forward" else total + 2 * 2 * (sum(once for _, _, once in counts) + rows)


def rows_of(tile: Tile) -> tuple[int, int, int]:
    """Return a tile's rows of queries and of keys, over all repetitions, and those of keys that are not the same."""
    repeats = math.prod(axis.size for axis in tile.axes)
    apart = math.prod(axis.size for axis in tile.axes if axis.row or axis.kv_position or axis.kv_head)
    return tile.q_rows * repeats, tile.k_rows * repeats, tile.k_rows * apart


def _fused_bytes(way: str, tokens: int, pattern: DilationPattern) -> float:
    """Return the bytes that one channel of one head moves: 16-bit tensors, sums in float32 between branches."""
    total = {"forward": 6.0, "backward": 18.0}[way] * tokens
    for _, rate in pattern.branches:
        keys, queries = tokens / rate, tokens / (1 if pattern.queries == "all" else rate)
        if way == "forward":
            total += 4 * keys + (2 + 8) * queries
        else:
            total += 2 * (4 * keys + 3 * 2 * queries) + 8 * (queries + 2 * keys)
    return total
