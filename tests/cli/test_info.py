import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from longnet.cli.recipe import load_recipe
from longnet.data.shards import TokenData
from longnet.model.budget import count_parameters, longest_sequence, training_memory
from longnet.training.config import Recipe, to_toml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_file(recipe, words, tmp_path):
    tables = {name: {k: v for k, v in table.items() if k != "vocab_size"}
              for name, table in recipe.resolve(TokenData.open(words)).items()}  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(tables))
    return path


def test_a_recipe(call, recipe, recipe_file, words, capsys, tmp_path):
    picture = tmp_path / "attention.png"
    assert call("info", recipe_file, "-o", picture) == 0
    printed = capsys.readouterr().out
    total, embedding, multiplied = count_parameters(recipe.model_config(TokenData.open(words)))
    assert f"{total:,}; {total - embedding:,} without the {embedding:,} of embeddings" in printed
    assert "3 steps of 2 × 64 = 128 tokens, 384 in all" in printed
    # 64 tokens: segments of 16 see 16 · 17 / 2 pairs each, 16 of 64 rows 16 · 17 / 2 once; dense 64 · 65 / 2.
    pairs = 4 * 136 + 136
    assert f"{4 * 16 * pairs / 64:.3e} in attention, {pairs / 2080:.3f} × that of dense attention" in printed
    assert f"{2 * multiplied:.3e} in weights" in printed
    assert "training" in printed
    assert picture.stat().st_size > 5000
    assert call("info", recipe_file, "--tokens", "1024") == 0
    assert "a token forward at 1,024 tokens" in capsys.readouterr().out


def test_a_recipe_whose_data_are_not_there(call, recipe, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\npath = "nowhere"\n[model]\npreset = "2.7b"\n')
    assert call("info", path) == 0
    printed = capsys.readouterr().out
    assert "not prepared yet: a vocabulary of 100,352 is assumed" in printed
    assert "2,775,372,800" in printed
    assert dataclasses.is_dataclass(recipe)


def test_memory_across_ranks(call, recipe, recipe_file, words, capsys):
    config, options = recipe.model_config(TokenData.open(words)), {"sequences": 1, "dp": 2}
    flags = ("--parallel.dp", "2", "--parallel.sp", "4", "--memory", "0.25", "--train.checkpoint-activations")
    assert call("info", recipe_file, *flags) == 0
    printed = capsys.readouterr().out
    needed = training_memory(config, tokens=64, sp=4, checkpoint_activations=True, **options)
    assert f"each of 2 × 4 ranks in training {needed.total / 1e6:.3g} MB: weights" in printed
    assert f"halo {needed.halo / 1e6:.3g} MB, loss {needed.loss / 1e6:.3g} MB" in printed
    lengths = [
        longest_sequence(config, memory=2**28, sp=sp, checkpoint_activations=True, **options) for sp in (1, 8, 64)
    ]
    assert 0 < lengths[0] < lengths[1] < lengths[2]
    said = ", ".join(f"{length:,} with parallel.sp = {sp}" for sp, length in zip((1, 8, 64), lengths, strict=True))
    assert f"sequence in 0.25 GiB a rank, in tokens: {said} (parallel.dp = 2)" in printed
    # Dense attention lies on one rank.
    assert call("info", recipe_file, "--model.attention", "sdpa", "--memory", "0.25") == 0
    printed = capsys.readouterr().out
    assert "memory      training " in printed
    assert "with parallel.sp = 1 (" in printed


def test_a_recipe_in_chunks_tells_of_its_log(call, recipe_file, capsys):
    assert call("info", recipe_file, "--train.chunk-tokens", "24") == 0
    printed = capsys.readouterr().out
    assert "in chunks of 24 tokens" in printed
    assert "on disk" in printed


def test_the_commands_of_the_documentation_are_recipes():
    """What docs/distributed.md starts under torchrun: tables that go together, with as many ranks as processes."""
    text = (ROOT / "docs/distributed.md").read_text().partition("## Launching")[2].partition("## How")[0]
    commands = re.findall(
        r"torchrun (.*?)-m longnet train (\S+) -o RUN --resume (.*?)$", text.replace("\\\n", ""), re.MULTILINE
    )
    assert len(commands) == 3
    for launch, path, flags in commands:
        nodes = re.search(r"--nnodes (\d+)", launch.replace('"$SLURM_JOB_NUM_NODES"', "8"))
        each = re.search(r"--nproc-per-node (\d+)", launch)
        recipe = load_recipe(Path(path), flags.split(), kind=Recipe)
        recipe.resolve(SimpleNamespace(vocab_size=100_352, end_of_text=None))
        assert recipe.parallel.size == int(nodes[1] if nodes else 1) * int(each[1])


def test_a_run(call, run_folder, capsys):
    assert call("info", run_folder) == 0
    printed = capsys.readouterr().out
    assert "checkpoints/step-00000003" in printed
    assert "trained at  64 tokens" in printed
    assert "dilated, 16:1,64:4" in printed


def test_data(call, words, capsys):
    assert call("info", words) == 0
    printed = capsys.readouterr().out
    data = TokenData.open(words)
    assert f"{data.train.tokens:,} tokens, {data.train.bytes:,} bytes of text" in printed
    assert "20 documents in 1 shards" in printed
    sizes = sorted(data.train.documents[1:] - data.train.documents[:-1])
    assert f"all {sizes[-1]:,}" in printed
    assert "a test" in printed


def test_where_data_come_from_is_told_in_words(call, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("a = 1\n")
    (source / "b.py").write_text("")
    assert call("prepare", source, "-o", tmp_path / "data", "--validation", "0") == 0
    assert call("info", tmp_path / "data") == 0
    told = dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert told["skipped"] == "empty 1"
    assert told["duplicates"] == "0"
    assert f"numpy {np.__version__}" in told["versions"]
    assert f"sources {source}, tokenizer bytes, train bpe none" in told["identity"]
    assert "suffixes none" in told["identity"]


def test_mistakes_are_one_line(call, words, recipe_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.toml").write_text("[model]\nhiden_size = 3\n")
    cases = [
        ((tmp_path / "none",), "there is no"),
        ((tmp_path / "empty",), "holds no model"),
        ((tmp_path / "odd.toml",), "did you mean hidden_size"),
        ((words, "-o", tmp_path / "x.png"), "a data folder has no attention to draw"),
        ((words, "--tokens", "0"), "--tokens must be at least 1"),
        ((recipe_file, "--memory", "0"), "--memory must be a number of GiB above 0"),
        ((words, "--memory", "80"), "--memory goes with a recipe"),
        ((words, "--parallel.sp", "2"), "--parallel.sp goes with a recipe"),
        ((recipe_file, "--parallel.pp", "2"), "--parallel.pp"),
        ((recipe_file, "--parallel.dp", "3"), "must divide train.batch_sequences = 2"),
        ((recipe_file, "--parallel.sp", "2", "--model.attention", "sdpa"), "needs model.attention = 'dilated'"),
    ]
    for arguments, message in cases:
        assert call("info", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert error.count("\n") == 1, error
