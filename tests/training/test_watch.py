"""Who is named where a job stands still."""

import pytest

from longnet.training.watch import _Beat, _culprits

BEFORE = [_Beat(10, 5, "a.py:1"), _Beat(11, 5, "b.py:2"), _Beat(9, 5, "c.py:3")]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ([(20, 5), (11, 5), (19, 5)], "rank 1 has not answered for 2 s or more: stopped, or its machine is lost"),
        ([(20, 5), (11, 5), (9, 4)], "ranks 1, 2 have not answered for 2 s or more: stopped, or its machine is lost"),
        ([(20, 6), (21, 5), (19, 6)], "rank 1 has not gone on for 4 s: rank 1 at b.py:2"),
        (
            [(20, 5), (21, 5), (19, 5)],
            "no rank has gone on for 4 s: rank 0 at a.py:1, rank 1 at b.py:2, rank 2 at c.py:3",
        ),
    ],
)
def test_silent_ranks_come_before_those_that_are_behind(now, told):
    beats = [_Beat(count, marks, before.place) for (count, marks), before in zip(now, BEFORE, strict=True)]
    assert _culprits(BEFORE, beats, 4) == told
