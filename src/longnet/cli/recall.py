"""`longnet recall`: what one model with several attentions recalls, by distance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from longnet.cli.check import check_folder
from longnet.cli.recipe import PARAMETERS, RecipeFile
from longnet.comparison.recall import RecallRecipe

app = cyclopts.App(name="recall", default_parameter=PARAMETERS, config=RecipeFile(RecallRecipe))


@app.default
def recall(
    recipe: Path,
    *,
    output: Annotated[Path, Parameter(("--output", "-o"))],
    settings: Annotated[RecallRecipe, Parameter(name="*")],
) -> None:
    """Train the same model with each attention on sequences that tell and ask, and report what each recalls.

    Writes accuracy by distance, beside the attention's FLOPs, to OUT/report.md and OUT/report.html. The same command
    goes on where it was stopped, and does not run finished cells again.

    Args:
        recipe: TOML file with the tables below, or a recipe that comes with LongNet: recall-tiny, recall-long.
        output: Folder OUT: its cells and reports.
        settings: The recipe's own settings.
    """
    from longnet.comparison.recall import run_recall
    from longnet.comparison.recall_report import write_recall_report

    check_folder(output)
    outcome = run_recall(settings, output)
    report = write_recall_report(outcome, output)
    for cell, reason in outcome.failures.items():
        print(f"longnet: {cell.name} failed: {reason}", file=sys.stderr)
    print(f"{len(outcome.results)} of {len(settings.all_cells)} cells are finished; report: {report.resolve()}")
    if outcome.was_stopped:
        print("stopped; the same command goes on")
        sys.exit(130)
    if outcome.failures:
        sys.exit(1)
