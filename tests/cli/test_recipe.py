"""Recipe files and flags: what is read, and how mistakes are named."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from longnet.cli.main import main
from longnet.cli.recipe import load_recipe
from longnet.training.config import Recipe

GOOD = """
[data]
path = "DATA"
[model]
preset = "tiny"
segment_lengths = [64, 256]
eos_token_id = [1, 2]
[optim]
lr = 1
betas = [0.9, 0.95]
[train]
compile = true
[evaluate]
contexts = [64, 256]
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # messages name the file as it was given
    Path("r.toml").write_text(GOOD)
    return Path("r.toml")


def test_a_file_is_read(file):
    recipe = load_recipe(file, kind=Recipe)
    assert recipe.data.path == Path("DATA")
    assert (recipe.model.preset, recipe.model.segment_lengths) == ("tiny", (64, 256))
    assert recipe.model.eos_token_id == [1, 2]
    assert recipe.model.hidden_size is None
    assert (recipe.optim.lr, recipe.optim.betas) == (1.0, (0.9, 0.95))
    assert recipe.train.compile is True
    assert recipe.evaluate.contexts == (64, 256)
    assert recipe.train.tokens == 2048


def test_flags_have_the_last_word(file):
    flags = (
        "--optim.lr 3e-4 --train.compile=false --train.steps 7 --evaluate.contexts 8 16 --optim.schedule cosine "
        "--data.path elsewhere --model.attention sdpa"
    )
    recipe = load_recipe(file, flags.split(), kind=Recipe)
    assert recipe.optim.lr == 3e-4
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.train.compile is False
    assert recipe.train.steps == 7
    assert recipe.evaluate.contexts == (8, 16)
    assert recipe.data.path == Path("elsewhere")
    assert recipe.model.attention == "sdpa"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 3", "r.toml: [optim] has no key 'lrr': did you mean lr?"),
        ("[optimm]\nlr = 3", "r.toml: there is no table [optimm]: did you mean [optim]?"),
        ("[train]\nlr = 3", "r.toml: [train] has no key 'lr': did you mean lr of [optim]?"),
        ("[model]\nhiden_size = 3", "r.toml: [model] has no key 'hiden_size': did you mean hidden_size?"),
        ("lr = 3", "r.toml: 'lr' stands outside the tables: did you mean lr of [optim]?"),
        ("output = 'x'", "r.toml: 'output' stands outside the tables"),
        ("optim = 3", "r.toml: 'optim' stands outside the tables"),
        ('[train]\nsteps = "10"', 'r.toml: [train] steps must be an integer, got "10"'),
        ("[train]\nsteps = 1.5", "r.toml: [train] steps must be an integer, got 1.5"),
        ("[train]\nsteps = true", "r.toml: [train] steps must be an integer, got true"),
        ("[train]\ncompile = 1", "r.toml: [train] compile must be true or false, got 1"),
        ("[optim]\nbetas = [0.9]", "r.toml: [optim] betas must be a list of a number and a number, got [0.9]"),
        ("[evaluate]\ncontexts = 64", "r.toml: [evaluate] contexts must be a list of integers, got 64"),
        ('[optim]\nschedule = "lin"', 'r.toml: [optim] schedule must be one of "polynomial", "linear", "cosine", "con'),
        (
            "[model]\neos_token_id = 1.5",
            "r.toml: [model] eos_token_id must be an integer or a list of integers, got 1.5",
        ),
        ("[optim]\nlr = -1", "r.toml: optim.lr must be above 0, got -1"),
        ("[optim]\nbetas = [0.9, 1.0]", "r.toml: optim.betas must lie between 0 and 1"),
        ("[train]\nsteps = 0", "r.toml: train.steps must be at least 1, got 0"),
        (
            "[train]\nbatch_sequences = 4\naccumulate = 3",
            "r.toml: train.accumulate must divide train.batch_sequences = 4",
        ),
        ("[checkpoint]\nkeep = -1", "r.toml: checkpoint.keep must be 0 or more, got -1"),
        ("[sample]\ntokens = 0", "r.toml: sample.tokens must be at least 1, got 0"),
        ("[optim\nlr = 3", "r.toml is no TOML: Expected ']'"),
        ("[optim]\nlr = 1e-3", "r.toml: [data] path is missing: write it there, or give --data.path"),
    ],
)
def test_a_mistake_in_the_file_is_named(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_recipe(file, kind=Recipe)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim.lrr 3", "Unknown option: --optim.lrr. Did you mean --optim.lr?"),
        ("--optim.lr abc", 'Invalid value for --optim.lr: unable to convert "abc" into float.'),
        ("--train.steps 3.5", "--train.steps must be an integer, like 512 or 8K, got 3.5"),
        ("--train.steps 1e3", "--train.steps must be an integer, like 512 or 8K, got 1e3"),
        ("--evaluate.contexts 64 1.5", "--evaluate.contexts must be a list of integers, like 512,2048,8K, got 1.5"),
        ("--optim 3", "--optim is a table: give one of its keys, as in --optim.key value"),
        ("--optim.lr=-1", "optim.lr must be above 0, got -1.0"),
        ("--model.attention dense", 'Invalid value "dense" for --model.attention'),
        ("extra", "Unused Tokens: ['extra']"),
    ],
)
def test_a_mistake_in_a_flag_is_named(file, flags, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_recipe(file, flags.split(), kind=Recipe)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no recipe nowhere.toml: give a TOML file"):
        load_recipe(Path("nowhere.toml"), kind=Recipe)


@dataclass(kw_only=True)
class Comparison:
    """A table that only some commands know."""

    lengths: tuple[int, ...] = ()
    """Of training."""


@dataclass(kw_only=True)
class Extended(Recipe):
    """A recipe with another table."""

    compare: Comparison = field(default_factory=Comparison)


def test_another_table_is_for_those_that_know_it(file):
    file.write_text(GOOD + "[compare]\nlengths = [1, 2]\n")
    assert load_recipe(file, kind=Recipe).optim.lr == 1
    assert load_recipe(file, kind=Extended).compare.lengths == (1, 2)
    assert load_recipe(file, ["--compare.lengths", "3"], kind=Extended).compare.lengths == (3,)
    file.write_text(GOOD + "[compare]\nlength = [1, 2]\n")
    with pytest.raises(ValueError, match=r"\[compare\] has no key 'length': did you mean lengths\?"):
        load_recipe(file, kind=Extended)


def run(monkeypatch, *arguments):
    """Run the command line in this process; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("r.toml", [], "DATA holds no index.json: not a folder that `longnet prepare` has finished"),
        ("nowhere.toml", [], "there is no recipe nowhere.toml"),
        ("r.toml", ["--optim.lrr", "1"], "Did you mean --optim.lr?"),
    ],
)
def test_the_command_says_it_in_one_line(file, monkeypatch, capsys, recipe, flags, message):
    assert run(monkeypatch, "train", recipe, "-o", "RUN", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("longnet: ")
    assert message in error
    assert error.count("\n") == 1


def test_every_setting_has_help(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "--optim.lr",
        "Learning rate at its peak",
        "--model.hidden-size",
        "--resume",
        "Optimizer steps of the",
    ):
        assert words in shown
