"""Every recipe of the repository is one, and says how its data are made."""

import re
import sys
from pathlib import Path

import pytest

from corpora import write_words
from longnet.cli.main import main
from longnet.cli.recipe import find_recipe, load_recipe, recipes
from longnet.comparison.config import ComparisonRecipe
from longnet.comparison.recall import RecallRecipe
from longnet.data.shards import TokenData
from longnet.model.cost import attention_flops

RECALL = [name for name in recipes() if name.startswith("recall-")]  # without data, for `longnet recall`


def test_there_are_recipes():
    assert {"demo", "table2-tiny", "table2-small", "paper-125m", "paper-2.7b"} <= set(recipes())


def test_a_file_comes_before_a_name_and_a_wrong_name_is_told_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "[data]" in find_recipe(Path("demo")).read_text()
    Path("demo").write_text("mine")
    assert find_recipe(Path("demo")).read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"no recipe recipes/table2.toml: .*did you mean table2-"):
        find_recipe(Path("recipes/table2.toml"))


@pytest.mark.parametrize("name", sorted(recipes().keys() - set(RECALL)))
def test_a_recipe_is_read_whole(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # so that no data are prepared
    monkeypatch.setattr(sys, "argv", ["longnet", "info", name])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    attention = load_recipe(Path(name), kind=ComparisonRecipe).model.attention
    assert re.search(rf"^attention +{attention}\b", printed, re.MULTILINE)
    assert "a token in training" in printed
    assert "longnet prepare" in find_recipe(Path(name)).read_text()


def test_table_2_against_a_window_has_what_the_small_one_lacks(tmp_path):
    recipe = load_recipe(
        Path("table2-window"), ["--data.path", str(write_words(tmp_path / "data"))], kind=ComparisonRecipe
    )
    data = TokenData.open(recipe.data.path)
    assert recipe.step_tokens >= 16_384
    assert recipe.step_tokens * recipe.train.steps >= 15_000_000
    shares = {}
    for cell in recipe.all_cells:
        config = recipe.for_cell(cell, data).model_config(data)
        assert max(config.dilation_rates) <= config.num_attention_heads
        shares[cell.attention, cell.length] = attention_flops(config, tokens=cell.length)
    for (attention, length), flops in shares.items():
        wanted = {1024: 0.25, 4096: 0.16}[length] * shares["sdpa", length]
        if attention != "sdpa":
            assert flops == pytest.approx(wanted, rel=0.05 if ":" not in attention else 0.3), (attention, length)


@pytest.mark.parametrize("name", RECALL)
def test_a_recipe_of_recall_makes_every_system_at_a_quarter_of_dense_attention(name):
    recipe = load_recipe(Path(name), kind=RecallRecipe)
    assert f"longnet recall {name}" in find_recipe(Path(name)).read_text()
    flops = {
        system: attention_flops(recipe.model_config(system), tokens=recipe.task.tokens)
        for system in recipe.recall.systems
    }
    dense = flops.pop("sdpa")
    assert {"window", "sparse_fixed"} < flops.keys()
    assert all(own < 0.26 * dense for own in flops.values())
