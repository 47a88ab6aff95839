"""The tail of torchscale's encoders: zero keys where the end of a sequence cuts a segment, as weights were trained.

torchscale pads each segment with zero rows and lets them take part in the softmax, so that published encoders were
trained so. A kept query then sees z = ⌈w'/r⌉ − (real kept keys of its segment) more keys of logit 0 and value 0, where
w' = min(w, T): a sink of logit ln z, summed over the branches that keep the query. Where r does not divide w and there
are several segments, torchscale also lays the segments out r·⌈w/r⌉ apart and never moves them back: what such a branch
computes for position p is then of another query. That too is computed here, from calls of the op.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig

from longnet.attention.backends.dispatch import Backend
from longnet.attention.branches import kept_rows
from longnet.attention.dilated import attend_within
from longnet.attention.pattern import DilationPattern
from longnet.attention.pattern import pattern_of as pattern_without_warnings
from longnet.model.patterns import backend_of, heads_of, pattern_of

TailKind = Literal["exact", "torchscale"]

_EXTRA = 8  # columns beside the values, of which one holds ones: kernels like head dims that are multiples of 8


@dataclass(frozen=True)
class Tail:
    """How the segments of one batch end.

    Args:
        aligned: the branches whose segments lie where the op has them; None where there are none.
        shifted: the others, (w, r).
        pattern: all of them.
        sinks: (B, H, T) float32 or float64, ln Z of the zero keys in the aligned branches, −inf where there are none.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of the real tokens of each row, or None.
        rows: the same as numbers, for every row.
        backend: as in `attend_within`.
    """

    aligned: DilationPattern | None
    shifted: tuple[tuple[int, int], ...]
    pattern: DilationPattern
    sinks: Tensor
    bounds: Tensor | None
    rows: tuple[tuple[int, int, int], ...]
    backend: Backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Attend as torchscale does, with exact gradients.

        Args:
            q: (B, H, T, D).
            k: (B, G, T, D).
            v: (B, G, T, D).
            scale: factor on q·k.

        Returns:
            out (B, H, T, D), 0 in the padding.
        """
        if not self.shifted and self.aligned is not None:
            return attend_within(
                q, k, v, self.aligned, bounds=self.bounds, is_causal=False, scale=scale, sinks=self.sinks,
                backend=self.backend,
            )[0]  # fmt: skip
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # out, log of its denominator, log of the mass
        if self.aligned is not None:
            values = functional.pad(v, (0, 1), value=1.0)
            out, log, mass = _attend_weighed(q, k, values, self.aligned, self.bounds, scale, self.sinks, self.backend)
            parts.append((out, log, mass))
        for length, rate in self.shifted:
            layout = _Layout.of(self.rows, length, rate, q.device, q.shape[2])
            pattern = _with_branches(self.pattern, (layout.length,), (rate,))
            values = functional.pad(layout.spread(v), (0, 1), value=1.0)
            spread = layout.spread(q), layout.spread(k), values
            out, log, mass = _attend_weighed(*spread, pattern, layout.bounds, scale, None, self.backend)
            empty = -math.inf
            parts.append((layout.gather(out, 0.0), layout.gather(log, empty), layout.gather(mass, empty)))
        total = torch.stack([mass for _, _, mass in parts]).logsumexp(0)
        total = torch.where(total == -math.inf, 0, total)
        merged = torch.stack([out * (log - total).exp()[..., None] for out, log, _ in parts]).sum(0)
        return merged.to(q.dtype)


def tail_refusal(config: PreTrainedConfig) -> str | None:
    """Say why a configuration's tail cannot be had, and what to do; None where it can."""
    if config.tail == "exact":
        return None
    asked = 'tail="torchscale" is how torchscale trained encoders'
    if config.is_causal:
        return f"{asked}: a causal model never sees the zero keys, so leave it out"
    others = {"queries": "kept", "rotate_offsets": False, "global_tokens": 0}
    if any(getattr(config, name) != value for name, value in others.items()):
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in others)
        return f"{asked}, with {', '.join(f'{name}={value!r}' for name, value in others.items())}, got {got}"
    return None


def tail_of(config: PreTrainedConfig, hidden_states: Tensor, bounds: Tensor | None) -> Tail:
    """Read how the segments of a batch end; all layers share it.

    Args:
        config: of the model.
        hidden_states: (B, T, C), of which the shape and the device count.
        bounds: (B, 3) int64 on the CPU, (batch row, start, stop) of each row's real tokens, or None.
    """
    batch, tokens = hidden_states.shape[:2]
    pattern = pattern_of(config)
    rows = tuple((row, 0, tokens) for row in range(batch))
    if bounds is not None:
        rows = tuple((row, start, stop) for row, start, stop in bounds.tolist())
    longest = max((stop - start for _, start, stop in rows), default=0)
    shifted = tuple((w, r) for w, r in pattern.branches if w % r and longest > w)
    whole = [branch for branch in pattern.branches if branch not in shifted]
    aligned = None
    if whole:
        aligned = pattern
        if shifted:
            lengths, rates = zip(*whole, strict=True)
            aligned = _with_branches(pattern, lengths, rates)
    group = config.num_attention_heads // heads_of(config)[0]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    sinks = torch.full((batch, config.num_attention_heads, tokens), -math.inf, dtype=dtype)
    if aligned is not None:
        for length in {stop - start for _, start, stop in rows}:
            logits = _zero_keys(aligned, length, heads_of(config)[0]).log().to(dtype).repeat_interleave(group, dim=0)
            for row, start, stop in rows:
                if stop - start == length:
                    sinks[row, :, start:stop] = logits
    return Tail(aligned, shifted, pattern, sinks.to(hidden_states.device), bounds, rows, backend_of(config))


