"""The comparison: every cell in turn, each in its own process, finished ones not again; then timing and report."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from longnet.comparison.cell import FAILURE, STOPPED, CellResult, run_cell
from longnet.comparison.config import Cell, ComparisonRecipe
from longnet.comparison.document import write_text
from longnet.comparison.process import Stop
from longnet.comparison.timing import Timing, load_timing, save_timing
from longnet.data.shards import TokenData
from longnet.evaluation.perplexity import unit_starts
from longnet.measurement import find_device
from longnet.training.checkpoint import lock_run
from longnet.training.config import Tables, to_toml

_PLAN = "comparison.json"
# What may change between two runs of the command: where things lie and what is told, nothing that is learned.
_FREE = {"data.path", "train.device", "train.log_every", "train.tensorboard", "train.max_skipped"}
_FREE_TABLES = {"sample", "checkpoint"}


@dataclass(frozen=True)
class Outcome:
    """What a comparison has come to.

    Attributes:
        results: of the cells that are finished.
        failures: of the others, why.
        timing: seconds of a step; None where it was left out.
        tables: of the recipe, filled in.
        was_stopped: by a signal, with cells left; the same command goes on.
    """

    results: list[CellResult]
    failures: dict[Cell, str]
    timing: Timing | None
    tables: Tables
    was_stopped: bool


def run_comparison(recipe: ComparisonRecipe, output: Path, *, progress: bool = True) -> Outcome:
    """Train and evaluate every cell that OUT does not hold yet, and time a step of each.

    Ctrl-C ends it after the step at hand, with a checkpoint; the next call goes on from there. A cell that fails is
    tried again by the next call.

    Args:
        recipe: of all cells.
        output: OUT.
        progress: show progress on stdout.

    Raises:
        ValueError: a recipe that does not do, or other than the one whose results OUT holds.
        OSError: data are missing.
    """
    cells = recipe.all_cells
    data = TokenData.open(recipe.data.path)
    unit_starts(data.validation, recipe.scored_contexts, recipe.evaluate.tokens)  # refuses what could not be scored
    find_device(recipe.train.device)
    tables = recipe.shared_tables(data)
    with lock_run(output):
        _check_plan(output, tables, data.fingerprint)
        results, failures = [], {}
        with Stop() as stop:
            for cell in cells:
                found = _result(recipe, cell, output, stop, progress=progress)
                if isinstance(found, CellResult):
                    results.append(found)
                elif found is not None:
                    failures[cell] = found
            done = [result.cell for result in results]
            if done and recipe.compare.rounds and not stop.is_asked and load_timing(output, done) is None:
                stop.run(save_timing, recipe, done, output)
        done = [result.cell for result in results]
        return Outcome(results, failures, load_timing(output, done), tables, stop.is_asked)


def cell_folder(output: Path, cell: Cell) -> Path:
    """Return where a cell lies."""
    return output / "cells" / cell.name


def _result(
    recipe: ComparisonRecipe, cell: Cell, output: Path, stop: Stop, *, progress: bool
) -> CellResult | str | None:
    """Return a cell's result, or why there is none; None where it was stopped or never started."""
    folder = cell_folder(output, cell)
    result = CellResult.load(folder)
    if result is not None or stop.is_asked:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if progress:
        print(f"{cell.title} ({folder})", flush=True)  # noqa: T201
    status = stop.run(run_cell, recipe, cell, folder, progress)
    result = CellResult.load(folder)
    if result is not None or status == STOPPED or stop.is_asked:
        return result
    if (folder / FAILURE).is_file():
        return str(json.loads((folder / FAILURE).read_text())["error"])
    if status < 0:
        return f"ended by {signal.Signals(-status).name}; the system does that where memory runs out, for one"
    return f"ended with exit status {status}"


def _check_plan(output: Path, tables: Tables, fingerprint: str) -> None:
    """Refuse to mix results of two recipes in one folder."""
    path = output / _PLAN
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["data"] != fingerprint:
            raise ValueError(f"{output} holds a comparison on other data: choose another folder")
        old, changed = plan["recipe"], []
        for table in sorted((old.keys() | tables.keys()) - _FREE_TABLES):
            before, now = old.get(table, {}), tables.get(table, {})
            changed += [
                f"{table}.{key} ({before.get(key)} → {now.get(key)})"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key) and f"{table}.{key}" not in _FREE
            ]
        if changed:
            raise ValueError(
                f"{output} holds a comparison with another recipe: {', '.join(changed)}; set these back, or choose "
                "another folder"
            )
    write_text(to_toml(tables), output / "recipe.toml")
    write_text(json.dumps({"recipe": tables, "data": fingerprint}, indent=1) + "\n", path)
