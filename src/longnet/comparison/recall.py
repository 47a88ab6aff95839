"""Recall by distance of one model with several attentions: every cell trained and asked, finished ones not again."""

# No annotation is a string here: cyclopts looks them up.

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from longnet.comparison.cell import describe_pattern
from longnet.comparison.document import write_text
from longnet.comparison.folder import RESULT, check_plan, leave_failure, run_once
from longnet.comparison.process import Stop
from longnet.comparison.systems import check_systems, fields_of, name_of, title_of
from longnet.evaluation.recall import RecallData, RecallModel, RecallResult, RecallTask, evaluate_recall
from longnet.measurement import provenance, take_device
from longnet.model.budget import count_parameters
from longnet.model.configuration import LongNetConfig
from longnet.model.cost import attention_flops
from longnet.model.patterns import kind_of
from longnet.training.checkpoint import lock_run
from longnet.training.config import ModelConfig, Tables, config_of, plain
from longnet.training.optim import OptimConfig, gradient_norm, learning_rate, make_optimizer, update

_PLAN, _STATE = "recall.json", "state.pt"


@dataclass(kw_only=True)
class RecallConfig:
    """The recipe's table `[recall]`: which systems `longnet recall` trains on `[task]`, and for how long."""

    systems: tuple[str, ...] = ("sdpa", "window", "sparse_fixed", "dilated")
    """Systems: "sdpa" is the Transformer, "dilated" LongNet with [model]'s pattern, "window" blocks alone and
    "sparse_fixed" the Sparse Transformer, both at that pattern's cost; "64:1,512:8;all" is LongNet with a pattern of
    its own."""

    seeds: tuple[int, ...] = (0, 1)
    """Of weights and sequences: each system once with each."""

    steps: int = 240
    """Optimizer steps of each system."""

    batch_sequences: int = 8
    """Sequences of a step."""

    save_every: int = 20
    """Steps after which a killed cell goes on."""

    log_every: int = 20
    """Steps whose mean loss is a line of the result."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_systems(self.systems, "recall.systems")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"recall.seeds must be different numbers of 0 or more, got {list(self.seeds)}")
        for name in ("steps", "batch_sequences", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"recall.{name} must be at least 1, got {getattr(self, name)}")


class RecallCell(NamedTuple):
    """One system with one seed."""

    system: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{name_of(self.system)}-seed{self.seed}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{title_of(self.system)}, seed {self.seed}"


@dataclass(kw_only=True)
class RecallRecipe:
    """What `longnet recall` does: tables of settings, as in the recipe's TOML file."""

    task: RecallTask
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)

    @property
    def all_cells(self) -> list[RecallCell]:
        """The cells, seed by seed."""
        return [RecallCell(system, seed) for seed in self.recall.seeds for system in self.recall.systems]

    def model_config(self, system: str) -> LongNetConfig:
        """Return the configuration of a system's model.

        Raises:
            ValueError: fields that make no model.
        """
        tokens = self.task.tokens
        own = {"vocab_size": self.task.values, "position_embedding": "none", "max_position_embeddings": tokens}
        config = config_of(dataclasses.replace(self.model, attention="dilated"), **own)
        return config_of(dataclasses.replace(self.model, **fields_of(system, config, tokens=tokens)), **own)

    def tables(self) -> Tables:
        """Return what decides the results, filled in; which cells there are is not part of it."""
        config = self.model_config("dilated")
        model = {name: getattr(config, name) for name in LongNetConfig.__annotations__}
        shared = {name: plain(dataclasses.asdict(getattr(self, name))) for name in ("task", "optim", "recall")}
        recall = {name: shared["recall"][name] for name in ("steps", "batch_sequences", "log_every")}
        return {"task": shared["task"], "model": plain(model), "optim": shared["optim"], "recall": recall}


