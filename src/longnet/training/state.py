"""What a checkpoint holds beside weights, and putting all of it back: a run continues as if it had never stopped."""

from __future__ import annotations

import base64
import dataclasses
import json
import platform
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.utils import logging

from longnet.training.checkpoint import STATE
from longnet.training.config import Tables
from longnet.training.parallel import Ranks, whole

_OPTIMIZER = "optimizer"
FORMAT = 2  # of moments and state; a model's files are those of Hugging Face


@dataclass
class State:
    """Where a run stands; the loader's place is the step.

    Attributes:
        step: steps finished.
        loss: of the last step that counted, in nats per token.
        losses: of the steps since the last line of metrics.
        seconds: spent in steps.
        skipped: steps whose loss or gradient was not finite.
        skipped_in_a_row: those of them that were the last ones.
    """

    step: int = 0
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class Snapshot:
    """What a checkpoint will hold, copied, so that training may go on while it is written.

    Attributes:
        weights: of the model, on the CPU; empty on all ranks but the first.
        moments: Adam's, this rank's share of them, on the CPU.
        record: everything else that a run needs to continue.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    record: dict[str, Any]


def take_snapshot(
    state: State,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    recipe: Tables,
    fingerprint: str,
) -> Snapshot:
    """Copy everything that a run needs to continue; every rank calls it.

    Args:
        state: where the run stands.
        model: on any device.
        optimizer: of its weights.
        ranks: that share them.
        recipe: resolved.
        fingerprint: of the data.
    """
    weights: dict[str, Tensor] = {}
    first_names: dict[Tensor, str] = {}  # a weight with two names is copied once
    for name, weight in model.state_dict(keep_vars=True).items():
        first_name = first_names.setdefault(weight, name)
        if first_name == name:
            gathered = whole(weight.detach())
            if ranks.is_first:
                weights[name] = ranks.copy_to_cpu(gathered)
        elif ranks.is_first:
            weights[name] = weights[first_name]
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    moments, updates = {}, 0
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            if key == "step":  # the same for all weights
                updates = int(value)
            else:
                moments[f"{names[weight]}/{key}"] = ranks.copy_to_cpu(value)
    record = {
        "format": FORMAT,
        "progress": dataclasses.asdict(state),
        "updates": updates,
        "recipe": recipe,
        "data": fingerprint,
        "random": _random_states(),
        "machine": _machine(ranks),
    }
    return Snapshot(weights, moments, record)


def write_snapshot(folder: Path, snapshot: Snapshot, model: PreTrainedModel, ranks: Ranks, *, tokenizer: Path) -> None:
    """Write a snapshot into an empty folder, which is a Hugging Face model folder, too; every rank calls it.

    Args:
        folder: the checkpoint's.
        snapshot: what to write.
        model: whose weights they are.
        ranks: that share them.
        tokenizer: the data's Hugging Face tokenizer folder.

    Raises:
        OSError: on every rank, where one cannot write.
    """
    group = ranks.saving_group
    ranks.on_first_while_saving(lambda: _write_model(folder, snapshot, model, tokenizer))
    if not snapshot.moments:
        return
    writer = HuggingFaceStorageWriter(str(folder / _OPTIMIZER), save_distributed=True)
    try:
        save(dict(snapshot.moments), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise reason if isinstance(reason, OSError) else OSError(f"rank {rank}: {reason}") from error


def _write_model(folder: Path, snapshot: Snapshot, model: PreTrainedModel, tokenizer: Path) -> None:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    with _without_progress_bars():
        model.save_pretrained(folder, state_dict=dict(snapshot.weights))
    # transformers leaves the attention implementation out, but it is what this model learned with.
    configuration = json.loads((folder / "config.json").read_text())
    configuration["attn_implementation"] = snapshot.record["recipe"]["model"]["attention"]
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    (folder / STATE).write_text(json.dumps(snapshot.record) + "\n")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: format, progress, recipe, data, random, machine."""
    record: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return record


def restore_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Put the weights of a checkpoint back, into a model that is not shared out yet."""
    load_model(model, checkpoint / "model.safetensors", device=str(model.device))


def restore_state(
    checkpoint: Path, record: dict[str, Any], model: PreTrainedModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> State:
    """Put moments and random states of a checkpoint back, on other ranks too; return where the run stands."""
    if record["updates"]:
        _restore_moments(checkpoint / _OPTIMIZER, record["updates"], model, optimizer, ranks)
    _restore_random_states(record["random"])
    return State(**record["progress"])


def changed_machine(record: dict[str, Any], ranks: Ranks) -> list[str]:
    """Return, in words, what of a checkpoint's machine is another now, so that rounding may differ from here on."""
    before, now = record["machine"], _machine(ranks)
    return [f"{name} {before.get(name)} → {now[name]}" for name in now if before.get(name) != now[name]]


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    # transformers draws one for each file that it writes.
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _restore_moments(
    folder: Path, updates: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    weights = dict(model.named_parameters())
    moments = {path: torch.zeros_like(weights[_owner(path)]) for path in reader.read_metadata().state_dict_metadata}
    group = ranks.saving_group
    load(moments, storage_reader=reader, process_group=group, no_dist=group is None)
    state: dict[Tensor, dict[str, Tensor]] = {}
    for path, value in moments.items():
        of_weight = state.setdefault(weights[_owner(path)], {"step": torch.tensor(float(updates))})
        of_weight[path.rpartition("/")[2]] = value
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_index = {index: state[weight] for index, weight in enumerate(order) if weight in state}
    # load_state_dict knows on which device and in which dtype each kind of optimizer wants them.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def _owner(path: str) -> str:
    return path.rpartition("/")[0]


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    version, words, rest = states["python"]
    random.setstate((version, tuple(words), rest))
    torch.set_rng_state(_decode(states["torch"]))
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(state) for state in states["cuda"]])


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _machine(ranks: Ranks) -> dict[str, Any]:
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ranks": f"{ranks.config.dp} × {ranks.config.sp}",
    }
