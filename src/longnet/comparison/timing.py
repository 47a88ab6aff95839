"""Seconds of a training step of each cell, in turn, in one process: their ratios hold on a machine that others use."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet.comparison.config import Cell, ComparisonRecipe
from longnet.comparison.document import write_text
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.measurement import interleaved, provenance, take_device
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.patterns import PATTERN_FIELDS
from longnet.model.versions import checkpoint_layers
from longnet.training.gradients import accumulate_gradients
from longnet.training.optim import gradient_norm, make_optimizer, update

TIMING = "timing.json"


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, by cell and round, the rounds of all cells side by side, and the device that took them."""

    cells: list[str]
    seconds: list[list[float]]
    device: str

    def median(self, cell: str) -> float:
        """Return the median seconds of a step of a cell."""
        return statistics.median(self.seconds[self.cells.index(cell)])

    def of(self, cell: str) -> list[float]:
        """Return the seconds of a cell's rounds."""
        return self.seconds[self.cells.index(cell)]


def measure_steps(recipe: ComparisonRecipe, cells: Sequence[Cell]) -> Timing:
    """Time a step of each cell, forward, backward and update, on the same weights and as many tokens.

    torch.compile, where the recipe asks for it, is left out.
    """
    data = TokenData.open(recipe.data.path)
    device = take_device(recipe.train.device)
    torch.manual_seed(recipe.train.seed)
    model: Any = LongNetForCausalLM(recipe.for_cell(cells[0], data).model_config(data))
    model.to(device).train()
    optimizer = make_optimizer(model, recipe.optim)
    if recipe.train.checkpoint_activations:
        checkpoint_layers(model)

    def step(config: LongNetConfig, input_ids: Tensor, targets: Tensor, parts: int) -> None:
        model.set_attn_implementation(config._attn_implementation)
        for name in itertools.chain.from_iterable(PATTERN_FIELDS.values()):
            setattr(model.config, name, getattr(config, name))
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.train.dtype == "bfloat16")
        accumulate_gradients(model, input_ids, targets, parts=parts, autocast=autocast)
        update(optimizer, lr=1e-6, clip=recipe.optim.clip, norm=gradient_norm(model))

    cases = []
    for cell in cells:
        settings = recipe.for_cell(cell, data)
        windows = Windows(data.train, cell.length, seed=settings.train.seed)
        input_ids, targets = (part.to(device) for part in windows.batch(0, settings.train.batch_sequences))
        config = settings.model_config(data)
        cases.append(functools.partial(step, config, input_ids, targets, settings.train.accumulate))
    seconds = interleaved(cases, recipe.compare.rounds, device)
    return Timing([cell.name for cell in cells], seconds, provenance(device)["device"])


def save_timing(recipe: ComparisonRecipe, cells: Sequence[Cell], output: Path) -> int:
    """Measure and write OUT/timing.json; return 0."""
    timing = measure_steps(recipe, cells)
    row = {"cells": timing.cells, "seconds": timing.seconds, **provenance(take_device(recipe.train.device))}
    write_text(json.dumps(row, indent=1) + "\n", output / TIMING)
    return 0


def load_timing(output: Path, cells: Sequence[Cell]) -> Timing | None:
    """Return the timing of these cells, None where there is none."""
    if not (output / TIMING).is_file():
        return None
    row = json.loads((output / TIMING).read_text())
    if set(row["cells"]) != {cell.name for cell in cells}:
        return None
    return Timing(row["cells"], row["seconds"], row["device"])
