"""Sentences against figures made up to say one thing or the other."""

import json
from pathlib import Path

import pytest

from longnet.comparison import findings
from longnet.comparison.cell import CellResult
from longnet.comparison.report import _nearest_in_cost
from longnet.comparison.systems import SYSTEMS, kind_of, title_of
from longnet.evaluation.perplexity import ContextResult, paired_difference
from longnet.plots.names import name_length


def cell(attention, length, losses, *, flops=100, training=(3.0, 2.0)):
    """Return a cell whose loss at each context is `losses[context]`, nearly alike in four windows."""
    contexts = [
        ContextResult(context, 4096, 4096, loss, 0.05, [], [loss + wave for wave in (1, -1, loss / 20, -loss / 20)])
        for context, loss in losses.items()
    ]  # fmt: skip
    return CellResult(
        attention, length, "", 8, 1, 10, 5120, 7, {"total": 1000, "embedding": 10}, {"counted": flops}, 1.0, 2, 1,
        [(512 * step, training[0] + (training[1] - training[0]) * step / 20) for step in range(21)], contexts, {},
    )  # fmt: skip


@pytest.fixture
def results():
    return [
        cell("sdpa", 512, {256: 2.0, 512: 1.9, 1024: 2.5}, flops=200),
        cell("dilated", 512, {256: 1.9, 512: 1.8, 1024: 1.8}),
        cell("dilated", 1024, {256: 2.1, 512: 2.0, 1024: 1.7}, training=(2.0, 2.0)),
    ]


def test_steps_within_and_beyond_the_training_length(results):
    dense, short, long = findings.describe_contexts(results)
    assert dense.startswith("Transformer, 512: loss from context 256 → 512: falls (−0.1000 ± ")
    assert "512 → 1K, beyond its training length: rises (+0.6" in dense
    assert "beyond its training length: does not clearly change (+0.0000" in short
    assert "beyond" not in long
    uses = findings.describe_use_of_context(results)
    assert uses[0].startswith(
        "Transformer: within the training length, 1 of 1 steps to a longer context lower the loss"
    )
    assert uses[1].startswith("LongNet: within the training length, 3 of 3 steps")


def test_systems_are_compared_at_their_own_length(results):
    (said,) = findings.describe_systems(results)
    assert "Trained at 512 and scored at 512, LongNet's loss against the Transformer's: −0.1000" in said
    assert said.endswith("lower, at 0.500 × its FLOPs.")
    (said,) = findings.describe_systems([results[0], cell("dilated", 512, {256: 2.2, 512: 2.1, 1024: 2.5}, flops=300)])
    assert said.endswith("higher, at 1.500 × its FLOPs.")


def test_a_window_by_its_pattern_is_a_window(results):
    """One branch that keeps all: what LongNet is compared with, and not LongNet's best."""
    names = {name: (kind_of(name), title_of(name)) for name in ("704:1", "704:1;global=1", "640:1,4096:8")}
    assert names["704:1"] == ("window", "Window 704:1")
    assert {kind for kind, _ in list(names.values())[1:]} == {"dilated"}
    other = cell("704:1", 512, {256: 1.8, 512: 1.7, 1024: 1.8})
    (said,) = findings.describe_systems([results[1], other])
    assert "LongNet's loss against the Window 704:1's: +0.1000" in said
    scores = [(one.attention, one.length, {512: one.at(512).perplexity}) for one in (results[1], other)]
    assert "5.474, Window 704:1 trained at 512 (best LongNet: 6.050, LongNet" in findings.describe_headline(scores)


def test_of_many_differences_those_at_the_nearest_cost_are_drawn():
    losses = {512: 2.0}
    ours = [cell("640:1,4096:8", 512, losses, flops=71), cell("dilated", 512, losses, flops=85)]
    others = [
        cell("sdpa", 512, losses, flops=172),
        cell("704:1", 512, losses, flops=72),
        cell("window", 512, losses, flops=84),
    ]
    pairs = [(one, other) for one in ours for other in others]
    assert _nearest_in_cost(pairs) == [(ours[0], others[1]), (ours[1], others[2])]


def test_longer_training_is_judged_at_the_longest_context(results):
    (said,) = findings.describe_lengths(results, (256, 512, 1024))
    assert "LongNet scored at 1K: training at 1K instead of 512 changes the loss by −0.1000" in said


def test_limits_are_those_of_the_figures(results):
    said = " ".join(findings.describe_limits(results))
    assert "seen 5,120 tokens, 5.1 a parameter; the paper's models saw 29,296,875 times as many" in said
    assert "One seed (7): the standard errors are over 4 windows" in said
    assert "No cell was trained beyond 1K tokens" in said
    assert "still falling at the end in Transformer, 512, LongNet, 512." in said  # the third one's was not


def test_the_headline_is_the_best_cell_of_each_context_whosoever_it_is():
    cells = [
        ("sdpa", 256, {256: 54.325, 1024: 57.308, 4096: 73.431}),
        ("sdpa", 4096, {256: 132.22, 1024: 119.985, 4096: 116.757}),
        ("dilated", 1024, {256: 78.904, 1024: 77.886, 4096: 77.843}),
        ("64:1,1024:8;all", 4096, {256: 90.0, 1024: 70.0, 4096: 60.0}),
    ]
    assert findings.describe_headline(cells[:3]) == (
        "Lowest perplexity at each context: 256: 54.3, Transformer trained at 256 (best LongNet: 78.9, LongNet trained "
        "at 1K); 1K: 57.3, Transformer trained at 256 (best LongNet: 77.9, LongNet trained at 1K); 4K: 73.4, "
        "Transformer trained at 256 (best LongNet: 77.8, LongNet trained at 1K)."
    )
    assert findings.describe_headline(cells).endswith("; 4K: 60.0, LongNet 64:1,1024:8;all trained at 4K.")
    assert findings.describe_headline(cells[:2]).endswith("; 4K: 73.4, Transformer trained at 256.")


