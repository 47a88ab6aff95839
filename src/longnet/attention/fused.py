"""Which calls are computed as one: those that ask for it, and of `backend="auto"` those that it is faster for.

Where that is has been measured on an H100, in 16 bits (benchmarks/results/h100.jsonl), and holds there. cuDNN
computes a tile about twice as fast as the fused kernels do; each of its calls costs the host what many FLOPs cost the
GPU. So short sequences and many documents are computed as one, and long sequences tile by tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.blocks import architecture_of
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Tile, Whole, plan, runs_of
from longnet.attention.tiles import attend_tiles, differentiate_tiles, empty_like, empty_lse


class Pace(NamedTuple):
    """What a pass was measured to cost.

    Attributes:
        fused_flops: FLOPs of the forward pass that the fused kernels get through in a second of this pass.
        tiled_flops: the same, tile by tile.
        call_seconds: of the host, for a tile.
        start_seconds: of the host, for a fused call.
    """

    fused_flops: float
    tiled_flops: float
    call_seconds: float
    start_seconds: float


_MEASURED = {90: (Pace(2.0e14, 3.8e14, 2.5e-4, 3e-4), Pace(5.0e13, 1.2e14, 5e-4, 8e-4))}  # forward, backward


def is_fused(backend: str, q: Tensor, tiles: Callable[[], Iterable[Tile]], *, backward: bool) -> bool:
    """Say whether a call is computed as one.

    Args:
        backend: as in `dilated_attention`, but for the oracle.
        q: (B, H, Tq, D).
        tiles: gives those that the call would be computed by.
        backward: its backward pass, which may go another way than the forward.

    Raises:
        ValueError: the backend computes calls as one, and cannot run on such tensors; the message says why.
    """
    if backend != "auto":
        return dispatch.is_fused(backend, q.device, q.dtype, q.shape[3])
    paces = _MEASURED.get(architecture_of(q.device))
    if paces is None or q.dtype == torch.float32 or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if launch.refusal(q.device, q.dtype, q.shape[3]) is not None:
        return False
    pace, planned = paces[backward], tuple(tiles())
    flops = 4 * q.shape[3] * sum(tile.pairs for tile in planned)
    tiled = max(len(planned) * pace.call_seconds, flops / pace.tiled_flops)
    return pace.start_seconds + flops / pace.fused_flops < tiled and _proves_itself(q.device, q.dtype, q.shape[3])


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
    runs, kernels = runs_of(None, 1, tokens), dispatch.choose("sdpa", device, dtype, head_dim)
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
