"""`longnet compare`: one model with several attentions at several training lengths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from longnet.cli.check import check_folder
from longnet.cli.recipe import PARAMETERS, RecipeFile
from longnet.comparison.config import ComparisonRecipe

app = cyclopts.App(name="compare", default_parameter=PARAMETERS, config=RecipeFile(ComparisonRecipe))


@app.default
def compare(
    recipe: Path,
    *,
    output: Annotated[Path, Parameter(("--output", "-o"))],
    settings: Annotated[ComparisonRecipe, Parameter(name="*")],
) -> None:
    """Train the same model on the same tokens with each attention at each length, and report what holds.

    Writes the paper's Table 2 and Figures 6 and 7b to OUT/report.md and OUT/report.html. The same command goes on where
    it was stopped, and does not run finished cells again.

    Args:
        recipe: TOML file with the tables below; [compare] says which attentions, lengths and contexts
            (docs/training.md).
        output: Folder OUT of the comparison: its cells and reports.
        settings: The recipe's own settings.
    """
    from longnet.comparison.compare import run_comparison
    from longnet.comparison.report import write_report

    check_folder(output)
    outcome = run_comparison(settings, output)
    report = write_report(outcome, output)
    for cell, reason in outcome.failures.items():
        print(f"longnet: {cell.name} failed: {reason}", file=sys.stderr)
    print(f"{len(outcome.results)} of {len(settings.all_cells)} cells are finished; report: {report.resolve()}")
    if outcome.was_stopped:
        print("stopped; the same command goes on")
        sys.exit(130)
    if outcome.failures:
        sys.exit(1)
