"""What a step in chunks leaves of itself on disk beside its log: gradients so far, and the state of open segments."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longnet.durable import sync


def write_save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of safetensors, whole or not at all, to stay.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata)
        sync(partial)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; make room and resume") from error
    sync(path.parent)


def tensor_of(file: Any, name: str, device: torch.device) -> Tensor | None:
    """Return a tensor of an open file of safetensors; None where it has none of that name."""
    if name not in file.keys():  # noqa: SIM118  not a mapping
        return None
    # Into memory of torch's own: kernels round otherwise where it is aligned otherwise.
    tensor: Tensor = file.get_tensor(name).to(device, copy=True)
    return tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's share of each weight's gradient, on the CPU, as `put_gradients` reads them."""
    return {
        f"grad/{name}": _share_of(weight.grad).contiguous().cpu()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def put_gradients(model: nn.Module, file: Any) -> None:
    """Give each weight the gradient that a file holds this rank's share of, or none."""
    for name, weight in model.named_parameters():
        gradient = tensor_of(file, f"grad/{name}", weight.device)
        if gradient is not None and isinstance(weight, DTensor):
            gradient = DTensor.from_local(
                gradient, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                stride=weight.stride(),
            )  # fmt: skip
        weight.grad = gradient


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of this rank's share of the weights."""
    sha = hashlib.sha256()
    for weight in model.parameters():
        data = _share_of(weight.detach()).cpu().contiguous().view(torch.uint8).reshape(-1)
        sha.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return sha.hexdigest()


def _share_of(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
