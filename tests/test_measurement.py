import functools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
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


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor computes with denormal numbers alone")
def test_a_process_that_computes_on_a_cpu_loses_no_time_to_denormal_numbers():
    begin = "import torch; from longnet.measurement import take_device; take_device('cpu')"
    product = "torch.full((2**20,), 1e-30).mul(torch.full((2**20,), 1e-10)).count_nonzero().item()"
    shown = subprocess.run(
        [sys.executable, "-c", f"{begin}; print({product})"],
        env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(shown.stdout) == 0  # in each of its threads
    assert torch.full((9,), 1e-30).mul(1e-10).count_nonzero() == 9  # what a library's user computes is left alone
