"""Windows: every token once an epoch, and the same order whoever asks, whenever."""

import functools
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet.data.loader import Windows
from longnet.data.shards import Shard, Split

FOLDER = Path(tempfile.mkdtemp())


@functools.cache
def stream(tokens):
    """Return a split whose token at t is t, in two shards."""
    parts = [np.arange(tokens // 3, dtype=np.uint16), np.arange(tokens // 3, tokens, dtype=np.uint16)]
    shards = []
    for number, part in enumerate(parts):
        path = FOLDER / f"{tokens}-{number}.npy"
        np.save(path, part)
        shards.append(Shard.open(path, len(part), part.dtype))
    return Split("train", tokens, tokens, np.array([0, tokens]), shards)


@pytest.fixture(scope="module", autouse=True)
def _swept():
    yield
    shutil.rmtree(FOLDER)


@given(
    tokens=st.integers(1, 40),
    more=st.integers(1, 200),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    sequences=st.integers(1, 7),
)
def test_every_token_but_the_remainder_is_an_input_once_an_epoch(tokens, more, seed, epoch, sequences):
    length = tokens + more
    windows = Windows(stream(length), tokens, seed=seed)
    rows = []
    first, last = epoch * len(windows), (epoch + 1) * len(windows)
    for step in range(first // sequences, -(-last // sequences)):
        inputs, targets = windows.batch(step, sequences)
        assert torch.equal(targets, (inputs + 1) % length)
        rows += [row for index, row in enumerate(inputs, step * sequences) if first <= index < last]
    seen = torch.cat(rows)
    assert len(seen) == len(seen.unique()) == length - length % tokens


@given(seed=st.integers(0, 99), ranks=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 50))
def test_the_ranks_share_one_batch(seed, ranks, step):
    whole = Windows(stream(101), 7, seed=seed).batch(step, 6)
    parts = [Windows(stream(101), 7, seed=seed).batch(step, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for one, shared in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(shared))
        assert one.dtype == torch.int64
        assert one.is_contiguous()


def test_epochs_and_seeds_differ_in_shift_and_order():
    def firsts(seed, epoch):
        windows = Windows(stream(1000), 10, seed=seed)
        return windows.batch(epoch, len(windows))[0][:, 0]

    starts = {(seed, epoch): firsts(seed, epoch) for seed in range(3) for epoch in range(3)}
    orders = {tuple((start - start.min()).tolist()) for start in starts.values()}
    assert len(orders) == 9
    assert len({int(start[0]) % 10 for start in starts.values()}) > 3


def test_the_order_is_this_one_for_ever():
    """A run that is resumed under another version must go on in the same order."""
    windows = Windows(stream(50), 10, seed=1)
    assert windows.batch(0, 10)[0][:, 0].tolist() == [37, 7, 17, 47, 27, 15, 45, 35, 25, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 100, "seed": 0}, "the train split holds 100 tokens, too few for sequences of 100"),
        ({"tokens": 0, "seed": 0}, "at least 1 token"),
        ({"tokens": 5, "seed": -1}, "a seed of 0 or more"),
    ],
)
def test_windows_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows(stream(100), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1, "sequences": 1}, "no batch"),
        ({"step": 0, "sequences": 0}, "no batch"),
        ({"step": 0, "sequences": 4, "rank": 4, "ranks": 4}, "no batch"),
        ({"step": 0, "sequences": 6, "rank": 0, "ranks": 4}, "6 sequences cannot be shared evenly by 4 ranks"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows(stream(100), 9, seed=0).batch(**arguments)


def test_a_billion_tokens_are_read_at_once(tmp_path):
    """A sparse file of 10⁹ tokens: no batch may cost work that grows with the corpus."""
    path = tmp_path / "train-00000.npy"
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(10**9,))
    tokens[-1] = 7
    del tokens
    windows = Windows(
        Split("train", 10**9, 10**9, np.array([0, 10**9]), [Shard.open(path, 10**9, np.dtype(np.uint16))]), 2048, seed=0
    )
    windows.batch(0, 1)
    begin = time.perf_counter()
    for step in range(10**6, 10**6 + 20):
        windows.batch(step, 64)
    assert 20 * 64 * 2048 / (time.perf_counter() - begin) > 1e7  # 1e8 and more on an idle core
