"""What tests compare of two runs."""

import json

from safetensors.torch import load_file

_OF_THE_MACHINE = {"seconds", "tokens_per_s", "mfu", "memory"}


def lines(run):
    """Return the lines of metrics without the figures of the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _OF_THE_MACHINE} for row in rows]


def tensors(checkpoint):
    """Return weights and moments as bytes, which NaN and −0 do not fool."""
    found = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        found |= {f"{name} {key}": value.numpy().tobytes() for key, value in load_file(checkpoint / name).items()}
    return found


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())
