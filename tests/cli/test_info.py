import dataclasses

import pytest

from longnet.data.shards import TokenData
from longnet.model.budget import count_parameters
from longnet.training.config import to_toml


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


def test_mistakes_are_one_line(call, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.toml").write_text("[model]\nhiden_size = 3\n")
    cases = [
        ((tmp_path / "none",), "there is no"),
        ((tmp_path / "empty",), "holds no model"),
        ((tmp_path / "odd.toml",), "did you mean hidden_size"),
        ((words, "-o", tmp_path / "x.png"), "a data folder has no attention to draw"),
        ((words, "--tokens", "0"), "--tokens must be at least 1"),
    ]
    for arguments, message in cases:
        assert call("info", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert error.count("\n") == 1, error
