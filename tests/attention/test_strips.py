"""Notebooks draw a pattern: what its strips say, by counting."""

import re
from xml.etree import ElementTree as ET

import pytest

from longnet import DilationPattern
from longnet.attention.strips import shares


@pytest.mark.parametrize(
    ("length", "rate", "offset", "tokens"),
    [(8, 3, 1, 40), (7, 2, 1, 300), (64, 5, 4, 201), (3, 5, 4, 130), (1, 1, 0, 70)],
)
def test_a_cell_is_as_dark_as_the_share_of_its_positions_that_is_kept(length, rate, offset, tokens):
    size = -(-tokens // 64)
    expected = []
    for start in range(0, tokens, size):
        cell = range(start, min(start + size, tokens))
        expected.append(sum(position % length % rate == offset for position in cell) / len(cell))
    assert shares(length, rate, offset, tokens=tokens) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        DilationPattern((16, 64), (1, 4)),
        DilationPattern.paper(),
        DilationPattern((16, 64), (1, 4), head_offsets="block", queries="all"),
        DilationPattern((16, 64), (1, 4)).shard(2, 4),
        DilationPattern.geometric(segment_length=2048, max_length=2**30),
    ],
    ids=["two", "paper", "block", "shard", "billion"],
)
def test_notebooks_draw_what_repr_writes(pattern):
    drawn = pattern._repr_html_()
    svg = ET.fromstring(drawn)  # noqa: S314  # our own
    assert svg.get("aria-label") == str(pattern)
    assert len(drawn) < 300_000
    longest = max(pattern.segment_lengths)
    bars = [path.get("d").count("M") - 1 for path in svg.iter("{http://www.w3.org/2000/svg}path")]
    assert bars == [longest // length for length in pattern.segment_lengths if longest <= 64 * length]
    named = re.findall(r">w=([\d,]+) r=(\d+)<", drawn)
    assert [(int(w.replace(",", "")), int(r)) for w, r in named] == list(pattern.branches)
    assert eval(repr(pattern)) == pattern  # noqa: S307
