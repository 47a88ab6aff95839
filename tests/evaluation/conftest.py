import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from longnet import LongNetConfig, LongNetForCausalLM


class ArraySplit:
    """Token data in memory."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int64)
        self.tokens = len(self.ids)

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


@pytest.fixture
def tokenizer():
    alphabet = sorted(ByteLevel.alphabet())
    assert math.log2(len(alphabet)) == 8
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")  # noqa: S106
