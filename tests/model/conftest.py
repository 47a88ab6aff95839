"""The table "model family × feature": ✓ only where every test of the pair has passed in this very run."""

from __future__ import annotations

import collections
import importlib.metadata
from pathlib import Path

import pytest

from model.families import FAMILIES

_HEAD = """# Compatibility

Written by `pytest tests/model -m "not deep" --compatibility-table docs/compatibility.md`: a ✓ stands only where every
test of that family and feature passed in that run, on the CPU. A – has no test, mostly because the family has no such
feature: an encoder does not generate. The models are tiny and random; what is compared with what, the tests say.

Versions: {versions}.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility-table", type=Path, help="write the table of families and features to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(name): the row of the compatibility table that the test stands for")
    if config.getoption("--compatibility-table") and (
        hasattr(config, "workerinput") or config.getoption("numprocesses", None)
    ):
        raise pytest.UsageError("--compatibility-table needs one process, which sees every test: leave out -n")
    config.stash[_RESULTS] = collections.defaultdict(list)


_RESULTS = pytest.StashKey[dict[tuple[str, str], list[bool]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    marker = item.get_closest_marker("feature")
    params = getattr(item, "callspec", None)
    if (
        marker is not None
        and params is not None
        and "family" in params.params
        and (call.when == "call" or report.failed)
    ):
        item.config.stash[_RESULTS][marker.args[0], params.params["family"]].append(report.passed)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--compatibility-table")
    results = session.config.stash[_RESULTS]
    if path is None or not results:
        return
    features = list(dict.fromkeys(feature for feature, _ in results))
    found = {family for _, family in results}

    families = [family for family in FAMILIES if family in found]
    signs = {None: "–", True: "✓", False: "✗"}
    rows = ["| feature | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    for feature in features:
        outcomes = [results.get((feature, family)) for family in families]
        cells = [signs[None if outcome is None else all(outcome)] for outcome in outcomes]
        rows.append(f"| {feature} | " + " | ".join(cells) + " |")
    packages = ("torch", "transformers", "peft", "torchao", "lm_eval")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    path.write_text(_HEAD.format(versions=versions) + "\n".join(rows) + "\n")
