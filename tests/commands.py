"""Fixtures of those who test the command line: calling it, and a small run to call it with."""

import sys

import pytest

from corpora import write_words
from longnet.cli.main import main
from longnet.training.config import DataConfig, ModelConfig, Recipe, SampleConfig, TrainConfig
from longnet.training.loop import train


@pytest.fixture
def call(monkeypatch):
    """Run the command line in this process; return the exit status."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words") / "data")


@pytest.fixture(scope="session")
def recipe(words):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pattern = {"segment_lengths": (16, 64), "dilation_rates": (1, 4), "position_embedding": "rope"}
    return Recipe(
        data=DataConfig(path=words),
        model=ModelConfig(**sizes, **pattern),
        train=TrainConfig(steps=3, tokens=64, batch_sequences=2, log_every=1, device="cpu"),
        sample=SampleConfig(every=3, prompt="seg", tokens=5),
    )


@pytest.fixture(scope="session")
def run_folder(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    train(recipe, output, progress=False)
    return output
