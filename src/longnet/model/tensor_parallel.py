"""Which of a model's heads a rank holds, where they are split across ranks (`from_pretrained(tp_plan="auto")`)."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from longnet.attention.pattern import DilationPattern


def pattern_of_rank(
    pattern: DilationPattern, module: nn.Module, *, num_heads: int, num_kv_heads: int
) -> DilationPattern:
    """Return the pattern for the heads that this rank holds: which positions a head keeps depends on all heads.

    The rank's place is read from the layer's own parameters, DTensors that are split along their first dimension; the
    number of all heads from the configuration.

    Args:
        pattern: of the whole layer.
        module: the attention layer.
        num_heads: query heads at hand.
        num_kv_heads: key/value heads at hand.

    Raises:
        ValueError: some of the heads, and no telling which.
    """
    if not dist.is_available() or not dist.is_initialized() or max(pattern.dilation_rates) == 1:
        return pattern
    config: PreTrainedConfig = module.config  # type: ignore[assignment]
    total = getattr(config, "num_attention_heads", None)
    if not isinstance(total, int) or num_heads >= total or total % num_heads:
        return pattern
    place = _place_of(module)
    if place is None or place[1] * num_heads != total or total % (place[1] * num_kv_heads):
        raise ValueError(
            f"this rank holds {num_heads} of {total} heads, and which they are cannot be known, but what a head keeps "
            'follows from it: split heads with from_pretrained(tp_plan="auto") alone, or the sequence with '
            "longnet.sequence_parallel(mesh)"
        )
    rank, ranks = place
    return pattern.shard(rank * num_kv_heads, ranks * num_kv_heads)


def _place_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (rank, ranks) of the axis along which the layer's projections are split by output, hence by head."""
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if placement.is_shard(0) and parameter.device_mesh.size(axis) > 1:
                    return parameter.device_mesh.get_local_rank(axis), parameter.device_mesh.size(axis)
    return None
