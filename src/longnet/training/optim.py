"""How weights follow gradients: AdamW, its groups, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = Literal["polynomial", "linear", "cosine", "constant"]


@dataclass(kw_only=True)
class OptimConfig:
    """The recipe's table `[optim]`: AdamW and its learning rate, by default the paper's (arXiv:2307.02486 §4.1)."""

    lr: float = 6e-4
    """Learning rate at its peak, after the warm-up."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of Adam's first and second moment."""

    eps: float = 1e-8
    """Added to the root of Adam's second moment."""

    weight_decay: float = 0.01
    """Decoupled weight decay, of matrices only: biases and LayerNorms have none."""

    warmup_steps: int = 750
    """Steps over which the learning rate grows linearly to its peak; where the run is shorter, all of it."""

    schedule: Schedule = "polynomial"
    """How the learning rate falls from its peak to the last step."""

    power: float = 1.0
    """Exponent of the polynomial schedule; 1 is linear."""

    min_lr_ratio: float = 0.0
    """Where the fall would end, one step after the last, as a share of the peak."""

    clip: float = 2.0
    """Largest norm of the gradient of all weights together; longer ones are shortened to it. 0 never clips."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("lr", "eps", "power"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        for name, values in (("betas", self.betas), ("min_lr_ratio", (self.min_lr_ratio,))):
            if not all(0 <= value <= 1 for value in values) or (name == "betas" and 1 in values):
                raise ValueError(f"optim.{name} must lie between 0 and 1, got {getattr(self, name)}")


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step (0 … steps − 1), which is above 0 for each of them.

    Steps below warmup_steps, at most the run's, have lr · (step + 1) / warmup_steps. Later ones have
    lr · (m + (1 − m) · f(x)), where m = min_lr_ratio, x = (step − warmup_steps) / (steps − warmup_steps), and f(x) is
    (1 − x)^power, 1 − x, (1 + cos πx) / 2 or 1.
    """
    warmup_steps = min(optim.warmup_steps, steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    fallen = (step - warmup_steps) / max(1, steps - warmup_steps)
    share: float = {
        "polynomial": (1 - fallen) ** optim.power,
        "linear": 1 - fallen,
        "cosine": (1 + math.cos(math.pi * fallen)) / 2,
        "constant": 1.0,
    }[optim.schedule]
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the weights of a model: matrices with weight decay, all others without.

    A tied weight counts once. The kernel is fused where torch has one for the weights' device.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused
    )


def update(optimizer: torch.optim.Optimizer, *, lr: float, clip: float, norm: Tensor) -> None:
    """Clip the gradients, whose norm is known and finite, take one step, forget the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if clip > 0:
            nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of the gradient of all weights together, a scalar on their device."""
    return nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
