"""The examples run, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_transformer_of_ones_own_learns_what_lies_far_back(capsys):
    assert load("own_transformer").main() < 1.0  # log(16) = 2.77 is chance
    assert "nats a symbol" in capsys.readouterr().out


def test_a_llama_is_converted_saved_and_loaded(capsys):
    assert load("llama").main() < 1e-6
    assert "generates" in capsys.readouterr().out


def test_an_encoder_finds_a_mark_in_long_rows(capsys):
    assert load("long_features").main() > 0.8


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_says_how_to_run_it(path):
    assert f"`python examples/{path.name}`" in path.read_text()
    assert path.stem not in sys.stdlib_module_names
