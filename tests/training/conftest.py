import numpy as np
import pytest

from longnet.data.tokenizer import load_tokenizer, token_bytes
from longnet.data.writer import DataWriter
from longnet.evaluation.perplexity import EvaluateConfig
from longnet.training.checkpoint import CheckpointConfig
from longnet.training.config import DataConfig, ModelConfig, ParallelConfig, Recipe, SampleConfig, TrainConfig
from longnet.training.optim import OptimConfig

# So small that a step takes milliseconds; the dropout makes the random state matter.
TABLES = {
    "model": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_dropout": 0.1,
        "segment_lengths": (8, 32), "dilation_rates": (1, 2),
    },
    "optim": {"lr": 1e-2, "warmup_steps": 4},
    "train": {"steps": 12, "tokens": 32, "batch_sequences": 4, "log_every": 1, "device": "cpu"},
    "evaluate": {"contexts": (8, 32), "tokens": 64},
    "sample": {},
    "checkpoint": {"every": 4},
    "parallel": {},
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of data: bytes that an order-1 model can learn something of."""
    folder = tmp_path_factory.mktemp("data") / "DATA"
    return write_data(folder, seed=0)


def write_data(folder, *, seed, tokens=4000):
    tokenizer = load_tokenizer("bytes")
    steps = np.random.default_rng(seed).integers(1, 4, size=tokens)
    ids = 97 + np.cumsum(steps) % 26
    with DataWriter(folder, tokenizer, token_bytes(tokenizer)) as writer:
        for name, part in (("train", ids[: -tokens // 8]), ("validation", ids[-tokens // 8 :])):
            writer.splits[name].append(np.append(part, 256), ends=[len(part) + 1], text_bytes=len(part))
        writer.finish(provenance={})
    return folder


@pytest.fixture(scope="session")
def make_recipe(data):
    """Return a function that makes a recipe of TABLES with some keys replaced, as in train={"steps": 3}."""

    def make(path=data, **replaced):
        kinds = {
            "model": ModelConfig, "optim": OptimConfig, "train": TrainConfig, "evaluate": EvaluateConfig,
            "sample": SampleConfig, "checkpoint": CheckpointConfig, "parallel": ParallelConfig,
        }  # fmt: skip
        tables = {name: kind(**{**TABLES[name], **replaced.get(name, {})}) for name, kind in kinds.items()}
        return Recipe(data=DataConfig(path=path), **tables)

    return make
