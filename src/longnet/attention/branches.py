"""A branch of a pattern: which rows of a segment it keeps, and how heads share out their offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

UNBOUNDED = 2**62  # a length that no document has, a number of rows that no segment keeps


class Branch(NamedTuple):
    """A branch as it is computed.

    Attributes:
        length: w, positions of a segment.
        rate: r, the distance of kept rows.
        rows: kept of a segment at most, the first ones.
        is_dense: all queries of a segment attend, not the kept ones alone; of rate 1 without a bound all are kept.
    """

    length: int
    rate: int
    rows: int
    is_dense: bool

    @property
    def is_covering(self) -> bool:
        """Every position is kept, so that every query attends and every key is attended to."""
        return self.rate == 1 and self.rows == UNBOUNDED

    def kept_rows(self, positions: int, offset: int) -> int:
        """Count the rows that a head with this offset keeps of a segment's first `positions` positions."""
        return min(self.rows, kept_rows(positions, self.rate, offset))

    def pairs(self, positions: int, offset: int, *, is_causal: bool) -> int:
        """Count the (query, key) pairs of a segment's first `positions` positions in a head with this offset."""
        rows = self.kept_rows(positions, offset)
        if not self.is_dense:
            return rows * (rows + 1) // 2 if is_causal else rows * rows
        if is_causal:  # the key at offset + m · rate is seen by all queries from there on
            return rows * (positions - offset) - self.rate * (rows * (rows - 1) // 2)
        return rows * positions


class OffsetGrid(NamedTuple):
    """Heads `head + i · offset_step + j · head_step`, i < offsets, j < heads, each with offset `offset + i`."""

    head: int
    offset: int
    offsets: int
    offset_step: int
    heads: int
    head_step: int

    def cut(self, *places: int) -> Iterator[OffsetGrid]:
        """Yield the grid in parts that begin at the `i` given, those outside left out; none where it has no head."""
        cuts = sorted({0, self.offsets, *(place for place in places if 0 < place < self.offsets)})
        for low, high in itertools.pairwise(cuts if self.heads else ()):
            yield self._replace(head=self.head + low * self.offset_step, offset=self.offset + low, offsets=high - low)


def kept_rows(positions: int, rate: int, offset: int) -> int:
    """Count the u in range(positions) with u % rate == offset."""
    return max(0, -(-(positions - offset) // rate))
