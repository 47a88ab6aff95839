"""The examples run, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["trains 87,794 of 87,794 parameters"]),
        (("--lora", "4", "--lr", "1e-2", "--checkpoint-tiles", "100"), ["trains 2,402 of 90,196", "checkpointed"]),
    ],
    ids=["full", "lora, checkpointed"],
)
def test_slides_that_were_held_out_are_told_apart(arguments, said, capsys):
    example = load("slide_classification")
    assert example.main(arguments) > 0.9
    printed = capsys.readouterr().out
    assert "held out, 12 slides: AUC" in printed
    assert all(words in printed for words in said)


def test_slides_of_ones_own_are_split_as_their_file_says(tmp_path, capsys):
    example = load("slide_classification")
    example.write_made_up_slides(tmp_path, 9)
    rows = [f"slide-{number},{number % 3},{'train' if number < 6 else 'test'}" for number in range(9)]
    labels = tmp_path / "own.csv"
    labels.write_text("\n".join(["slide,label,split", *rows]) + "\n")
    accuracy = example.main([str(tmp_path), str(labels), "--epochs", "1", "--batch-tiles", "300"])
    assert 0 <= accuracy <= 1
    assert "held out, 3 slides: accuracy" in capsys.readouterr().out
    labels.write_text("slide,label\nelsewhere,0\n")
    with pytest.raises(ValueError, match="names elsewhere, of which"):
        example.main([str(tmp_path), str(labels)])


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    example = load("slide_classification")
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 1, 0, 1])
    assert example.area_under_curve(scores, labels) == 3.5 / 4


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_says_how_to_run_it(path):
    assert f"`python examples/{path.name}`" in path.read_text()
    assert path.stem not in sys.stdlib_module_names
