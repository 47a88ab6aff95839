"""What tests compare of two runs."""

import json
import warnings

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

_OF_THE_MACHINE = {"seconds", "tokens_per_s", "mfu", "memory"}


def lines(run):
    """Return the lines of metrics without the figures of the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _OF_THE_MACHINE} for row in rows]


def tensors(checkpoint):
    """Return weights and moments as bytes, which NaN and −0 do not fool, whatever ranks have written them."""
    return {name: value.numpy().tobytes() for name, value in values(checkpoint).items()}


def values(checkpoint):
    """Return weights and moments by name."""
    found = {f"weight {name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}
    if (checkpoint / "optimizer").exists():
        reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
        metadata = reader.read_metadata().state_dict_metadata
        moments = {name: torch.full(of.size, torch.nan) for name, of in metadata.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(moments, storage_reader=reader, no_dist=True)
        found |= {f"moment {name}": value for name, value in moments.items()}
    found["updates"] = torch.tensor(json.loads((checkpoint / "state.json").read_text())["updates"])
    return found


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())
