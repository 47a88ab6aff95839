"""How many layers a pattern needs until every token can have heard of every other: its graph's diameter."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

Branches = Sequence[tuple[int, int]]  # (segment length, dilation rate)


def hops_nested(branches: Branches, tokens: int) -> int | float:
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


def hops_searched(branches: Branches, tokens: int) -> int | float:
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
