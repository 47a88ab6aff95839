"""`longnet bench attention --model h100`: what each path should cost on a GPU, by FLOPs, bytes and launches.

A model, not a measurement: seconds are FLOPs over a rate, plus bytes over a bandwidth, or the launches if the host
needs longer. It says what is worth building, and what a measured figure has to be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longnet.attention.backends.triton import launch
from longnet.attention.pattern import DilationPattern, kept_rows
from longnet.attention.plan import plan, runs_of
from longnet.attention.tiles import has_few_parts
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
    calls, thinned = _calls(tokens, pattern, num_heads, head_dim)
    for index, (way, factor) in enumerate((("forward", 1.0), ("backward", 2.5))):
        rate = device.dense_flops[index]
        dense_seconds = factor * dense / rate
        for path in ("tiles", "fused"):
            waste = _waste(device, path, tokens, pattern, num_heads, head_dim)
            moved = num_heads * head_dim * _bytes_per_channel(path, way, tokens, pattern)
            # What puts parts together reads addresses that are sent; cuDNN's backward reads copies of lse, out, dout.
            at_once = (calls + 2, 2 * (calls + thinned) + 6) if has_few_parts(pattern) else (2 * calls, 6 * calls)
            launches = {"tiles": at_once[index], "fused": index + 1}[path]
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


def _calls(tokens: int, pattern: DilationPattern, num_heads: int, head_dim: int) -> tuple[int, int]:
    """Count the kernel calls of the tiled path, and those of thinned queries, from the plan that it follows."""
    x = torch.empty(1, tokens, num_heads, head_dim, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    tiles = plan(
        pattern, runs=runs_of(None, 1, tokens), batch_size=1, q_tokens=tokens, k_tokens=tokens,
        num_heads=num_heads, num_kv_heads=num_heads, is_causal=True,
    ).tiles  # fmt: skip
    counts = [(tile.q_rate, len(blocks(tile, (x,), (x,), 2**31 - 1, groups_heads=True))) for tile in tiles]
    return sum(count for _, count in counts), sum(count for rate, count in counts if rate > 1)


def _waste(device: Device, path: str, tokens: int, pattern: DilationPattern, num_heads: int, head_dim: int) -> float:
    """Return the pairs that are computed over those that count: whole blocks on the diagonal, rows left empty."""
    cut = launch.forward_blocks(torch.bfloat16, head_dim)
    length = launch.block_length(max(pattern.dilation_rates), cut.rows, tokens * num_heads)
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


def combined_bytes(way: str, tokens: int, pattern: DilationPattern) -> float:
    """Return the bytes that one channel of one head moves as parts are put together: all read, one sum written."""
    rows = sum(tokens / rate for _, rate in pattern.branches)
    return {"forward": 1, "backward": 3}[way] * 2 * (rows + tokens)


def _bytes_per_channel(path: str, way: str, tokens: int, pattern: DilationPattern) -> float:
    """Return the bytes that one channel of one head moves: 16-bit tensors, sums in float32 between branches.

    Tiles of a pattern that thins its queries leave no sums, but parts, which are put together at once.
    """
    is_combined = path == "tiles" and has_few_parts(pattern)
    total = combined_bytes(way, tokens, pattern) if is_combined else {"forward": 6, "backward": 18}[way] * tokens
    for index, (_, rate) in enumerate(sorted(pattern.branches, key=lambda branch: branch[1])):
        keys, queries = tokens / rate, tokens / (1 if pattern.queries == "all" else rate)
        merging = (2 + 4) if index == 0 else (2 + 4 + 4)  # the first is written, later ones are merged
        summing = 8 if path == "fused" else 2 if is_combined else 2 + merging
        if way == "forward":
            total += 4 * keys + (2 + summing) * queries
        else:
            kernel = 2 * (4 * keys + 3 * 2 * queries)  # q, out, dout and k, v read, by each of its two passes
            if path == "tiles" and rate > 1:
                kernel += 2 * (2 + 2) * queries  # out and dout, copied: cuDNN wants the layout that it gave
            total += kernel + summing * (queries + 2 * keys)
    return total
