"""A whole `longnet recall` of minute models: stopped, gone on with, reported."""

import re
import sys
from pathlib import Path

import pytest
import torch

from longnet.cli.main import main
from longnet.cli.recipe import load_recipe
from longnet.comparison import recall as recall_module
from longnet.comparison.recall import RecallCell, RecallCellResult, RecallOutcome, RecallRecipe, run_recall_cell
from longnet.comparison.recall_report import SystemRecall, describe_headline, gather_systems
from longnet.evaluation.recall import RecallResult, RecallTask

COMMITTED = Path(__file__).parents[2] / "benchmarks/results"
RECIPE = """
[task]
tokens = 64
distances = [2, 16, 62]
pairs = [4]
scored = [4, 1]
keys = 16
values = 4
sequences = 8
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 4
segment_lengths = [8, 64]
dilation_rates = [1, 4]
queries = "all"
[optim]
warmup_steps = 2
[recall]
systems = ["sdpa", "window", "8:1,64:4"]
seeds = [0, 1]
steps = 6
batch_sequences = 4
save_every = 2
log_every = 2
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recall") / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["longnet", "recall", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_cells_are_run_once_and_reported(recipe_file, tmp_path, monkeypatch, capsys):
    assert not run(monkeypatch, recipe_file, "-o", tmp_path)
    assert "6 of 6 cells are finished" in capsys.readouterr().out
    folders = sorted(path.name for path in (tmp_path / "cells").iterdir())
    assert folders == sorted(f"{name}-seed{seed}" for name in ("sdpa", "window", "8x1_64x4") for seed in (0, 1))
    page = (tmp_path / "report.md").read_text()
    dense, *others = (
        RecallCellResult.load(tmp_path / "cells" / f"{name}-seed0") for name in ("sdpa", "window", "8x1_64x4")
    )
    assert page.split("\n\n")[1].startswith("**With 4 pairs in 64 tokens, as a share of what dense attention recalls")
    for result in others:
        assert f"{result.attention_flops / dense.attention_flops:.3f}" in page
        assert result.losses[-1][0] == 6
    asked = sum(sum(cell.results[0].asked) for cell in (dense, *others))
    assert asked == 3 * 8 * 4
    for word in ("A pass key", "Where two rows meet", "By distance modulo 4", "What this cannot show", "[task]"):
        assert word in page
    for name in re.findall(r"\]\((.*?\.svg)\)", page):
        assert (tmp_path / name).is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert not run(monkeypatch, recipe_file, "-o", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before
    capsys.readouterr()
    assert run(monkeypatch, recipe_file, "-o", tmp_path, "--recall.steps", "8") == 2
    assert "holds a comparison with another recipe: recall.steps (6 → 8)" in capsys.readouterr().err


def test_another_command_says_whose_recipe_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longnet", "info", "recall-tiny"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("longnet: recall-tiny is a recipe of longnet recall")


def systems_of(name):
    """Return the recipe and the systems of a committed run, its report's headline that of its results."""
    recipe = load_recipe(Path(name), kind=RecallRecipe)
    results = [RecallCellResult.load(COMMITTED / name / "cells" / cell.name) for cell in recipe.all_cells]
    systems = gather_systems(RecallOutcome(recipe, results, {}, False))
    assert f"**{describe_headline(systems, recipe.task)}**" in (COMMITTED / name / "report.md").read_text()
    return recipe, systems


def test_the_committed_report_at_4096_tokens_is_of_the_committed_results():
    recipe, systems = systems_of("recall-long")
    assert recipe.task.tokens == 4096
    assert {one.system for one in systems} == set(recipe.recall.systems)


def test_the_committed_report_is_of_the_committed_results_and_holds_the_bar():
    recipe, systems = systems_of("recall-tiny")
    by_name = {one.system: one for one in systems}
    ours, dense = by_name["64:1,512:8;all"], by_name["sdpa"]
    assert ours.share <= 0.26
    for pairs in recipe.task.scored:
        pairs_of = zip(ours.accuracies(recipe.task, pairs), dense.accuracies(recipe.task, pairs), strict=True)
        assert all(own >= 0.95 * other for own, other in pairs_of)


def test_a_cell_that_was_stopped_goes_on_to_the_same_bits(recipe_file, tmp_path, monkeypatch):
    recipe, cell = load_recipe(recipe_file, kind=RecallRecipe), RecallCell("8:1,64:4", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run_recall_cell(recipe, cell, whole, False)

    class Killed(BaseException):
        pass

    update, taken = recall_module.update, []

    def update_thrice(*arguments, **keywords):
        if len(taken) == 3:
            raise Killed
        taken.append(1)
        update(*arguments, **keywords)

    monkeypatch.setattr(recall_module, "update", update_thrice)
    with pytest.raises(Killed):
        run_recall_cell(recipe, cell, parts, False)
    assert torch.load(parts / "state.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(recall_module, "update", update)
    run_recall_cell(recipe, cell, parts, False)
    one, other = (RecallCellResult.load(folder) for folder in (whole, parts))
    assert one.losses == other.losses
    assert one.results == other.results
    assert not (parts / "state.pt").exists()


def system(name, right, flops):
    result = RecallResult(2, [0, 100, 100], [0, *right], [0, 0, 0], [0, 0, 0])
    cell = RecallCellResult(name, 0, "", 1, flops, 1, [], [result], {})
    return SystemRecall(name, [cell], flops / 1000)


def test_the_headline_says_who_reaches_dense_attention_at_every_distance():
    task = RecallTask(tokens=8, distances=(1, 2, 3), pairs=(2,), scored=(2,), keys=4, values=4)
    systems = [system("sdpa", (100, 80), 1000), system("window", (100, 20), 250), system("8:1,64:4;all", (96, 80), 240)]
    assert describe_headline(systems, task) == (
        "With 2 pairs in 8 tokens, as a share of what dense attention recalls, at the worst distance and with its "
        "share of dense attention's FLOPs: 0.95 or more for LongNet 8:1,64:4;all (0.96 at 1–1, FLOPs 0.240); less for "
        "Window (0.25 at 2–2, FLOPs 0.250). Dense attention itself is right in 0.80 of the questions or more, a "
        "guess in 0.25."
    )
    assert "0.95 or more for no system; less for Window" in describe_headline(systems[:2], task)
    assert describe_headline(systems[1:], task).endswith(
        "worst bucket of distance is: Window 0.20, LongNet 8:1,64:4;all 0.80."
    )
