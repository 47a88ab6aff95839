"""Which rows each head keeps, and what that costs, in closed form."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch

from longnet.attention.branches import UNBOUNDED, Branch, OffsetGrid, kept_rows
from longnet.attention.reach import hops
from longnet.attention.strips import draw_strips

HeadOffsets = Literal["mod", "block"]
Queries = Literal["kept", "all"]


@dataclass(frozen=True, slots=True, repr=False)
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

    With `queries="all"` every query of a segment attends to the keys that its branch keeps, at a cost of w/r keys a
    query in place of w/r². Not in the paper, where two positions meet directly only if both lie on the head's phase:

        1 . . . . . . .
        1 . . . . . . .
        1 . 1 . . . . .
        1 . 1 . . . . .
        . . . . 1 . . .
        . . . . 1 . . .
        . . . . 1 . 1 .
        . . . . 1 . 1 .

    Args:
        segment_lengths: w_i in tokens, each ≥ 1. Need not be a multiple of r_i, may exceed the sequence.
        dilation_rates: r_i, each ≥ 1, one per segment length.
        head_offsets: `"mod"`, s_ig = g mod r_i (the paper, §2.3), or `"block"`, s_ig = g // ceil(G / r_i) for G
            key/value heads (the layout of torchscale's checkpoints).
        queries: `"kept"`, a branch drops queries as it drops keys (the paper), or `"all"`, it drops keys alone. A
            branch of rate 1 is the same in both.
        global_tokens: so many first tokens of a document are keys of all its queries, in every head, besides what the
            branches show. Not in the paper. Trained models rest attention on a text's first token, which beyond the
            first segment one head in r still sees (arXiv:2309.17453; of a converted model, docs/evidence.md).
        offset_shift: added to all offsets: head g keeps u iff `u % r_i == (s_ig + offset_shift) % r_i`. A model may
            shift them layer by layer, so that few heads see all phases. Not in the paper.
        head_shard: (g0, G): the key/value heads at hand are g0, g0 + 1, … of G, as where a model's heads are split
            across ranks; offsets are those of the whole. None where they are all there are.

    Raises:
        ValueError: a length or rate below 1, an empty or unequal pair of lists, a branch given twice, an unknown
            `head_offsets` or `queries`, a negative shift or number of tokens, one of 2^63 or more, a shard outside its
            heads.
        TypeError: a length, a rate, a shift or a number of tokens that is no int.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "mod"
    queries: Queries = "kept"
    offset_shift: int = 0
    head_shard: tuple[int, int] | None = None
    global_tokens: int = 0

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
                if value >= 2**63:
                    raise ValueError(f"{name} must be below 2^63, as PyTorch's integers are, got {value}")
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
        for name, choices in (("head_offsets", get_args(HeadOffsets)), ("queries", get_args(Queries))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("offset_shift", "global_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if not 0 <= value < 2**63:
                raise ValueError(f"{name} must be at least 0 and below 2^63, as PyTorch's integers are, got {value}")
        if self.head_shard is not None and not 0 <= self.head_shard[0] < self.head_shard[1]:
            raise ValueError(f"head_shard must be (first key/value head, of how many), got {self.head_shard!r}")
        # While compiling, a model reads its pattern from its configuration, and a warning would break the graph.
        if 1 not in self.dilation_rates and not self.global_tokens and not torch.compiler.is_compiling():
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
    def for_length(
        cls,
        tokens: int,
        num_kv_heads: int,
        *,
        budget: float = 0.26,
        queries: Queries = "all",
        rotate_offsets: bool = False,
        global_tokens: int = 0,
    ) -> Self:
        """Return the pattern that we recommend for a length: of those within a budget the one with the widest window.

        Its first branch is a window of rate 1, its last one spans all tokens, and rates in between grow eight- or
        fourfold. No rate exceeds the heads, so that every position is some head's key; with `rotate_offsets`, for
        models that shift offsets with depth, rates may exceed them, and a budget may be as small as one wants.
        Measured recall: docs/patterns.md. Not in the paper.

        Args:
            tokens: T, of the longest sequence.
            num_kv_heads: G.
            budget: FLOPs as a share of dense causal attention's, above 0 and at most 1.
            queries: `"all"` or `"kept"`.
            rotate_offsets: the model has `rotate_offsets=True`.
            global_tokens: as in the pattern; 1 for a model that was trained with dense attention.

        Raises:
            ValueError: numbers out of range, or a budget that no pattern keeps to.
        """
        if tokens < 1 or num_kv_heads < 1 or not 0 < budget <= 1:
            raise ValueError(
                f"for_length needs tokens and heads of at least 1 and a budget in (0, 1], got tokens={tokens}, "
                f"num_kv_heads={num_kv_heads}, budget={budget}"
            )

        def cost(pattern: Self) -> int:
            return pattern.flops(tokens=tokens, num_heads=num_kv_heads, head_dim=1, is_causal=True)

        allowed = budget * cost(cls((tokens,), (1,)))
        for window in (tokens, *(2**power for power in reversed(range((tokens - 1).bit_length())))):
            largest = -(-tokens // window) if rotate_offsets else min(num_kv_heads, -(-tokens // window))
            for factor in (8, 4):
                rates = [factor**step for step in range(tokens.bit_length()) if factor**step < largest]
                lengths = (*(window * rate for rate in rates), tokens)
                pattern = cls(lengths, (*rates, largest), queries=queries, global_tokens=global_tokens)
                if cost(pattern) <= allowed:
                    return pattern
        raise ValueError(
            f"no pattern with rates up to {num_kv_heads}, the key/value heads, costs {budget} of dense attention at "
            f"{tokens} tokens: allow some more than 1/{num_kv_heads}, or let offsets rotate with depth "
            "(rotate_offsets=True, in the model too)"
        )

    @classmethod
    def paper(cls) -> Self:
        """Return the pattern of the paper's language models (arXiv:2307.02486 §4.1): w = 2048 … 32768, r = 1 … 12."""
        return cls((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `"2048:1,4096:2"`, with `;block`, `;all`, `;global=1` or `;shift=3` after it; `str(pattern)` writes it.

        Raises:
            ValueError: text of another form.
        """
        branches, *options = (part.strip() for part in text.split(";"))
        try:
            pairs = [tuple(int(number) for number in branch.split(":")) for branch in branches.split(",")]
            lengths, rates = zip(*((length, rate) for length, rate in pairs), strict=True)
        except ValueError:
            raise ValueError(
                f"cannot read the pattern {text!r}: write segment:rate pairs with commas, like 2048:1,4096:2,8192:4"
            ) from None
        return cls(lengths, rates, **dict(_read_option(option, text) for option in options))

    def __str__(self) -> str:
        """Return what `parse` reads; a shard of heads, which belongs to a call, is left out."""
        options: list[str] = [option for option in (self.head_offsets, self.queries) if option not in ("mod", "kept")]
        if self.global_tokens:
            options.append(f"global={self.global_tokens}")
        if self.offset_shift:
            options.append(f"shift={self.offset_shift}")
        return ";".join([",".join(f"{length}:{rate}" for length, rate in self.branches), *options])

    def __repr__(self) -> str:
        given = [
            f"{field.name}={value!r}" for field in fields(self) if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def _repr_html_(self) -> str:
        # Notebooks draw it: the first heads, of as many as the largest rate.
        first, total = (0, max(self.dilation_rates)) if self.head_shard is None else self.head_shard
        heads = range(min(4, total - first))
        drawn = [(w, r, [self.offset(r, head, total - first) for head in heads]) for w, r in self.branches]
        return draw_strips(str(self), drawn)

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The pairs (w_i, r_i)."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def all_branches(self) -> tuple[Branch, ...]:
        """What is computed: the branches and, where there are global tokens, one more, whose segment has no end."""
        return _all_branches(self)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The pattern as an operator's arguments, of the types of `PATTERN_SCHEMA`; `pattern_of` reads them."""
        shard = () if self.head_shard is None else self.head_shard
        return (
            self.segment_lengths, self.dilation_rates, self.head_offsets, self.queries, self.offset_shift, shard,
            self.global_tokens,
        )  # fmt: skip

    def shifted(self, shift: int) -> DilationPattern:
        """Return the pattern whose offsets lie `shift` further, as in another layer of a model that rotates them."""
        lengths, rates, offsets, queries, offset_shift, *rest = self.arguments
        return pattern_of(lengths, rates, offsets, queries, offset_shift + shift, *rest)

    def shard(self, first_kv_head: int, num_kv_heads: int) -> DilationPattern:
        """Return the pattern for a call that holds some of `num_kv_heads` key/value heads, from `first_kv_head` on.

        Tensor parallelism, say, gives each rank a few; what a head keeps follows from which of all of them it is.

        Raises:
            ValueError: a head outside 0 … num_kv_heads − 1.
        """
        lengths, rates, offsets, queries, offset_shift, _, global_tokens = self.arguments
        return pattern_of(lengths, rates, offsets, queries, offset_shift, (first_kv_head, num_kv_heads), global_tokens)

    def offset(self, rate: int, head: int, num_kv_heads: int) -> int:
        """Return which of each `rate` positions key/value head `head` of the `num_kv_heads` at hand keeps.

        Query heads take the offset of their key/value head. arXiv:2307.02486 eq. 13-15.
        """
        first, total = self._shard_of(num_kv_heads)
        own = first + head if self.head_offsets == "mod" else (first + head) // -(-total // rate)
        return (own + self.offset_shift) % rate

    def offset_grids(self, rate: int, num_kv_heads: int) -> tuple[OffsetGrid, ...]:
        """Return the `num_kv_heads` at hand, each in one grid of heads with side by side offsets."""
        first, total = self._shard_of(num_kv_heads)
        if self.head_offsets == "mod":
            offsets, most = min(rate, num_kv_heads), -(-num_kv_heads // rate)
            full = num_kv_heads - offsets * (most - 1)
            spans = [(0, full, most), (full, offsets, most - 1)]
            grids = [(low, first + low, high - low, 1, heads, rate) for low, high, heads in spans]
        else:
            per_offset = -(-total // rate)
            ragged = min(num_kv_heads, -first % per_offset)
            whole, rest = divmod(num_kv_heads - ragged, per_offset)
            offset = (first + ragged) // per_offset
            grids = [
                (0, first // per_offset, 1 if ragged else 0, per_offset, ragged, 1),
                (ragged, offset, whole, per_offset, per_offset, 1),
                (num_kv_heads - rest, offset + whole, 1 if rest else 0, per_offset, rest, 1),
            ]
        shifted = (OffsetGrid(head, offset + self.offset_shift, *rest) for head, offset, *rest in grids)
        return tuple(
            part._replace(offset=part.offset % rate) for grid in shifted for part in grid.cut(-grid.offset % rate)
        )

    def _shard_of(self, num_kv_heads: int) -> tuple[int, int]:
        first, total = (0, num_kv_heads) if self.head_shard is None else self.head_shard
        if first + num_kv_heads > total:
            raise ValueError(
                f"the pattern is for a shard of {total} key/value heads from {first} on, got {num_kv_heads}"
            )
        return first, total

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
        for branch in self.all_branches:
            rate = branch.rate
            whole, rest = divmod(tokens, branch.length)
            for head in range(num_kv_heads):
                offset = self.offset(rate, head, num_kv_heads)
                for segments, positions in ((whole, branch.length), (1, rest)):
                    pairs += segments * branch.pairs(positions, offset, is_causal=is_causal)
        return 4 * head_dim * pairs * (num_heads // num_kv_heads)

    def state_rows(self, *, tokens: int) -> int:
        """Count the rows that a causal streaming state holds per key/value head for sequences of up to `tokens`.

        Only the kept rows of each branch's current segment are needed: Σ_i ceil(min(w_i, tokens) / r_i), however
        long the sequence, and the global tokens. Not in the paper.
        """
        return sum(branch.kept_rows(min(branch.length, tokens), 0) for branch in self.all_branches)

    def traffic(
        self, *, tokens: int, ranks: int, num_kv_heads: int, head_dim: int, itemsize: int, is_causal: bool
    ) -> tuple[int, ...]:
        """Count the bytes of keys and values that each rank receives in one forward pass of one layer.

        The sequence lies across the ranks in slices of ceil(tokens / ranks), the last ones shorter. The backward pass
        sends as many bytes of gradients back. A rank gets the kept rows of the segments that its slice cuts, and no
        others, and the global tokens: never more than Σ_i 2·G·ceil(w_i / r_i) rows of keys, twice that without
        causality, whatever the length (arXiv:2307.02486 §3.1).

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
            for branch in self.all_branches if start < stop else ():
                length = branch.length
                base = stop // length * length
                end = base if is_causal or base == stop else min(base + length, tokens)
                for offset in (self.offset(branch.rate, head, num_kv_heads) for head in range(num_kv_heads)):
                    rows += branch.kept_rows(start % length, offset)
                    if end > stop:
                        rows += branch.kept_rows(end - base, offset) - branch.kept_rows(stop - base, offset)
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
        branch being some head's (heads ≥ largest rate); with `queries="all"`, all tokens of a segment are; what global
        tokens join is left out, since of a causal layer they hear nothing. `math.inf`
        where no depth suffices, as beyond the longest segment. Reachability says nothing of use. Grows with log(tokens)
        for geometric patterns (arXiv:2307.02486 §2.4): with f-fold steps and m = w_i / r_i rows a segment a hop
        rewrites log_f(m) of a position's base-f digits.

        Closed form where of any two lengths or rates one divides the other; breadth-first search otherwise.

        Raises:
            ValueError: a pattern without that closed form, and tokens too many to search.
        """
        is_dense = self.queries == "all"  # then all of a segment meet in a hop, as at rate 1
        return hops({(length, 1 if is_dense else rate) for length, rate in self.branches}, tokens)


@functools.lru_cache(maxsize=256)
def _all_branches(pattern: DilationPattern) -> tuple[Branch, ...]:
    is_dense = pattern.queries == "all"
    branches = [Branch(length, rate, UNBOUNDED, is_dense and rate > 1) for length, rate in pattern.branches]
    if pattern.global_tokens:
        branches.append(Branch(UNBOUNDED, 1, pattern.global_tokens, True))
    return tuple(branches)


PATTERN_SCHEMA = (
    "SymInt[] segment_lengths, SymInt[] dilation_rates, str head_offsets, str queries, SymInt offset_shift, "
    "SymInt[] head_shard, SymInt global_tokens"
)


def pattern_of(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: str,
    queries: str,
    offset_shift: int,
    head_shard: Sequence[int],
    global_tokens: int,
) -> DilationPattern:
    """Return the pattern that an operator's arguments spell out, without the warnings that its maker has had."""
    return _pattern_of(
        tuple(segment_lengths), tuple(dilation_rates), head_offsets, queries, offset_shift, tuple(head_shard) or None,
        global_tokens,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _pattern_of(*arguments: Any) -> DilationPattern:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DilationPattern(*arguments)


def _read_option(option: str, text: str) -> tuple[str, Any]:
    name, _, number = option.partition("=")
    numbers = {"shift": "offset_shift", "global": "global_tokens"}
    if name in numbers and number.isdecimal():
        return numbers[name], int(number)
    for field, choices in (("head_offsets", get_args(HeadOffsets)), ("queries", get_args(Queries))):
        if option in choices:
            return field, option
    raise ValueError(
        f"cannot read {option!r} in the pattern {text!r}: after a semicolon may come mod, block, kept, all, global=1, "
        "shift=3"
    )