def _with_branches(pattern: DilationPattern, lengths: tuple[int, ...], rates: tuple[int, ...]) -> DilationPattern:
    _, _, *options = pattern.arguments
    return pattern_without_warnings(lengths, rates, *options)


def _zero_keys(pattern: DilationPattern, tokens: int, num_kv_heads: int) -> Tensor:
    # (G, T): how many zero keys each query sees.
    count = torch.zeros(num_kv_heads, tokens, dtype=torch.float64)
    if not tokens:
        return count
    for length, rate in pattern.branches:
        segment = min(length, tokens)
        start = (tokens - 1) // segment * segment  # only the last segment may be cut, or the rate leave a rest
        for head in range(num_kv_heads):
            offset = pattern.offset(rate, head, num_kv_heads)
            for begin, stop, rest in ((0, start, segment), (start, tokens, tokens - start)):
                missing = -(-segment // rate) - kept_rows(rest, rate, offset)
                if missing and stop > begin:
                    inside = torch.arange(begin, stop) % segment
                    count[head, begin:stop] += missing * (inside % rate == offset)
    return count


def _attend_weighed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    bounds: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    # The op's lse has no gradient. With a column of ones among the values and a sink of known logit a, that column
    # comes out as c = e^L / (e^L + e^a), so that L = a + log c − log(1 − c) has: (out, log of its denominator, log of
    # the branches' mass, zero keys included). a lies near L, where nothing cancels.
    pad = -(q.shape[3] + 1) % _EXTRA
    q, k, v = (functional.pad(x, (0, pad + (x is not v))) for x in (q, k, v))
    options: Any = {"bounds": bounds, "is_causal": False, "scale": scale, "backend": backend}
    with torch.no_grad():
        mass = attend_within(q, k, v, pattern, **options, sinks=sinks)[1]
    is_kept = mass > -math.inf
    zeros = torch.full_like(mass, -math.inf) if sinks is None else sinks.to(mass.dtype)
    logits = torch.logaddexp(mass, zeros)
    out = attend_within(q, k, v, pattern, **options, sinks=logits)[0]
    out = out.to(mass.dtype)
    width = q.shape[3] - pad - 1
    share = out[..., width]
    has_keys = is_kept & (share > 0)
    share = torch.where(has_keys, share, 0.5)
    log = logits - torch.log1p(-torch.where(has_keys, share, 0.0))
    keys = torch.where(has_keys, logits + share.log() - torch.log1p(-share), -math.inf)
    return out[..., :width], log, torch.logaddexp(keys, zeros)


@dataclass(frozen=True)
class _Layout:
    # Rows of a sequence as torchscale lays out a branch: each segment of w' rows is filled up to r · ⌈w'/r⌉ with zeros.

    length: int
    source: Tensor  # (B, rows): which token lies there, T for zeros
    target: Tensor  # (B, T): where a token's result lies, `rows` for padding
    bounds: Tensor

    @classmethod
    def of(
        cls, runs: tuple[tuple[int, int, int], ...], length: int, rate: int, device: torch.device, tokens: int
    ) -> _Layout:
        filled = -(-length // rate) * rate
        places = []
        for _, start, stop in runs:
            segment = max(1, min(length, stop - start))
            step = -(-segment // rate) * rate
            inside = torch.arange(stop - start)
            places.append((inside // segment * step + inside % segment, -(-(stop - start) // segment) * step))
        rows = max(size for _, size in places)
        source = torch.full((len(runs), rows), tokens)
        target = torch.full((len(runs), tokens), rows)
        bounds = torch.zeros(len(runs), 3, dtype=torch.int64)
        for (row, start, stop), (place, size) in zip(runs, places, strict=True):
            source[row, place] = torch.arange(start, stop)
            target[row, start:stop] = torch.arange(stop - start)
            bounds[row] = torch.tensor([row, 0, size])
        return cls(filled, source.to(device), target.to(device), bounds)

    def spread(self, x: Tensor) -> Tensor:
        return _take(functional.pad(x, (0, 0, 0, 1)), self.source)

    def gather(self, x: Tensor, empty: float) -> Tensor:
        tail = (0, 1) if x.ndim == 3 else (0, 0, 0, 1)
        return _take(functional.pad(x, tail, value=empty), self.target)


def _take(x_BHT: Tensor, index_BM: Tensor) -> Tensor:
    rows = torch.arange(len(index_BM), device=index_BM.device)[:, None]
    return x_BHT.transpose(1, 2)[rows, index_BM].transpose(1, 2)
