import numpy as np
import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.data.tokenizer import load_tokenizer


class ArraySplit:
    """Token data in memory."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int64)
        self.tokens, self.name = len(self.ids), "validation"

    def read(self, start, stop):
        assert 0 <= start < stop <= self.tokens, "a split was read beyond its end"
        return self.ids[start:stop]


@pytest.fixture
def make_split():
    return ArraySplit


@pytest.fixture
def split():
    return ArraySplit(np.random.default_rng(0).integers(0, 257, 700))


@pytest.fixture
def token_bytes():
    return np.array([1] * 256 + [0], dtype=np.int32)


@pytest.fixture
def model():
    """A model whose predictions depend on far tokens, as an untrained one's hardly do."""
    torch.manual_seed(1)
    config = LongNetConfig.preset(
        "tiny", vocab_size=257, segment_lengths=(16, 64), dilation_rates=(1, 4), initializer_range=0.5
    )
    return LongNetForCausalLM(config).double()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("bytes")
