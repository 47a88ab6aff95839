"""The file that keeps what was measured; how it is measured is `longnet.measurement`'s."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longnet.measurement import provenance


def append(rows: Sequence[Mapping[str, Any]], path: Path, device: torch.device) -> None:
    """Append rows, each with its provenance, to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = provenance(device)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**about, **row}) + "\n")
