"""The comparison: every cell in turn, each in its own process, finished ones not again; then timing and report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from longnet.comparison.cell import CellResult, run_cell
from longnet.comparison.config import Cell, ComparisonRecipe
from longnet.comparison.folder import check_plan, run_once
from longnet.comparison.process import Stop
from longnet.comparison.timing import Timing, load_timing, save_timing
from longnet.data.shards import TokenData
from longnet.evaluation.perplexity import unit_starts
from longnet.measurement import take_device
from longnet.training.beginning import pin_init, refuse_other_model
from longnet.training.checkpoint import lock_run
from longnet.training.config import Tables

_PLAN = "comparison.json"
# What may change between two runs of the command: where things lie and what is told, nothing that is learned.
_FREE = {
    "sample", "checkpoint", "data.path", "train.device", "train.backend", "train.log_every", "train.tensorboard",
    "train.max_skipped",
}  # fmt: skip


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
    plan = output / _PLAN
    recipe = pin_init(recipe, json.loads(plan.read_text())["recipe"] if plan.exists() else None)
    if recipe.train.init_from is not None and not plan.exists():
        refuse_other_model(recipe.for_cell(cells[0], data).model_config(data), data, recipe.train.init_from)
    unit_starts(data.validation, recipe.scored_contexts, recipe.evaluate.tokens)  # refuses what could not be scored
    take_device(recipe.train.device)
    tables = recipe.shared_tables(data)
    with lock_run(output):
        check_plan(plan, tables, free=_FREE, data=data.fingerprint)
        results, failures = [], {}
        with Stop() as stop:
            for cell in cells:
                folder = cell_folder(output, cell)
                found = run_once(
                    stop, run_cell, recipe, cell, folder, progress,
                    folder=folder, load=CellResult.load, title=cell.title if progress else None,
                )  # fmt: skip
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
