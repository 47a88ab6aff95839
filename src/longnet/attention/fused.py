"""Which calls are computed as one: those that ask for it, and of `backend="auto"` those that it is faster for.

What a pass costs has been measured on an H100 (benchmarks/results/h100.jsonl): one sequence, as many queries as keys,
64 and 128 channels in 16 bits; of packed documents it is reckoned from that. cuDNN computes a tile about twice as fast
as the fused kernels do; each of its calls costs the host what many FLOPs cost the GPU. So short sequences and many
documents are computed as one, and long sequences, and what is unlike the calls measured, tile by tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.blocks import architecture_of, padded
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, Tile, Whole, plan, runs_of
from longnet.attention.tiles import attend_tiles, differentiate_tiles, empty_like, empty_lse


class Pace(NamedTuple):
    """What a pass was measured to cost.

    Attributes:
        flops: of the forward pass that the fused kernels get through in a second of this pass.
        start_seconds: of the host, for a fused call.
        tile_seconds: of the host, for a tile. What the GPU takes for tiles does not decide: it is always less than what
            it takes for the call as one.
    """

    flops: float
    start_seconds: float
    tile_seconds: float


_MEASURED = {  # by architecture and channels: forward, backward
    (90, 64): (Pace(2e14, 3e-4, 2.5e-4), Pace(3e13, 8e-4, 5e-4)),
    (90, 128): (Pace(2e14, 3e-4, 2.5e-4), Pace(5e13, 8e-4, 5e-4)),
}


def is_fused(
    backend: str,
    q: Tensor,
    k: Tensor,
    whole: Callable[[], Whole],
    tiles: Callable[[], Iterable[Tile]],
    *,
    backward: bool,
) -> bool:
    """Say whether a call is computed as one.

    Args:
        backend: as in `dilated_attention`, but for the oracle.
        q: (B, H, Tq, D).
        k: (B, G, T, D).
        whole: gives what attends to what.
        tiles: gives those that the call would be computed by.
        backward: its backward pass, which may go another way than the forward.

    Raises:
        ValueError: the backend computes calls as one, and cannot run on such tensors; the message says why.
    """
    if backend != "auto":
        return dispatch.is_fused(backend, q.device, q.dtype, q.shape[3])
    channels = padded(q.shape[3])
    paces = _MEASURED.get((architecture_of(q.device), channels))
    if paces is None or q.dtype == torch.float32 or q.shape[2] != k.shape[2]:
        return False
    if (q.is_cuda and torch.cuda.is_current_stream_capturing()) or launch.refusal(q.device, q.dtype, q.shape[3]):
        return False
    pattern, runs, is_causal, *_ = whole()
    pace, (fewest, pairs) = paces[backward], _sizes(pattern, runs, is_causal)
    seconds = pace.start_seconds + 4 * channels * q.shape[1] * pairs / pace.flops
    # Of a thousand documents the plan of tiles takes a second to make, and is not needed.
    if fewest * pace.tile_seconds <= seconds and sum(1 for _ in tiles()) * pace.tile_seconds <= seconds:
        return False
    return _proves_itself(q.device, q.dtype, q.shape[3])


@functools.lru_cache(maxsize=64)
def _sizes(pattern: DilationPattern, runs: tuple[Run, ...], is_causal: bool) -> tuple[int, int]:
    """Return how many tiles there are at least, and how many (query, key) pairs a head has at most."""
    tiles = pairs = 0
    for run in runs:
        tokens = run.stop - run.start
        for branch in pattern.all_branches:
            tiles += branch.rate <= tokens  # all heads keep a row, then
            whole, rest = divmod(tokens, branch.length)
            for segments, positions in ((whole, branch.length), (1, rest)):
                pairs += run.rows * segments * branch.pairs(positions, 0, is_causal=is_causal)
    return tiles, pairs


@functools.lru_cache(maxsize=64)
def _proves_itself(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Say whether the fused kernels run on a device, and agree there with the tiles."""
    return dispatch.proves_itself(
        device, lambda device: _disagreement(device, dtype, head_dim), tolerance=2e-2,
        doing=f"computing attention as one in {dtype}, {head_dim} channels", otherwise="it is computed tile by tile",
    )  # fmt: skip


def _disagreement(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Return the largest relative distance (Frobenius) of the two ways: out, log-sum-exp, gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads, scale = 400, 4, 2, head_dim**-0.5
    q, dout, k, v = (
        torch.randn(1, tokens, count, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for count in (heads, heads, kv_heads, kv_heads)
    )
    runs, kernels = runs_of(None, 1, tokens), dispatch.choose("auto", device, dtype, head_dim)
    errors = []
    for queries in ("kept", "all"):
        pattern = DilationPattern((64, 192, 256), (1, 2, 3), queries=queries)
        tiles, _ = plan(
            pattern, runs=runs, batch_size=1, q_tokens=tokens, k_tokens=tokens, num_heads=heads,
            num_kv_heads=kv_heads, is_causal=True,
        )  # fmt: skip
        out, lse = attend_tiles(kernels, tiles, q, k, v, empty_like(q), empty_lse(q), scale=scale)
        out = out.to(dtype)
        room = empty_like(q), empty_like(k), empty_like(v)
        want = out, lse, *differentiate_tiles(kernels, tiles, dout, q, k, v, out, lse, room, scale=scale)
        whole = Whole(pattern, runs, True, True)
        got = (
            *launch.attend(q, k, v, None, whole, scale=scale),
            *launch.attend_backward(dout, q, k, v, out, lse, whole, scale=scale),
        )
        errors += [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)]
    return max(errors)
