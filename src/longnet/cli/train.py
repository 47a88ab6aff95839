"""`longnet train`: a model from a recipe."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from longnet.cli.check import check_folder
from longnet.cli.recipe import PARAMETERS, RecipeFile
from longnet.training.config import Recipe

app = cyclopts.App(name="train", default_parameter=PARAMETERS, config=RecipeFile(Recipe))


@app.default
def train(
    recipe: Path,
    *,
    output: Annotated[Path, Parameter(("--output", "-o"))],
    resume: bool = False,
    settings: Annotated[Recipe, Parameter(name="*")],
) -> None:
    """Train a model; Ctrl-C ends it with a checkpoint, and --resume continues it to the same bits.

    Every setting of the recipe is a flag, too, which has the last word: --optim.lr 3e-4, --evaluate.contexts 512 2048.

    Args:
        recipe: TOML file with the tables below (docs/training.md).
        output: Folder of the run: recipe, metrics, checkpoints; the newest checkpoint is the model.
        resume: Continue from the newest whole checkpoint; begin where there is none.
        settings: The recipe's own settings.
    """
    from longnet.training.checkpoint import end_at_once
    from longnet.training.loop import train as train_model

    check_folder(output)
    try:
        summary = train_model(settings, output, resume=resume)
    except KeyboardInterrupt:  # the second one
        print(f"stopped at once; {output} continues from its last checkpoint with --resume")
        end_at_once(128 + signal.SIGINT)
    loss = "none" if summary.loss is None else f"{summary.loss:.4f}"
    figures = f"step {summary.step:,}, {summary.tokens:,} tokens, {summary.seconds:,.0f} s, loss {loss}"
    if summary.stopped_by is None:
        told = f"finished: {figures}; the model is {summary.model_folder}"
    else:
        told = f"stopped by {summary.stopped_by.name} after {figures}; continue with --resume"
    if summary.rank == 0:
        print(told)
        print("import longnet, transformers")
        print(f"model = transformers.AutoModelForCausalLM.from_pretrained({str(summary.model_folder)!r})")
    if summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)
