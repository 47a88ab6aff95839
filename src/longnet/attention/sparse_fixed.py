"""sparse_fixed_attention(): the Sparse Transformer's fixed pattern, the baseline of the LongNet paper."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Axis, Run, Tile, plan, runs_of
from longnet.attention.registration import Layout, Part, cast_under_autocast, register


@dataclass(frozen=True, slots=True)
class SparseFixedPattern:
    """Own block, and the last `summary` positions of every earlier stride (arXiv:1904.10509 §4.3, "fixed").

    Query i sees key j ≤ i iff `j // block == i // block` or `j % stride >= stride - summary`: the union of the two
    heads of that paper, each key once. With block = stride = 4 and summary = 1, a row per query:

        1 . . . . . . . . . . .
        1 1 . . . . . . . . . .
        1 1 1 . . . . . . . . .
        1 1 1 1 . . . . . . . .
        . . . 1 1 . . . . . . .
        . . . 1 1 1 . . . . . .
        . . . 1 1 1 1 . . . . .
        . . . 1 1 1 1 1 . . . .
        . . . 1 . . . 1 1 . . .

    Args:
        block: tokens of a block, l in that paper where it is the stride too; ≥ 1.
        summary: c, 1 … stride.
        stride: distance of the summaries, `block` when None.

    Raises:
        ValueError: a number out of range.
        TypeError: one that is no int.
    """

    block: int
    summary: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.stride is None:
            object.__setattr__(self, "stride", self.block)
        for name in ("block", "summary", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.summary > self.step:
            raise ValueError(f"summary must be at most the stride, {self.step}, got {self.summary}")

    @classmethod
    def matching(cls, pattern: DilationPattern, *, tokens: int, block: int = 2048, num_kv_heads: int = 1) -> Self:
        """Return the pattern whose causal FLOPs at a length come nearest to those of dilated attention.

        The cost of the summaries is linear in their size, so c = (cost of `pattern` − cost of the blocks) / cost of
        c = 1, rounded. The baseline of arXiv:2307.02486 §4.1: block 2048, FLOPs matched.

        Args:
            pattern: what to match.
            tokens: at this length.
            block: of the new pattern, its stride too.
            num_kv_heads: G, which decides the offsets of `pattern`.

        Raises:
            ValueError: c would not lie in 1 … block: the blocks alone cost more, or attending to all costs less.
        """
        cost = {"tokens": tokens, "num_heads": num_kv_heads, "head_dim": 1}
        wanted = pattern.flops(**cost, is_causal=True)
        one, local = cls(block, 1).flops(**cost), DilationPattern((block,), (1,)).flops(**cost, is_causal=True)
        summary = round((wanted - local) / (one - local)) if one > local else 0
        if not 1 <= summary <= block:
            raise ValueError(
                f"no summary of 1 … {block} positions costs as much as {pattern} at {tokens} tokens: that is {wanted} "
                f"FLOPs a head dim, the blocks alone {local}, each summary position {one - local}; choose another block"
            )
        return cls(block, summary)

    @property
    def step(self) -> int:
        """The distance of the summaries."""
        return self.block if self.stride is None else self.stride

    def summaries_before(self, position: int) -> int:
        """Count the summary positions below `position`."""
        whole, rest = divmod(position, self.step)
        return whole * self.summary + max(0, rest - (self.step - self.summary))

    def flops(self, *, tokens: int, num_heads: int, head_dim: int) -> int:
        """Count the floating-point operations of one causal forward pass, as `DilationPattern.flops` does.

        Raises:
            ValueError: tokens below 0.
        """
        if tokens < 0:
            raise ValueError(f"flops needs tokens ≥ 0, got {tokens}")
        pairs = 0
        for start in range(0, tokens, self.block):
            rows = min(self.block, tokens - start)
            pairs += rows * (rows + 1) // 2 + rows * self.summaries_before(start)
        return 4 * head_dim * num_heads * pairs


def sparse_fixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparseFixedPattern,
    *,
    bounds: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> Tensor:
    """Attend causally along the fixed pattern of the Sparse Transformer; gradients are exact.

    No mask is formed: memory is O(T), the summaries' keys being copied once.

    Args:
        q: (B, H, Tq, D), float64, float32, bfloat16 or float16, any strides. With Tq < T its rows are the last ones.
        k: (B, G, T, D) with H a multiple of G; query head h reads key/value head h // (H / G).
        v: (B, G, T, D).
        pattern: block, stride and summary.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of each run of tokens that attend to one another,
            blocks counted from its start; None where every row is one run. Output is 0 outside.
        scale: factor on q·k, D ** -0.5 when None.
        sinks: (H,) or (B, H, Tq), as in `dilated_attention`.
        backend: as in `dilated_attention`, but for "reference".

    Returns:
        (B, H, Tq, D) like q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a backend that cannot run.
        TypeError: `pattern` is no SparseFixedPattern.
    """
    if not isinstance(pattern, SparseFixedPattern):
        raise TypeError(f"pattern must be a SparseFixedPattern, got {type(pattern).__name__}")
    q, k, v = cast_under_autocast(q, k, v)
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"q must be (B, H, Tq, D), k and v (B, G, T, D), got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"H must be a multiple of G, Tq at most T, and the dtypes one, got {shapes}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if backend == "reference":
        raise ValueError('sparse_fixed attention has no backend="reference": its backends are "auto" and "sdpa"')
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return _op(q, k, v, bounds, sinks, pattern.block, pattern.step, pattern.summary, scale, backend)[0]


def _lay_out(q: Tensor, k: Tensor, bounds: Tensor | None, block: int, stride: int, summary: int) -> Layout:
    runs = runs_of(bounds, k.shape[0], k.shape[2])
    own, is_complete = plan(
        DilationPattern((block,), (1,)),
        runs=runs,
        batch_size=q.shape[0],
        q_tokens=q.shape[2],
        k_tokens=k.shape[2],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        is_causal=True,
    )
    return Layout([Part(own), *_summaries(q, k, runs, SparseFixedPattern(block, summary, stride))], is_complete)


def _summaries(q: Tensor, k: Tensor, runs: tuple[Run, ...], pattern: SparseFixedPattern) -> Iterator[Part]:
    """Yield a part for each run: its queries against the summaries before their block."""
    num_kv_heads, skipped = k.shape[1], k.shape[2] - q.shape[2]
    group = q.shape[1] // num_kv_heads
    for run in runs:
        length = run.stop - run.start
        q_from = max(0, skipped - run.start)
        tiles = []
        for start in range(q_from // pattern.block * pattern.block, length, pattern.block):
            summaries = pattern.summaries_before(start)
            first, stop = max(start, q_from), min(start + pattern.block, length)
            if summaries == 0 or first >= stop:
                continue
            tiles.append(
                Tile(
                    row=0,
                    q_head=0,
                    kv_head=0,
                    q_start=run.start + first - skipped,
                    q_rows=stop - first,
                    q_rate=1,
                    k_start=0,
                    k_rows=summaries,
                    k_rate=1,
                    is_causal=False,
                    is_first=False,
                    axes=(
                        Axis(run.rows, row=1),
                        Axis(num_kv_heads, q_head=group, kv_head=1),
                        Axis(group, q_head=1),
                    ),
                )
            )
        if tiles:
            keys = functools.partial(_summary_positions, run, pattern)
            yield Part(tuple(tiles), rows=slice(run.row, run.row + run.rows), keys=keys)


def _summary_positions(run: Run, pattern: SparseFixedPattern, device: torch.device) -> Tensor:
    # Counted, not searched for: a boolean index would wait for the device.
    end = (run.stop - run.start - 1) // pattern.block * pattern.block
    steps = torch.arange(0, end, pattern.step, device=device)
    positions = steps[:, None] + torch.arange(pattern.step - pattern.summary, pattern.step, device=device)
    return run.start + positions.flatten()[: pattern.summaries_before(end)]


_op = register("sparse_fixed_attention", "SymInt block, SymInt stride, SymInt summary", _lay_out)
