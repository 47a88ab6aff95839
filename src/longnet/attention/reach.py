"""How many layers a pattern needs until every token can have heard of every other: its graph's diameter."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Collection

Branches = Collection[tuple[int, int]]  # (segment length, dilation rate)
_SEARCHED_TOKENS = 2**15


def hops(branches: Branches, tokens: int) -> int | float:
    """Return the hops over `tokens` tokens, inf where no number suffices; `DilationPattern.hops` says of what.

    Raises:
        ValueError: lengths and rates that do not divide one another, and tokens too many to search.
    """
    if tokens <= 1:
        return 0
    lengths = {length for length, _ in branches}
    if tokens > max(lengths) and all(max(lengths) % length == 0 for length in lengths):
        return math.inf  # every branch has a boundary there
    sizes = sorted({size for branch in branches for size in branch})
    if all(large % small == 0 for small, large in itertools.combinations(sizes, 2)):
        return _hops_nested(branches, tokens)
    if tokens <= _SEARCHED_TOKENS:
        return _hops_searched(branches, tokens)
    raise ValueError(
        f"the branches {sorted(branches)} have no closed form for hops, since lengths and rates do not divide one "
        f"another; searched up to {_SEARCHED_TOKENS} tokens, got {tokens}"
    )


def _hops_nested(branches: Branches, tokens: int) -> int | float:
    """Return the hops over `tokens` tokens where of any two lengths or rates one divides the other.

    Two tokens that meet first in branch i's segment: one hop brings the query's phase modulo r_i into the other token's
    neighbourhood, any segment of at least r_i tokens; what is left to bridge lies inside it.
    """
    span, hops = tokens, 0
    while span > 1:
        rate = min((r for w, r in branches if w >= span), default=None)
        if rate is None or rate >= span:
            return math.inf
        span, hops = rate, hops + 1
    return hops


def _hops_searched(branches: Branches, tokens: int) -> int | float:
    """Return the hops over `tokens` tokens of any branches, by breadth-first search.

    All tokens of a meeting (one branch, one segment, one phase) hear in one hop what any of them has reached:
    reached[p] holds the tokens within so many hops of p, as the bits of an int.
    """
    meetings = [
        range(start + offset, min(start + length, tokens), rate)
        for length, rate in branches
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
