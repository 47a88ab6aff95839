"""A whole comparison of minute models: killed, gone on with, failed in part, reported."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from longnet.cli.main import main
from longnet.cli.recipe import load_recipe
from longnet.comparison.cell import CellResult, count_flops
from longnet.comparison.compare import cell_folder, run_comparison
from longnet.comparison.config import Cell, ComparisonRecipe
from longnet.comparison.process import Stop
from longnet.comparison.report import write_report
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.evaluation.perplexity import evaluate_contexts, paired_difference
from longnet.evaluation.record import with_error
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.training.checkpoint import model_folder
from longnet.training.loop import train

STEPS = 24


def load(path, *overrides):
    steps = [] if "--train.steps" in overrides else ["--train.steps", str(STEPS)]
    return load_recipe(path, [*steps, *overrides], kind=ComparisonRecipe)


@pytest.fixture(scope="module")
def killed(recipe_file, tmp_path_factory):
    """A comparison whose process was killed in the training of its second cell: the folder."""
    output = tmp_path_factory.mktemp("comparison") / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", "from longnet.cli.main import main; main()", "compare", str(recipe_file),
         "-o", str(output), "--train.steps", str(STEPS)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = cell_folder(output, Cell("sdpa", 64)) / "run" / "checkpoints"
    deadline = time.monotonic() + 400
    while not list(second.glob("step-0*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(second.glob("step-0*"))
    return output


@pytest.fixture(scope="module")
def outcome(killed, recipe_file):
    first = cell_folder(killed, Cell("sdpa", 32)) / "result.json"
    before = first.stat().st_mtime_ns
    outcome = run_comparison(load(recipe_file), killed, progress=False)
    assert first.stat().st_mtime_ns == before  # a finished cell is not run again
    write_report(outcome, killed)
    return outcome


def test_a_killed_comparison_goes_on_to_the_same_bits(outcome, killed, recipe_file, data_folder, tmp_path):
    assert [result.cell.name for result in outcome.results] == ["sdpa-32", "sdpa-64", "dilated-32", "dilated-64"]
    assert not outcome.failures
    assert not outcome.was_stopped
    recipe, data = load(recipe_file), TokenData.open(data_folder)
    resumed = outcome.results[1]
    summary = train(recipe.for_cell(resumed.cell, data), tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert resumed.losses == [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train"]
    model = LongNetForCausalLM.from_pretrained(summary.model_folder, attn_implementation="sdpa")
    again = evaluate_contexts(
        model, data.validation, (32, 64, 128), token_bytes=data.token_bytes, tokens=1024, batch_tokens=2**15,
        device="cpu",
    )  # fmt: skip
    assert again == resumed.contexts


def test_cells_differ_in_what_they_should(outcome):
    for result in outcome.results:
        assert result.batch_sequences * result.length == 256
        assert result.tokens == 256 * STEPS
        assert [part.context for part in result.contexts] == [32, 64, 128]
        assert {part.tokens for part in result.contexts} == {result.contexts[0].tokens}
        assert result.peak_bytes > result.start_bytes > 0
        assert result.losses[-1][1] < result.losses[0][1] - 1
        assert result.provenance["torch"] == torch.__version__
    assert len({result.parameters["total"] for result in outcome.results}) == 1
    dense, sparse = outcome.results[1].flops, outcome.results[3].flops
    assert dense["matrices"] == sparse["matrices"]
    assert dense["attention_per_token"] == dense["dense_attention_per_token"] > 2 * sparse["attention_per_token"]


def test_a_second_call_runs_nothing(outcome, killed, recipe_file, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("result.json")}
    timing = (killed / "timing.json").stat().st_mtime_ns
    start = time.monotonic()
    assert run_comparison(load(recipe_file), killed, progress=False) == outcome
    arguments = ["compare", str(recipe_file), "-o", str(killed), "--train.steps", str(STEPS)]
    monkeypatch.setattr(sys, "argv", ["longnet", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert f"4 of 4 cells are finished; report: {killed / 'report.html'}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["longnet", *arguments, "--optim.lr", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longnet: {killed} holds a comparison with another recipe: optim.lr (0.003 → 1.0); set")
    assert error.count("\n") == 1
    assert time.monotonic() - start < 20
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("result.json")} == before
    assert (killed / "timing.json").stat().st_mtime_ns == timing


def test_another_recipe_in_the_same_folder_is_refused(outcome, killed, recipe_file):
    for overrides, message in [
        (["--optim.lr", "1e-3"], r"optim.lr \(0.003 → 0.001\)"),
        (["--evaluate.tokens", "512"], r"evaluate.tokens \(1024 → 512\)"),
        (["--compare.contexts", "32", "128"], r"compare.contexts \(\[32, 64, 128\] → \[32, 128\]\)"),
        (["--train.steps", "70", "--train.seed", "3"], r"train.seed \(0 → 3\), train.steps \(24 → 70\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_comparison(load(recipe_file, *overrides), killed, progress=False)


def test_the_report_says_what_the_results_say(outcome, killed):
    page, text = html.unescape((killed / "report.html").read_text()), (killed / "report.md").read_text()
    for result in outcome.results:
        row = json.loads((cell_folder(killed, result.cell) / "result.json").read_text())
        figures = [f"{row['flops']['counted']:.4e}", f"{row['flops']['counted'] * STEPS:.4e}",
                   f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['seconds']:,.1f}"]  # fmt: skip
        figures += [f"{part['perplexity']:.3f} ± " for part in row["contexts"]]
        for figure in figures:
            assert figure in page, figure
            assert figure in text, figure
        beyond = f"{row['contexts'][2]['perplexity']:.3f} ± {row['contexts'][2]['perplexity'] * row['contexts'][2]['standard_error']:.3f}*"  # noqa: E501
        assert beyond in page
        assert outcome.timing is not None
        assert f"{outcome.timing.median(result.cell.name):.3f}" in page
    dense, dilated = outcome.results[1], outcome.results[3]
    step = paired_difference(dilated.at(64), dense.at(64))
    assert f"Trained at 64 and scored at 64, LongNet's loss against the Transformer's: {with_error(step)}" in page
    assert text.split("\n\n")[1].startswith("**Lowest perplexity at each context: 32: ")
    for word in ("Table 2", "Figure 6", "Figure 7b", "What this cannot show", "One seed (0)", "[optim]", "lr = 0.003"):
        assert word in page


def test_the_report_needs_nothing_else(outcome, killed):
    page = (killed / "report.html").read_text()
    assert not re.search(r"<script|<link|https?:|src=\"(?!data:)|href=(?!\"#)", page)
    names = re.findall(r"\]\((.*?\.svg)\)", (killed / "report.md").read_text())
    assert names == [f"figures/{name}.svg" for name in ("flops", "context", "difference", "position", "training")]
    assert page.count("<svg ") == 5
    for name in names:  # the same curves
        (longest,) = {max(re.findall(r' d="([^"]+)"', (killed / name).read_text()), key=len)}
        assert longest in page


def test_every_cell_begins_with_the_weights_of_one_checkpoint(outcome, killed, recipe_file, data_folder, tmp_path):
    source = cell_folder(killed, Cell("sdpa", 64)) / "run"
    recipe = load(
        recipe_file, "--train.init-from", str(source), "--train.steps", "2", "--train.log-every", "1",
        "--compare.cells", "dilated-64", "--compare.rounds", "0",
    )  # fmt: skip
    wrong = load(recipe_file, "--train.init-from", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"train\.init_from: there is no folder"):
        run_comparison(wrong, tmp_path / "out", progress=False)
    other = load(recipe_file, "--train.init-from", str(source), "--model.hidden-size", "32")
    with pytest.raises(ValueError, match=r"are of another model than the recipe's: it has model\.hidden_size = 16"):
        run_comparison(other, tmp_path / "out", progress=False)
    begun = run_comparison(recipe, tmp_path / "out", progress=False)  # what was wrong has left nothing behind
    assert not begun.failures
    data = TokenData.open(data_folder)
    ids, targets = Windows(data.train, 64, seed=0).batch(0, 4)
    config = recipe.for_cell(begun.results[0].cell, data).model_config(data)
    model = LongNetForCausalLM.from_pretrained(model_folder(source), config=config)
    with torch.no_grad():
        assert begun.results[0].losses[0][1] == pytest.approx(model(ids, shift_labels=targets).loss.item(), rel=1e-5)
    assert begun.tables["train"]["init_from"] == str(model_folder(source))
    assert run_comparison(recipe, tmp_path / "out", progress=False) == begun
    report = write_report(begun, tmp_path / "out").with_suffix(".md").read_text()
    assert f"beginning with the weights of {model_folder(source)}, on 512 tokens" in report
    assert f"beside those that the weights of {model_folder(source)} had seen; the paper's" in report


def test_a_cell_that_fails_leaves_the_others_alone(recipe_file, tmp_path):
    # At 16 tokens the dilated pattern costs more than attention to all of them, which nothing sparse can match.
    overrides = ["--compare.attentions", "sparse_fixed", "dilated", "--compare.lengths", "16", "--compare.rounds", "0",
                 "--compare.contexts", "16", "--train.steps", "3", "--model.dilation_rates", "1", "2"]  # fmt: skip
    outcome = run_comparison(load_recipe(recipe_file, overrides, kind=ComparisonRecipe), tmp_path, progress=False)
    assert [result.cell.name for result in outcome.results] == ["dilated-16"]
    assert outcome.timing is None
    (reason,) = outcome.failures.values()
    assert "no fixed pattern of blocks of up to 16 tokens" in reason
    page = write_report(outcome, tmp_path).read_text()
    assert "Cells that failed" in page
    assert "Sparse Transformer, 16: no fixed pattern" in page
    assert CellResult.load(cell_folder(tmp_path, Cell("sparse_fixed", 16))) is None


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing to wait on")
def test_a_signal_to_all_processes_waits_for_the_one_at_work(recipe_file, tmp_path):
    """It ends the forkserver too, which alone knows when a process has ended: its checkpoint was cut short."""
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", "from longnet.cli.main import main; main()", "compare", str(recipe_file), "-o",
         str(output), "--train.steps", "100000", "--checkpoint.every", "100000", "--train.log-every", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(output.glob("cells/*/run/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    (checkpoints,) = output.glob("cells/*/run/checkpoints")
    (checkpoint,) = checkpoints.iterdir()
    assert checkpoint.suffix != ".partial", printed
    assert "stopped; the same command goes on" in printed


def test_a_signal_ends_the_process_at_work():
    with Stop() as stop:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert stop.run(time.sleep, 60) == -signal.SIGTERM
        assert stop.is_asked


@pytest.mark.parametrize("attention", ["dilated", "sdpa", "sparse_fixed"])
def test_counted_flops_are_the_closed_form(attention):
    config = LongNetConfig.preset("tiny", sparse_block=32, sparse_summary=4, tie_word_embeddings=False)
    model = LongNetForCausalLM(config)
    model.set_attn_implementation(attention)
    flops = count_flops(model, tokens=100, sequences=3)
    # By hand: each weight of a matrix 6 FLOPs a token, each visible pair 4 · head_dim · 3.5, over 2 layers.
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 64 * 320
    pairs = {"sdpa": 4 * 5050, "dilated": config.pattern.flops(tokens=100, num_heads=4, head_dim=1, is_causal=True) / 4}
    if attention in pairs:
        assert flops["counted"] == 3 * (6 * 100 * weights + 2 * pairs[attention] * 4 * 16 * 3.5)
    assert flops["counted"] == flops["closed"] == flops["matrices"] + flops["head"] + flops["attention"]
    assert all(weight.grad is None for weight in model.parameters())
