"""One cell of a comparison: a model trained, scored and counted, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from longnet.comparison.config import Cell, ComparisonRecipe
from longnet.comparison.document import write_text
from longnet.comparison.folder import RESULT, STOPPED, leave_failure
from longnet.data.shards import TokenData
from longnet.evaluation.perplexity import ContextResult, evaluate_contexts
from longnet.measurement import peak_bytes, provenance, take_device
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.budget import count_parameters, step_flops
from longnet.model.cost import attention_flops
from longnet.model.patterns import pattern_of, sparse_pattern_of
from longnet.training.config import Recipe
from longnet.training.loop import train


@dataclass(frozen=True)
class CellResult:
    """What a cell came to.

    Attributes:
        attention: its system.
        length: its training length.
        pattern: of the attention, in words.
        batch_sequences: sequences of a step.
        accumulate: forward passes of a step.
        steps: taken.
        tokens: trained on.
        seed: of weights and data order.
        parameters: total, embedding.
        flops: of one step: `counted` in all; its `matrices`, `head` and `attention`; `closed`, the closed form of all;
            `attention_per_token` and `dense_attention_per_token`, forward.
        seconds: spent in steps, with what else the machine was doing.
        peak_bytes: of the process while it trained, libraries included (of the GPU's memory on a GPU).
        start_bytes: what it held before it had a model.
        losses: of training, (tokens, mean loss) of each line of metrics.
        contexts: the evaluation, shortest first.
        provenance: machine, versions, commit, date.
    """

    attention: str
    length: int
    pattern: str
    batch_sequences: int
    accumulate: int
    steps: int
    tokens: int
    seed: int
    parameters: dict[str, int]
    flops: dict[str, int]
    seconds: float
    peak_bytes: int
    start_bytes: int
    losses: list[tuple[int, float]]
    contexts: list[ContextResult]
    provenance: dict[str, Any]

    @property
    def cell(self) -> Cell:
        """Which cell this is."""
        return Cell(self.attention, self.length)

    @property
    def total_flops(self) -> int:
        """Of the whole training."""
        return self.steps * self.flops["counted"]

    def at(self, context: int) -> ContextResult:
        """Return the evaluation at a context length."""
        return next(result for result in self.contexts if result.context == context)

    def save(self, folder: Path) -> None:
        """Write the result's file, whole or not at all."""
        row = dataclasses.asdict(self)
        row["contexts"] = [result.as_row() for result in self.contexts]
        write_text(json.dumps(row, indent=1, allow_nan=False) + "\n", folder / RESULT)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the result in a cell's folder, None where it is not finished."""
        if not (folder / RESULT).is_file():
            return None
        row = json.loads((folder / RESULT).read_text())
        row["contexts"] = [ContextResult.from_row(context) for context in row["contexts"]]
        row["losses"] = [(tokens, loss) for tokens, loss in row["losses"]]
        return cls(**row)


def run_cell(recipe: ComparisonRecipe, cell: Cell, folder: Path, progress: bool) -> int:
    """Train and evaluate a cell, from where an earlier process has left it; leave its result, or why there is none.

    Returns:
        0, or STOPPED.
    """
    try:
        start_bytes = peak_bytes(torch.device("cpu"), reset=True)
        data = TokenData.open(recipe.data.path)
        settings = recipe.for_cell(cell, data)
        summary = train(settings, folder / "run", resume=True, progress=progress)
        if summary.stopped_by is not None:
            return STOPPED
        device = take_device(settings.train.device)
        measured = _memory(folder, device, start_bytes)
        _finish(recipe, settings, cell, folder, summary.model_folder, summary.seconds, measured, data, device)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        leave_failure(error, folder)
    return 0


def _memory(folder: Path, device: torch.device, start_bytes: int) -> tuple[int, int]:
    """Return the peak of the process that trained and what it began with; a resumed cell keeps the larger peak."""
    path = folder / "memory.json"
    peak, start = peak_bytes(device), 0 if device.type == "cuda" else start_bytes
    if path.exists():
        before = json.loads(path.read_text())
        if before["peak"] > peak:
            return before["peak"], before["start"]
    write_text(json.dumps({"peak": peak, "start": start}) + "\n", path)
    return peak, start


def _finish(
    recipe: ComparisonRecipe,
    settings: Recipe,
    cell: Cell,
    folder: Path,
    model_folder: Path,
    seconds: float,
    measured: tuple[int, int],
    data: TokenData,
    device: torch.device,
) -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=settings.implementation)
    model.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.train.dtype == "bfloat16"):
        contexts = evaluate_contexts(
            model,
            data.validation,
            recipe.scored_contexts,
            token_bytes=data.token_bytes,
            tokens=recipe.evaluate.tokens,
            batch_tokens=recipe.evaluate.batch_tokens,
            device=device,
        )
    if not all(math.isfinite(result.loss) for result in contexts):
        raise ValueError("the loss on the validation tokens is not finite: the training has diverged")
    parameters = count_parameters(model.config)
    CellResult(
        attention=cell.attention,
        length=cell.length,
        pattern=describe_pattern(model.config, settings.model.attention),
        batch_sequences=settings.train.batch_sequences,
        accumulate=settings.train.accumulate,
        steps=settings.train.steps,
        tokens=settings.train.steps * recipe.step_tokens,
        seed=settings.train.seed,
        parameters={"total": parameters.total, "embedding": parameters.embedding},
        flops=count_flops(model, tokens=cell.length, sequences=settings.train.batch_sequences),
        seconds=seconds,
        peak_bytes=measured[0],
        start_bytes=measured[1],
        losses=read_losses(folder / "run"),
        contexts=contexts,
        provenance={**provenance(device), "data": data.fingerprint},
    ).save(folder)