@dataclass(frozen=True)
class RecallCellResult:
    """What a cell came to.

    Attributes:
        system: its attention.
        seed: of weights and sequences.
        pattern: of the attention, in words.
        parameters: of the model between the embeddings of the task.
        attention_flops: of a forward pass over a sequence, all layers; counted.
        steps: taken.
        losses: (step, mean loss since the line before).
        results: answers, of each number of pairs.
        provenance: machine, versions, commit, date.
    """

    system: str
    seed: int
    pattern: str
    parameters: int
    attention_flops: int
    steps: int
    losses: list[tuple[int, float]]
    results: list[RecallResult]
    provenance: dict[str, Any]

    @property
    def cell(self) -> RecallCell:
        """Which cell this is."""
        return RecallCell(self.system, self.seed)

    def save(self, folder: Path) -> None:
        """Write the result's file, whole or not at all."""
        write_text(json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n", folder / RESULT)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the result in a cell's folder, None where it is not finished."""
        if not (folder / RESULT).is_file():
            return None
        row = json.loads((folder / RESULT).read_text())
        row["results"] = [RecallResult(**result) for result in row["results"]]
        row["losses"] = [(step, loss) for step, loss in row["losses"]]
        return cls(**row)


@dataclass(frozen=True)
class RecallOutcome:
    """What `longnet recall` has come to.

    Attributes:
        recipe: of all cells.
        results: of the cells that are finished.
        failures: of the others, why.
        was_stopped: by a signal, with cells left; the same command goes on.
    """

    recipe: RecallRecipe
    results: list[RecallCellResult]
    failures: dict[RecallCell, str]
    was_stopped: bool


def run_recall(recipe: RecallRecipe, output: Path, *, progress: bool = True) -> RecallOutcome:
    """Train and ask every cell that OUT does not hold yet, each in its own process.

    Ctrl-C ends it; a cell goes on where its last state was saved. A cell that fails is tried again by the next call.

    Args:
        recipe: of all cells.
        output: OUT.
        progress: tell of each cell on stdout.

    Raises:
        ValueError: a recipe that does not do, or other than the one whose results OUT holds.
    """
    for system in recipe.recall.systems:
        recipe.model_config(system)
    with lock_run(output):
        check_plan(output / _PLAN, recipe.tables())
        results, failures = [], {}
        with Stop() as stop:
            for cell in recipe.all_cells:
                folder = output / "cells" / cell.name
                found = run_once(
                    stop, run_recall_cell, recipe, cell, folder, progress,
                    folder=folder, load=RecallCellResult.load, title=cell.title if progress else None,
                )  # fmt: skip
                if isinstance(found, RecallCellResult):
                    results.append(found)
                elif found is not None:
                    failures[cell] = found
        return RecallOutcome(recipe, results, failures, stop.is_asked)


def run_recall_cell(recipe: RecallRecipe, cell: RecallCell, folder: Path, progress: bool) -> int:
    """Train and ask a cell, from where an earlier process has left it; leave its result, or why there is none."""
    try:
        _run(recipe, cell, folder, progress=progress)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        leave_failure(error, folder)
    return 0


def _run(recipe: RecallRecipe, cell: RecallCell, folder: Path, *, progress: bool) -> None:
    device = take_device("cpu")
    torch.manual_seed(cell.seed)
    task, settings = recipe.task, recipe.recall
    model = RecallModel(task, recipe.model_config(cell.system))
    config = model.decoder.config
    flops = count_attention(model, task.tokens)
    optimizer = make_optimizer(model, recipe.optim)
    data = RecallData(task, seed=cell.seed)
    first, losses, since = 0, [], 0.0
    if (folder / _STATE).is_file():
        state = torch.load(folder / _STATE, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses, since = state["step"], [(step, loss) for step, loss in state["losses"]], state["since"]
    model.train()
    for step in range(first, settings.steps):
        batch = data.batch(step, settings.batch_sequences, task.pairs[step % len(task.pairs)])
        loss = functional.cross_entropy(model(batch).flatten(0, 1), batch.answer.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm(model)
        if not math.isfinite(norm):
            raise ValueError(f"the gradient of step {step + 1} is not finite: the training has diverged")
        update(optimizer, lr=learning_rate(recipe.optim, step, settings.steps), clip=recipe.optim.clip, norm=norm)
        since += loss.item()
        if (step + 1) % settings.log_every == 0:
            losses.append((step + 1, since / settings.log_every))
            since = 0.0
            if progress:
                print(f"  step {step + 1} of {settings.steps}, loss {losses[-1][1]:.3f}", flush=True)  # noqa: T201
        if (step + 1) % settings.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            partial = folder / f"{_STATE}.partial"
            torch.save({**state, "step": step + 1, "losses": losses, "since": since}, partial)
            partial.replace(folder / _STATE)
    results = [
        evaluate_recall(model, task, pairs=pairs, batch_sequences=settings.batch_sequences) for pairs in task.scored
    ]
    RecallCellResult(
        system=cell.system,
        seed=cell.seed,
        pattern=describe_pattern(config, kind_of(config)),
        parameters=count_parameters(config).total - count_parameters(config).embedding,
        attention_flops=flops,
        steps=settings.steps,
        losses=losses,
        results=results,
        provenance=provenance(device),
    ).save(folder)
    (folder / _STATE).unlink(missing_ok=True)


def count_attention(model: RecallModel, tokens: int) -> int:
    """Count the FLOPs of attention in a forward pass over a sequence with torch's counter; dense ones in closed form.

    torch counts dense attention without its mask, or not at all.

    Raises:
        RuntimeError: the counter and the closed form disagree.
    """
    config: LongNetConfig = model.decoder.config
    closed = attention_flops(config, tokens=tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decoder(inputs_embeds=torch.zeros(1, tokens, config.hidden_size), use_cache=False)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    counted = sum(flops for name, flops in counts.items() if name.startswith("longnet."))
    if counted != (0 if config._attn_implementation == "sdpa" else closed):
        raise RuntimeError(f"{counted} FLOPs were counted where the closed form says {closed}: {counts}")
    return closed