def test_the_headline_of_the_committed_table_2_is_of_its_own_figures():
    text = (Path(__file__).parents[2] / "benchmarks/results/table2-tiny/report.md").read_text()
    names = {title: system for system, title in SYSTEMS.items()}
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "±" in line and line.startswith("|")]
    lengths = {name_length(length): length for length in (256, 1024, 4096)}
    cells = [
        (
            names[row[0]],
            lengths[row[1]],
            dict(zip(lengths.values(), (float(cell.split()[0]) for cell in row[3:]), strict=True)),
        )
        for row in rows
    ]
    assert len(cells) == 7
    assert f"**{findings.describe_headline(cells)}**" in text


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "cells", "steps"), [("table2-window", 10, 1000), ("table2-longer", 8, 400), ("table2-longest", 3, 1600)]
)
def test_the_committed_tables_2_with_a_window_are_of_the_committed_results(name, cells, steps, seed):
    folder = Path(__file__).parents[2] / "benchmarks/results" / (f"{name}-1" if seed else name)
    text = (folder / "report.md").read_text()
    results = [CellResult.load(path.parent) for path in folder.glob("cells/*/result.json")]
    assert len(results) == cells
    assert {(found.seed, found.steps) for found in results} == {(seed, steps)}
    scores = [
        (found.attention, found.length, {part.context: part.perplexity for part in found.contexts}) for found in results
    ]
    assert f"**{findings.describe_headline(scores)}**" in text
    for found in results:
        for part in found.contexts:
            assert f" {part.perplexity:.3f} ± " in text


@pytest.mark.parametrize("seed", [0, 1])
def test_what_the_evidence_says_of_models_that_have_learned_is_of_the_committed_results(seed):
    """Each perplexity and paired difference of its row, as it stands there."""
    root = Path(__file__).parents[2]
    (row,) = [
        line for line in (root / "docs/evidence.md").read_text().splitlines()
        if line.startswith("| The same, from a model that has learned")
    ]  # fmt: skip
    for name in ("table2-longer", "table2-longest"):
        folder = root / "benchmarks/results" / (f"{name}-1" if seed else name)
        found = {path.parent.name: CellResult.load(path.parent) for path in folder.glob("cells/*/result.json")}
        at = {cell: result.at(4096) for cell, result in found.items()}
        assert len(at) == (8 if name == "table2-longer" else 3)
        told = [f"{at[cell].perplexity:.2f}" for cell in at if name == "table2-longer" or cell != "640x1_4096x8-4096"]
        pairs = [("dilated-4096", "window-4096")]
        pairs.append(("640x1_4096x8-4096", "704x1-4096" if "704x1-4096" in at else "window-4096"))
        if name == "table2-longer":
            pairs += [(ours, "window-4096") for ours in ("1024x1_4096x32-all-4096", "896x1_4096x16-all-4096")]
            pairs += [("1024x1-4096", "1024x1_4096x32-all-4096"), ("window-4096", "1024x1-4096")]
        for ours, other in pairs:
            step = paired_difference(at[ours], at[other])
            told.append(f"{step.mean:.4f} ± {step.standard_error:.4f}".replace("-", "−"))
        assert not [figure for figure in told if figure not in row]


def test_what_the_evidence_says_of_a_genome_is_of_the_committed_results():
    root = Path(__file__).parents[2]
    (row,) = [
        line for line in (root / "docs/evidence.md").read_text().splitlines()
        if line.startswith("| A genome, in sequences of 65,536, with segments")
    ]  # fmt: skip
    at, whole = {}, []
    for name in ("window", "1024x1_8192x8_65536x64_8388608x8192", "dilated"):
        cell = root / "benchmarks/results/genome/cells" / f"{name}-65536"
        at[name] = CellResult.load(cell).at(65536)
        contexts = json.loads((cell / "evaluation.json").read_text())["contexts"]
        head, held, all_of_it = (json.loads((cell / f"stream-{k}.json").read_text()) for k in ("head", "held", "whole"))
        sums = [part["loss"] * part["tokens"] for part in (held, head)]
        behind = (sums[0] - sums[1]) / (held["tokens"] - head["tokens"])
        assert held["tokens"] - head["tokens"] == contexts[0]["tokens"] == 458752
        assert ", ".join(f"{loss:.4f}" for loss in [*(part["loss"] for part in contexts), behind]) in row
        shorter = json.loads((cell / "contexts.json").read_text())["contexts"]
        assert ", ".join(f"{part['loss']:.4f}" for part in shorter) in row
        whole.append(f"{all_of_it['loss']:.4f}")
    assert ", ".join(whole) in row
    for name in ("1024x1_8192x8_65536x64_8388608x8192", "dilated"):
        step = paired_difference(at[name], at["window"])
        assert f"{step.mean:.4f} ± {step.standard_error:.4f}" in row