def count_flops(model: LongNetForCausalLM, *, tokens: int, sequences: int) -> dict[str, int]:
    """Count the FLOPs of one training step with torch's counter, and in closed form.

    The counter sees one sequence go forward and backward through the blocks. It does not know the head's loss, and
    counts dense attention without its mask, or not at all: those come in closed form.

    Raises:
        RuntimeError: the counter and the closed form disagree on what both know.
    """
    config: LongNetConfig = model.config
    model.train()
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=model.device)
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    model.zero_grad(set_to_none=True)
    model.eval()  # type: ignore[no-untyped-call]
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    matrices = sum(flops for name, flops in counts.items() if name.endswith((".mm", ".addmm", ".bmm")))
    attention = attention_flops(config, tokens=tokens) * 7 // 2
    head = 6 * tokens * config.hidden_size * config.vocab_size
    closed = step_flops(config, tokens=tokens, sequences=1)
    ours = sum(flops for name, flops in counts.items() if name.startswith("longnet."))
    counted = matrices + head + (ours or attention)
    if counted != closed:
        raise RuntimeError(f"{counted} FLOPs were counted where the closed form says {closed}: {counts}")
    dense = 2 * config.num_attention_heads * int(config.head_dim or 0) * (tokens + 1) * config.num_hidden_layers
    return {
        "counted": sequences * counted,
        "closed": sequences * closed,
        "matrices": sequences * matrices,
        "head": sequences * head,
        "attention": sequences * (ours or attention),
        "attention_per_token": attention_flops(config, tokens=tokens) // tokens,
        "dense_attention_per_token": dense,
    }


def describe_pattern(config: LongNetConfig, attention: str) -> str:
    """Return the pattern of an attention in words."""
    if attention == "dilated":
        return f"segments:rates {pattern_of(config)}" + ", offsets rotate with depth" * config.rotate_offsets
    if attention == "sparse_fixed":
        pattern = sparse_pattern_of(config)
        return f"block {pattern.block}, summary {pattern.summary} of each {pattern.step}"
    return "all earlier tokens"


def read_losses(run: Path) -> list[tuple[int, float]]:
    """Return (tokens, mean loss) of each line of training in a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None]
