"""sparse_fixed_attention(): the Sparse Transformer's fixed pattern, the baseline of the LongNet paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longnet.attention.backends import dispatch
from longnet.attention.pattern import DilationPattern
from longnet.attention.tiles import attend_tiles, differentiate_tiles, empty_like, empty_lse, rows_dense
from longnet.attention.views import Axis, Run, Tile, plan, runs_of


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
        backend: as in `dilated_attention`, but for "reference".

    Returns:
        (B, H, Tq, D) like q.

    Raises:
        ValueError: shapes or dtypes that do not fit; a backend that cannot run.
        TypeError: `pattern` is no SparseFixedPattern.
    """
    if not isinstance(pattern, SparseFixedPattern):
        raise TypeError(f"pattern must be a SparseFixedPattern, got {type(pattern).__name__}")
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"q must be (B, H, Tq, D), k and v (B, G, T, D), got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"H must be a multiple of G, Tq at most T, and the dtypes one, got {shapes}")
    device_type = q.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        # As PyTorch's own operators do, float64 stays.
        dtype = q.dtype if q.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out: Tensor = _op(q, k, v, bounds, pattern.block, pattern.step, pattern.summary, scale, backend)[0]
    return out


class _Part(NamedTuple):
    """The summary tiles of one run: queries in the batch rows `rows`, keys among its `positions`."""

    rows: slice
    positions: Tensor
    tiles: tuple[Tile, ...]


def _local_tiles(q: Tensor, k: Tensor, runs: tuple[Run, ...], block: int) -> tuple[tuple[Tile, ...], bool]:
    tiles, is_complete = plan(
        DilationPattern((block,), (1,)),
        runs=runs,
        batch_size=q.shape[0],
        q_tokens=q.shape[2],
        k_tokens=k.shape[2],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        is_causal=True,
    )
    return tiles, is_complete


def _summary_parts(q: Tensor, k: Tensor, runs: tuple[Run, ...], pattern: SparseFixedPattern) -> Iterator[_Part]:
    for run in runs:
        tiles = _summary_tiles(q, k, run, pattern)
        if tiles:
            before = torch.arange((run.stop - run.start - 1) // pattern.block * pattern.block, device=k.device)
            kept = before[before % pattern.step >= pattern.step - pattern.summary]
            yield _Part(slice(run.row, run.row + run.rows), run.start + kept, tiles)


def _summary_tiles(q: Tensor, k: Tensor, run: Run, pattern: SparseFixedPattern) -> tuple[Tile, ...]:
    num_kv_heads, skipped = k.shape[1], k.shape[2] - q.shape[2]
    group = q.shape[1] // num_kv_heads
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
                k_start=0,
                k_rows=summaries,
                rate=1,
                is_causal=False,
                is_first=False,
                axes=(
                    Axis(run.rows, row=1),
                    Axis(num_kv_heads, q_head=group, kv_head=1),
                    Axis(group, q_head=1),
                ),
            )
        )
    return tuple(tiles)


@torch.library.custom_op("longnet::sparse_fixed_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    block: int,
    stride: int,
    summary: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = dispatch.choose(backend, q.device, q.dtype, q.shape[3])
    runs = runs_of(bounds, k.shape[0], k.shape[2])
    tiles, is_complete = _local_tiles(q, k, runs, block)
    q, k, v = (rows_dense(x) for x in (q, k, v))
    out, lse = empty_like(q), empty_lse(q)
    if not is_complete:
        out.zero_()
        lse.fill_(-torch.inf)
    attend_tiles(kernel, tiles, q, k, v, out, lse, scale=scale)
    for rows, positions, summary_tiles in _summary_parts(q, k, runs, SparseFixedPattern(block, summary, stride)):
        k_seen, v_seen = (x[rows].index_select(2, positions) for x in (k, v))
        attend_tiles(kernel, summary_tiles, q[rows], k_seen, v_seen, out[rows], lse[rows], scale=scale)
    return out.to(q.dtype), lse


@_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(rows_dense(q)).to(q.dtype), empty_lse(rows_dense(q))


@torch.library.custom_op("longnet::sparse_fixed_attention_backward", mutates_args=())
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    block: int,
    stride: int,
    summary: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = dispatch.choose(backend, q.device, q.dtype, q.shape[3])
    runs = runs_of(bounds, k.shape[0], k.shape[2])
    tiles, is_complete = _local_tiles(q, k, runs, block)
    dout, q, k, v = (rows_dense(x) for x in (dout, q, k, v))
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if not (is_complete and q.shape[2] == k.shape[2]):
        for grad in (dq, dk, dv):
            grad.zero_()
    differentiate_tiles(kernel, tiles, dout, q, k, v, out, lse, (dq, dk, dv), scale=scale)
    for rows, positions, summary_tiles in _summary_parts(q, k, runs, SparseFixedPattern(block, summary, stride)):
        k_seen, v_seen = (x[rows].index_select(2, positions) for x in (k, v))
        dk_seen, dv_seen = empty_like(k_seen).zero_(), empty_like(v_seen).zero_()
        differentiate_tiles(
            kernel, summary_tiles, dout[rows], q[rows], k_seen, v_seen, out[rows], lse[rows],
            (dq[rows], dk_seen, dv_seen), scale=scale,
        )  # fmt: skip
        dk[rows].index_add_(2, positions, dk_seen)
        dv[rows].index_add_(2, positions, dv_seen)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_op_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_like(rows_dense(x)).to(x.dtype) for x in (q, k, v))
    return dq, dk, dv


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _differentiate(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bounds = ctx.saved_tensors
    grads = _op_backward(dout, q, k, v, out, lse, bounds, *ctx.settings)
    return (*grads, *(None,) * (1 + len(ctx.settings)))


_op.register_autograd(_differentiate, setup_context=_keep_for_backward)


@register_flop_formula(torch.ops.longnet.sparse_fixed_attention, get_raw=True)
def _flops(
    q: Tensor,
    k: Tensor,
    _v: Tensor,
    bounds: Tensor | None,
    block: int,
    stride: int,
    summary: int,
    *_: Any,
    **__: Any,
) -> int:
    runs = runs_of(bounds, k.shape[0], k.shape[2])
    tiles = list(_local_tiles(q, k, runs, block)[0])
    for run in runs:
        tiles += _summary_tiles(q, k, run, SparseFixedPattern(block, summary, stride))
    return 4 * q.shape[3] * sum(tile.pairs for tile in tiles)


@register_flop_formula(torch.ops.longnet.sparse_fixed_attention_backward, get_raw=True)
def _flops_backward(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _lse: Tensor, *rest: Any, **__: Any
) -> int:
    return _flops(q, k, v, *rest) * 5 // 2  # five matrix products where the forward has two
