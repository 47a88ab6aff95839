import functools
import mmap

import numpy as np
import torch

from longnet import measurement

CPU = torch.device("cpu")


def test_interleaved_runs_every_case_in_every_round_each_beginning_with_another():
    calls = []
    times = measurement.interleaved([functools.partial(calls.append, name) for name in "abc"], 3, CPU)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"  # the first round is not counted
    assert [len(rounds) for rounds in times] == [3, 3, 3]


def test_a_ratio_is_the_median_over_rounds():
    assert measurement.ratio([1.0, 10.0, 30.0], [1.0, 1.0, 10.0]) == 3.0  # not 10 / 1, that of the medians


def test_peak_memory_grows_by_what_is_held_and_begins_anew():
    before = measurement.peak_bytes(CPU, reset=True)
    held = mmap.mmap(-1, 2**28)  # from the system: what malloc gives may have been held, and freed, by another test
    np.frombuffer(held, np.uint8)[:] = 1
    assert 0.9 * 2**28 < measurement.peak_bytes(CPU) - before < 1.2 * 2**28
    held.close()
    assert measurement.peak_bytes(CPU, reset=True) - before < 2**27
