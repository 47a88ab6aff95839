"""Reports in a browser: nothing overflows, nothing is too small to read, light and dark."""

import json
import math
from pathlib import Path

import pytest

from longnet.comparison.cell import CellResult
from longnet.comparison.compare import Outcome
from longnet.comparison.report import write_report
from longnet.comparison.run_report import write_run_report
from longnet.comparison.timing import Timing
from longnet.evaluation.passkey import PasskeyResult
from longnet.evaluation.perplexity import ContextResult, PositionLoss
from longnet.evaluation.record import Evaluation
from longnet.model import LongNetConfig

pytestmark = pytest.mark.browser


def context(length, loss):
    places = [(start, 2 * start) for start in (1, 8, 64, 256, 1024) if 2 * start <= length]
    parts = [PositionLoss(start, stop, loss + 2 / math.log2(start + 4), 0.03) for start, stop in places]
    windows = [loss + math.sin(7 * number) * (1 + 0.02 * math.sin(length + number)) for number in range(40)]
    return ContextResult(length, 131_072, 471_859, loss, 0.02, parts, windows)


@pytest.fixture(scope="module")
def run_report(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    rows = []
    for step in range(20, 3201, 20):
        loss = 4.7 + 4 * math.exp(-step / 600) + 0.15 * math.sin(step * step)
        rows.append({"kind": "train", "step": step, "tokens": step * 1024, "loss": loss, "seconds": step / 8,
                     "memory": 3e8})  # fmt: skip
        if step % 800 == 0:
            rows.append({"kind": "evaluate", "step": step, "contexts": [{"context": 1024, "loss": loss + 0.1}]})
    rows.append({"kind": "sample", "step": 3200, "prompt": "def ", "text": "read(self, path):\n    return self.path\n"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "recipe.toml").write_text('[data]\npath = "runs/demo/data"\n')
    config = LongNetConfig(vocab_size=4096, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=512,
                           segment_lengths=[256, 512, 1024], dilation_rates=[1, 2, 4])  # fmt: skip
    keys = [PasskeyResult(64 * 2**n, 90, 20, 0.9 / 4**n, 0.5 + n, 2.0 / (n + 1), 0.3) for n in range(4)]
    contexts = [context(64, 4.776), context(256, 4.704), context(1024, 4.697)]
    about = {"device": "2 cores of a processor", "torch": "2.13.0+cpu", "commit": "0123456", "date": "2026-01-01"}
    evaluation = Evaluation("runs/demo/run", "runs/demo/data", "dilated", 1024, contexts, keys, about)
    write_run_report(run, config, evaluation, run / "run.html")
    return run / "run.html"


@pytest.fixture(scope="module")
def comparison_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    about = {"commit": "0123456789", "torch": "2.13.0+cpu", "device": "cpu", "threads": 2, "data": "0123456789abcdef"}
    results = []
    for number, (attention, length) in enumerate(
        (kind, length) for kind in ("sdpa", "sparse_fixed", "dilated") for length in (1024, 4096)
    ):
        losses = {1024: 4.66 + number / 40, 2048: 4.65 + number / 50, 4096: 4.645 + (number - 3) ** 2 / 90}
        flops = {"counted": 10**12 * (2 + number), "attention": 10**11, "attention_per_token": 5,
                 "dense_attention_per_token": 9}  # fmt: skip
        results.append(CellResult(
            attention, length, "256:1,512:2,1024:4,2048:6,4096:12", 4, 1, 800, 3_276_800, 0,
            {"total": 917_504, "embedding": 524_288}, flops, 1234.5, 10**9, 3 * 10**8,
            [(4096 * step, 4.6 + 4 * math.exp(-step / 90) + number / 30) for step in range(1, 800, 4)],
            [context(*pair) for pair in losses.items()], about,
        ))  # fmt: skip
    timing = Timing([result.cell.name for result in results], [[0.3, 0.4, 0.35]] * len(results), "a CPU")
    return write_report(Outcome(results, {}, timing, {"data": {"path": "runs/linux"}}, False), folder)


@pytest.mark.parametrize(("name", "charts"), [("table2-tiny", 2), ("recall-tiny", 4), ("recall-long", 4)])
def test_reports_that_are_stored(name, charts, show):
    page = show(Path(__file__).parents[2] / "benchmarks" / "results" / name / "report.html")
    assert page.locator("p.headline").is_visible()
    assert page.locator("figure svg").count() == charts


def test_the_report_of_a_run(run_report, show):
    page = show(run_report)
    assert page.locator("p.headline").is_visible()
    assert page.locator("figure svg").count() == 6


def test_the_report_of_a_comparison(comparison_report, show):
    page = show(comparison_report)
    assert page.locator("p.headline").is_visible()
    assert page.locator("figure svg").count() == 5
