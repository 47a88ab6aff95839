"""Which rows each head keeps, and what that costs, in closed form."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import warnings
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import torch

HeadOffsets = Literal["mod", "block"]

_SEARCHED_TOKENS = 2**15


@dataclass(frozen=True, slots=True)
class DilationPattern:
    """The branches (segment length w_i, dilation rate r_i) of dilated attention (arXiv:2307.02486 eq. 3-15).

    Position p lies in segment `p // w_i` of branch i, at `u = p % w_i`; the branch keeps p for key/value head g
    iff `u % r_i == s_ig`. With w = 4, r = 2 and offset 0, the causal keys of one branch are, a row per query:

        1 . . . . . . .
        . . . . . . . .        a row without a 1 is a query that this branch does not keep
        1 . 1 . . . . .
        . . . . . . . .
        . . . . 1 . . .
        . . . . . . . .
        . . . . 1 . 1 .
        . . . . . . . .

    Args:
        segment_lengths: w_i in tokens, each ≥ 1. Need not be a multiple of r_i, may exceed the sequence.
        dilation_rates: r_i, each ≥ 1, one per segment length.
        head_offsets: `"mod"`, s_ig = g mod r_i (the paper, §2.3), or `"block"`, s_ig = g // ceil(G / r_i) for G
            key/value heads (the layout of torchscale's checkpoints).

    Raises:
        ValueError: a length or rate below 1, an empty or unequal pair of lists, a branch given twice, an unknown
            `head_offsets`.
        TypeError: a length or rate that is no int.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "mod"

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)):
                raise TypeError(f"{name} must be a tuple of ints, got {values!r}")
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{name} must hold ints, got {value!r} in {values!r}")
                if value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value} in {values!r}")
            object.__setattr__(self, name, tuple(values))
        if not self.segment_lengths:
            raise ValueError("a pattern needs at least one branch, got none: segment_lengths=(2048,), say")
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"one dilation rate per segment length: got {len(self.segment_lengths)} segment lengths "
                f"{self.segment_lengths} and {len(self.dilation_rates)} rates {self.dilation_rates}"
            )
        if len(set(self.branches)) != len(self.branches):
            raise ValueError(f"a branch is given twice, which would count its keys twice: {self.branches}")
        if self.head_offsets not in get_args(HeadOffsets):
            raise ValueError(f"head_offsets must be one of {get_args(HeadOffsets)}, got {self.head_offsets!r}")
        # While compiling, a model reads its pattern from its configuration, and a warning would break the graph.
        if 1 not in self.dilation_rates and not torch.compiler.is_compiling():
            warnings.warn(
                f"{self!r} has no branch of dilation rate 1: queries that no branch keeps get output 0",
                stacklevel=3,
            )

    @classmethod
    def geometric(cls, segment_length: int = 2048, max_length: int = 2**30, factor: int = 2) -> Self:
        """Return w, r = segment_length/1, ·factor/factor, … until w ≥ max_length (arXiv:2307.02486 eq. 11-12).

        Every branch keeps segment_length rows a segment, so cost per token stays below
        factor / (factor − 1) times that of the first branch, whatever the length.

        Raises:
            ValueError: segment_length or max_length below 1, or factor below 2.
        """
        if segment_length < 1 or max_length < 1 or factor < 2:
            raise ValueError(
                "geometric needs segment_length ≥ 1, max_length ≥ 1 and factor ≥ 2, got "
                f"segment_length={segment_length}, max_length={max_length}, factor={factor}"
            )
        rates = [1]
        while segment_length * rates[-1] < max_length:
            rates.append(rates[-1] * factor)
        return cls(tuple(segment_length * rate for rate in rates), tuple(rates))

    @classmethod
    def paper(cls) -> Self:
        """Return the pattern of the paper's language models (arXiv:2307.02486 §4.1): w = 2048 … 32768, r = 1 … 12."""
        return cls((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `"2048:1,4096:2"`, or `"2048:1,4096:2;block"` for block offsets; `str(pattern)` writes it.

        Raises:
            ValueError: text of another form.
        """
        branches, semicolon, offsets = text.partition(";")
        try:
            pairs = [tuple(int(number) for number in branch.split(":")) for branch in branches.split(",")]
            lengths, rates = zip(*((length, rate) for length, rate in pairs), strict=True)
        except ValueError:
            raise ValueError(
                f"cannot read the pattern {text!r}: write segment:rate pairs with commas, like 2048:1,4096:2,8192:4"
            ) from None
        return cls(lengths, rates, offsets if semicolon else "mod")  # type: ignore[arg-type]

    def __str__(self) -> str:
        branches = ",".join(f"{length}:{rate}" for length, rate in self.branches)
        return branches if self.head_offsets == "mod" else f"{branches};{self.head_offsets}"

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The pairs (w_i, r_i)."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def offset(self, rate: int, head: int, num_kv_heads: int) -> int:
        """Return s_ig: which of each `rate` positions key/value head `head` of `num_kv_heads` keeps.

        Query heads take the offset of their key/value head. arXiv:2307.02486 eq. 13-15.
        """
        return head % rate if self.head_offsets == "mod" else head // -(-num_kv_heads // rate)

    def flops(
        self, *, tokens: int, num_heads: int, head_dim: int, is_causal: bool, num_kv_heads: int | None = None
    ) -> int:
        """Count the floating-point operations of one forward pass over one sequence, projections excluded.

        Each (query, key) pair costs 4·head_dim: a multiply and an add in q·k and in p·v (arXiv:2307.02486 eq. 16-20,
        with the causal half left out). A key that three branches see counts three times. Backward costs 2.5 times as
        much in a kernel that recomputes the scores.

        Args:
            tokens: sequence length T.
            num_heads: query heads H.
            head_dim: D.
            is_causal: count only the keys at or before each query.
            num_kv_heads: key/value heads G, H when None; they decide the offsets.

        Raises:
            ValueError: tokens below 0, or num_heads no multiple of num_kv_heads.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if tokens < 0 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"flops needs tokens ≥ 0 and num_heads a multiple of num_kv_heads, got tokens={tokens}, "
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        pairs = 0
        for length, rate in self.branches:
            whole, rest = divmod(tokens, length)
            for head in range(num_kv_heads):
                offset = self.offset(rate, head, num_kv_heads)
                for segments, positions in ((whole, length), (1, rest)):
                    rows = kept_rows(positions, rate, offset)
                    pairs += segments * (rows * (rows + 1) // 2 if is_causal else rows * rows)
        return 4 * head_dim * pairs * (num_heads // num_kv_heads)

    def state_rows(self, *, tokens: int) -> int:
        """Count the rows that a causal streaming state holds per key/value head for sequences of up to `tokens`.

        Only the kept rows of each branch's current segment are needed: Σ_i ceil(min(w_i, tokens) / r_i), however
        long the sequence. Not in the paper.
        """
        return sum(kept_rows(min(length, tokens), rate, 0) for length, rate in self.branches)

    def traffic(
        self, *, tokens: int, ranks: int, num_kv_heads: int, head_dim: int, itemsize: int, is_causal: bool
    ) -> tuple[int, ...]:
        """Count the bytes of keys and values that each rank receives in one forward pass of one layer.

        The sequence lies across the ranks in slices of ceil(tokens / ranks), the last ones shorter. The backward pass
        sends as many bytes of gradients back. A rank gets the kept rows of the segments that its slice cuts, and no
        others: never more than Σ_i 2·G·ceil(w_i / r_i) rows of keys, twice that without causality, whatever the
        length (arXiv:2307.02486 §3.1).

        Args:
            tokens: T of the whole sequence.
            ranks: P.
            num_kv_heads: G.
            head_dim: D.
            itemsize: bytes of a number.
            is_causal: rows after a slice are not needed.

        Raises:
            ValueError: numbers below 1.
        """
        if min(tokens, ranks, num_kv_heads, head_dim, itemsize) < 1:
            raise ValueError(
                f"traffic needs numbers of at least 1, got tokens={tokens}, ranks={ranks}, "
                f"num_kv_heads={num_kv_heads}, head_dim={head_dim}, itemsize={itemsize}"
            )
        size = -(-tokens // ranks)
        received = []
        for rank in range(ranks):
            start, stop = min(tokens, rank * size), min(tokens, (rank + 1) * size)
            rows = 0
            for length, rate in self.branches if start < stop else ():
                base = stop // length * length
                end = base if is_causal or base == stop else min(base + length, tokens)
                for offset in (self.offset(rate, head, num_kv_heads) for head in range(num_kv_heads)):
                    rows += kept_rows(start % length, rate, offset)
                    if end > stop:
                        rows += kept_rows(end - base, rate, offset) - kept_rows(stop - base, rate, offset)
            received.append(2 * rows * head_dim * itemsize)
        return tuple(received)

    def coverage(self, *, tokens: int, num_kv_heads: int) -> tuple[float, ...]:
        """Return, per branch, the share of the `tokens` positions that at least one key/value head keeps.

        Below 1 where a branch has more phases than there are heads; with `"block"` offsets also where the rate does
        not divide the heads. Not in the paper.

        Raises:
            ValueError: tokens or num_kv_heads below 1.
        """
        if tokens < 1 or num_kv_heads < 1:
            raise ValueError(f"coverage needs a token and a head, got tokens={tokens}, num_kv_heads={num_kv_heads}")
        shares = []
        for length, rate in self.branches:
            offsets = {self.offset(rate, head, num_kv_heads) for head in range(num_kv_heads)}
            whole, rest = divmod(tokens, length)
            kept = sum(whole * kept_rows(length, rate, s) + kept_rows(rest, rate, s) for s in offsets)
            shares.append(kept / tokens)
        return tuple(shares)

    def hops(self, *, tokens: int) -> int | float:
        """Return the layers after which every token can have heard of every other: the graph's diameter.

        Tokens are joined where some head of a non-causal layer lets one attend to the other, every phase of every
        branch being some head's (heads ≥ largest rate). `math.inf` where no depth suffices, as beyond the longest
        segment. Grows with log(tokens) for geometric patterns (arXiv:2307.02486 §2.4): with f-fold steps and
        m = w_i / r_i rows a segment a hop rewrites log_f(m) of a position's base-f digits.

        Closed form where of any two lengths or rates one divides the other; breadth-first search otherwise.

        Raises:
            ValueError: a pattern without that closed form, and tokens too many to search.
        """
        if tokens <= 1:
            return 0
        longest = max(self.segment_lengths)
        if tokens > longest and all(longest % length == 0 for length in self.segment_lengths):
            return math.inf  # every branch has a boundary there
        sizes = sorted({*self.segment_lengths, *self.dilation_rates})
        if all(large % small == 0 for small, large in itertools.combinations(sizes, 2)):
            return self._hops_nested(tokens)
        if tokens <= _SEARCHED_TOKENS:
            return self._hops_searched(tokens)
        raise ValueError(
            f"{self!r} has no closed form for hops, since its lengths and rates do not divide one another; "
            f"searched up to {_SEARCHED_TOKENS} tokens, got {tokens}"
        )

    def _hops_nested(self, tokens: int) -> int | float:
        # Two tokens that meet first in branch i's segment: one hop brings the query's phase modulo r_i into the
        # other token's neighbourhood, any segment of at least r_i tokens; what is left to bridge lies inside it.
        span, hops = tokens, 0
        while span > 1:
            rate = min((r for w, r in self.branches if w >= span), default=None)
            if rate is None or rate >= span:
                return math.inf
            span, hops = rate, hops + 1
        return hops

    def _hops_searched(self, tokens: int) -> int | float:
        # reached[p]: the tokens within `hops` of p, as the bits of an int. All tokens of a meeting (one branch, one
        # segment, one phase) hear in one hop what any of them has reached.
        meetings = [
            range(start + offset, min(start + length, tokens), rate)
            for length, rate in self.branches
            for start in range(0, tokens, length)
            for offset in range(min(rate, tokens - start, length))
        ]
        everyone, hops = (1 << tokens) - 1, 0
        reached = [1 << position for position in range(tokens)]
        while any(bits != everyone for bits in reached):
            heard = list(reached)
            for members in meetings:
                news = functools.reduce(operator.or_, (reached[position] for position in members))
                for position in members:
                    heard[position] |= news
            if heard == reached:
                return math.inf
            reached, hops = heard, hops + 1
        return hops


@functools.lru_cache(maxsize=256)
def pattern_of(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...], head_offsets: str) -> DilationPattern:
    """Return the pattern that an op's arguments spell out, without the warnings that its maker has had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DilationPattern(segment_lengths, dilation_rates, cast("HeadOffsets", head_offsets))


def kept_rows(positions: int, rate: int, offset: int) -> int:
    """Count the u in range(positions) with u % rate == offset."""
    return max(0, -(-(positions - offset) // rate))
