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
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from longnet.training.checkpoint import STATE
from longnet.training.config import Tables

_OPTIMIZER = "optimizer.safetensors"
_FORMAT = 1


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


def write_state(
    folder: Path,
    state: State,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    recipe: Tables,
    fingerprint: str,
    tokenizer: Path,
) -> None:
    """Write everything that a run needs to continue into an empty folder, which is a Hugging Face model folder, too.

    Args:
        folder: the checkpoint's.
        state: where the run stands.
        model: on any device.
        optimizer: of its weights.
        recipe: resolved.
        fingerprint: of the data.
        tokenizer: the data's Hugging Face tokenizer folder.
    """
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    with _without_progress_bars():
        model.save_pretrained(folder)
    # transformers leaves the attention implementation out, but it is what this model learned with.
    configuration = json.loads((folder / "config.json").read_text())
    configuration["attn_implementation"] = recipe["model"]["attention"]
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, weight in model.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    save_file(moments, folder / _OPTIMIZER)
    record = {
        "format": _FORMAT,
        "progress": dataclasses.asdict(state),
        "recipe": recipe,
        "data": fingerprint,
        "random": _random_states(),
        "machine": _machine(model.device),
    }
    (folder / STATE).write_text(json.dumps(record) + "\n")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: progress, recipe, data, random, machine.

    Raises:
        ValueError: it was written in another format.
    """
    record: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    if record["format"] != _FORMAT:
        raise ValueError(f"{checkpoint} has format {record['format']}, this version of longnet reads {_FORMAT}")
    return record


def restore(
    checkpoint: Path, record: dict[str, Any], model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> State:
    """Put weights, moments and random states of a checkpoint back; return where the run stands."""
    load_model(model, checkpoint / "model.safetensors", device=str(model.device))
    _restore_moments(load_file(checkpoint / _OPTIMIZER), model, optimizer)
    _restore_random_states(record["random"])
    return State(**record["progress"])


def changed_machine(record: dict[str, Any], device: torch.device) -> list[str]:
    """Return, in words, what of a checkpoint's machine is another now, so that rounding may differ from here on."""
    before, now = record["machine"], _machine(device)
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


def _restore_moments(moments: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {weight: name for name, weight in model.named_parameters()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, value in moments.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    state = {index: by_name[names[weight]] for index, weight in enumerate(weights) if names[weight] in by_name}
    # load_state_dict knows on which device and in which dtype each kind of optimizer wants them.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


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


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
