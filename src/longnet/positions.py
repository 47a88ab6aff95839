"""RoPE and xPos, right at any position: angles by exact integer reduction, xPos scales that stay finite."""

from __future__ import annotations

import decimal
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_XPOS_GAMMA = 0.4  # arXiv:2212.10554 §3.2
_XPOS_HEADROOM = 12 * math.log(2)  # q·k itself may reach 2^12 before a scaled product overflows


class Rotation(NamedTuple):
    """What turns and scales q or k: cos and sin, each (B or 1, 1, T, D / 2), xPos scales multiplied in."""

    cos: Tensor
    sin: Tensor


def turn_steps(theta: float, head_dim: int) -> Tensor:
    """Return the angle between neighbouring positions, theta^(−2i / D) radians, in 2^-64 turns: (D / 2,) int64.

    int64 multiplication wraps around, which takes whole turns off, so `position · step` is the angle reduced to
    [−½, ½) turns with an error of 2^-65 turns a position: 3e-10 radians at 10⁹, 3e-7 at 10¹², whatever the device.
    """
    steps = []
    with decimal.localcontext(decimal.Context(prec=60)):
        for i in range(head_dim // 2):
            turns = decimal.Decimal(theta) ** (decimal.Decimal(-2 * i) / head_dim) / (2 * _PI)
            step = int((turns * 2**64).to_integral_value()) % 2**64
            steps.append(step - 2**64 if step >= 2**63 else step)
    return torch.tensor(steps, dtype=torch.int64)


def xpos_span(scale_base: float, dtype: torch.dtype) -> int:
    """Return over how many tokens xPos scales, and the products of two of them, stay finite in `dtype`.

    The scale of the fastest pair grows e-fold every scale_base / log((1 + γ) / γ) tokens: at the usual 512 that is
    a span of 32,861 tokens in float32 and bfloat16, 1,132 in float16.
    """
    # Products count, not factors alone: kernels that mask by adding −inf compute the scores of later keys first.
    exponents = math.log(torch.finfo(dtype).max) - _XPOS_HEADROOM
    return int(exponents * scale_base / math.log((1 + _XPOS_GAMMA) / _XPOS_GAMMA))


class RotaryPositions(nn.Module):
    """Rotate queries and keys by their positions: RoPE (arXiv:2104.09864), or xPos (arXiv:2212.10554) on top.

    Pair i of a head, its components i and i + D / 2, turns by m·theta^(−2i / D) at position m. xPos multiplies a
    query's pair by ζ_i^(m / scale_base) and a key's by ζ_i^(−n / scale_base), ζ_i = (2i / D + γ) / (1 + γ), so that
    their product decays with the distance m − n.

    Only differences of exponents matter, so they may be counted from any centre that q and k share. The centre never
    depends on the tokens seen so far: cached keys stay right.

    - Where attention never leaves blocks of `period` positions (dilated attention: the least common multiple of the
      segment lengths) and a block fits the span of `xpos_span`, each block has its own centre. The decay is exact at
      every position, 10⁹ included.
    - Otherwise one centre serves all, in the middle of the first min(max_position_embeddings, span) positions.
      Positions further from it than half a span are refused; moving the centre does not change the model.

    The price of large exponents is that a key's components may differ by e^±40: quantise cached keys by channel, not by
    token.

    Args:
        head_dim: D, even.
        theta: base of the angles, at least 1.
        xpos_scale_base: tokens over which xPos decays by ζ_i; None for plain RoPE.
        max_position_embeddings: places the one centre of xPos.
    """

    turn_steps: Tensor

    def __init__(
        self, head_dim: int, theta: float, *, xpos_scale_base: float | None, max_position_embeddings: int
    ) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.xpos_scale_base = xpos_scale_base
        self.max_position_embeddings = max_position_embeddings
        # An integer buffer: `model.to(torch.bfloat16)` leaves it alone.
        self.register_buffer("turn_steps", turn_steps(theta, head_dim), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Compute the steps anew beside the weights that are loaded: after `to_empty` they are whatever lay there."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        steps = turn_steps(self.theta, self.head_dim)
        self.turn_steps = steps if self.turn_steps.is_meta else steps.to(self.turn_steps.device)

    def forward(
        self, position_ids: Tensor, *, dtype: torch.dtype, period: int | None = None
    ) -> tuple[Rotation, Rotation]:
        """Return the rotations of queries and keys at `position_ids`.

        Args:
            position_ids: (B or 1, T) int64, exact to about 10¹².
            dtype: of q and k; the rotations are float32, or float64 for float64.
            period: attention never leaves blocks of this many positions, counted from 0.

        Returns:
            The rotation of q and that of k, the same one for RoPE. Where xPos would overflow they are NaN: call
            `refuse_beyond` first.
        """
        # Exact reduction first; only what is left, below one turn, is ever rounded.
        wide = torch.float32 if position_ids.device.type == "mps" else torch.float64  # mps has no float64
        table_dtype = torch.promote_types(dtype, torch.float32)
        angles = (position_ids[:, None, :, None] * self.turn_steps).to(wide) * (2 * math.pi * 2.0**-64)
        cos, sin = angles.cos(), angles.sin()
        if self.xpos_scale_base is None:
            rotation = Rotation(cos.to(table_dtype), sin.to(table_dtype))
            return rotation, rotation
        span = xpos_span(self.xpos_scale_base, dtype)
        period = _served_period(period, span)
        steps = position_ids - self._centre(span) if period is None else position_ids % period - period // 2
        pairs = torch.arange(self.head_dim // 2, device=position_ids.device, dtype=wide)
        rates = torch.log((2 * pairs / self.head_dim + _XPOS_GAMMA) / (1 + _XPOS_GAMMA)) / self.xpos_scale_base
        exponents = (steps.to(wide).masked_fill(steps.abs() > span // 2, torch.nan))[:, None, :, None] * rates
        scale = exponents.exp()
        q = Rotation((cos * scale).to(table_dtype), (sin * scale).to(table_dtype))
        k = Rotation((cos / scale).to(table_dtype), (sin / scale).to(table_dtype))
        return q, k

    def refuse_beyond(self, highest: int, *, dtype: torch.dtype, period: int | None = None) -> None:
        """Raise where xPos cannot serve positions up to `highest`.

        Raises:
            ValueError: `highest` is more than half a span from the one centre.
        """
        if self.xpos_scale_base is None:
            return
        span = xpos_span(self.xpos_scale_base, dtype)
        reach = self._centre(span) + span // 2
        if _served_period(period, span) is not None or highest <= reach:
            return
        advice = f"xpos_scale_base of at least {math.ceil(self.xpos_scale_base * (highest + 1) / span)}"
        if highest < span:
            advice = f"max_position_embeddings of at least {highest + 1}, which only moves the centre"
        elif dtype == torch.float16:
            advice = "torch.bfloat16 instead of torch.float16"
        raise ValueError(
            f"xPos with xpos_scale_base={self.xpos_scale_base} overflows {dtype} beyond position {reach}, got position "
            f"{highest}: use {advice}, or position_embedding='rope'. With attn_implementation='dilated' every position "
            f"is served as long as the segments share a boundary at least every {span} tokens and there are no global "
            "tokens"
        )

    def _centre(self, span: int) -> int:
        return min(self.max_position_embeddings, span) // 2


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (B, H, T, D), in the dtype of `rotation`; rounded once, to the dtype of x."""
    first, second = x.to(rotation.cos.dtype).chunk(2, dim=-1)
    cos, sin = rotation
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Written where it stays: torch.cat of strided halves runs on one core, and took a tenth of a stream's time.
        out = torch.empty_like(x, dtype=cos.dtype)
        halves = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=halves[0]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=halves[1]).addcmul_(first, sin)
        return out.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Return [sin pω, cos pω], ω_k = 10000^(−k / (width/2 − 1)): what fairseq and torchscale add to embeddings.

    Args:
        positions: (…), int64.
        width: C, even.

    Returns:
        (…, C) float32, computed in float64.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000) / (half - 1)))
    angles = _angles(positions, rates)
    return torch.cat([angles.sin(), angles.cos()], -1).to(positions.device, torch.float32)


def grid(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return [sin jω, cos jω, sin iω, cos iω], ω_k = 10000^(−k / (width/4)), of row i and column j of a grid.

    The 2-D form of MAE (arXiv:2111.06377), which GigaPath's slide encoder took for its tiles.

    Args:
        rows: (…) int64, i.
        columns: (…) int64, j.
        width: C, a multiple of 4.

    Returns:
        (…, C) float32, computed in float64.
    """
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    parts = []
    for places in (columns, rows):
        angles = _angles(places, rates)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, -1).to(rows.device, torch.float32)


def refuse_late_starts(position_ids: Tensor, period: int, *, real: Tensor | None, is_cached: bool) -> None:
    """Raise where a document starts between the blocks that xPos scales count from.

    Segments count from a document's first token, so the blocks must, too. While compiling the device checks, since a
    graph cannot read numbers.

    Args:
        position_ids: (B or 1, T) int64; a document starts where they do not rise by one, and after padding.
        period: as in `RotaryPositions`.
        real: (B, T) bool, false where the positions are of padding and mean nothing; None where all are of tokens.
        is_cached: later tokens follow, so that a document within the first block counts as well.

    Raises:
        ValueError: some start is no multiple of `period`; RuntimeError from a compiled graph.
    """
    starts = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)
    if real is not None:
        position_ids = torch.where(real, position_ids, 0)
        starts = real & (starts | nn.functional.pad(~real[:, :-1], (1, 0), value=True))
    late = starts & (position_ids % period != 0) & (is_cached | (position_ids >= period).any())
    message = (
        f"xPos scales count from multiples of {period}, where all segments start, so the position_ids of a document "
        "must start there: at 0, best; or use position_embedding='rope'"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~late.any(), message)
    elif bool(late.any()):
        raise ValueError(f"{message}. Got documents that start at {position_ids[late].tolist()[:8]}")


def _served_period(period: int | None, span: int) -> int | None:
    return period if period is not None and period <= span else None


def _angles(positions: Tensor, rates: Tensor) -> Tensor:
    device = torch.device("cpu") if positions.device.type == "mps" else positions.device  # mps has no float64
    return positions.to(device, torch.float64)[..., None] * rates.to(device)
