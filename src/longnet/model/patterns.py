"""The patterns that the configuration of a Hugging Face model holds."""

from __future__ import annotations

import math
import warnings
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedConfig

from longnet.attention.backends.dispatch import Backend
from longnet.attention.pattern import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern


def pattern_of(config: PreTrainedConfig, layer: int = 0) -> DilationPattern:
    """Read the pattern of a layer that a config holds in segment_lengths and dilation_rates.

    head_offsets ("mod"), queries ("kept"), global_tokens (0) and rotate_offsets (False) may be missing. With
    rotate_offsets the offsets of layer l are those of the first, shifted by l · G for G key/value heads: where a rate
    exceeds the heads, ceil(r / G) layers see all phases.

    Raises:
        ValueError: the config holds none, or one that `DilationPattern` refuses.
    """
    lengths, rates = getattr(config, "segment_lengths", None), getattr(config, "dilation_rates", None)
    if lengths is None or rates is None:
        raise ValueError(
            f'attn_implementation="dilated" needs a pattern, and {type(config).__name__} holds none: call '
            "longnet.use_dilated_attention(model, pattern) on the loaded model, or set segment_lengths and "
            "dilation_rates in the config"
        )
    return DilationPattern(tuple(lengths), tuple(rates), **_options(config, layer))


def block_of(config: PreTrainedConfig) -> int | None:
    """Return how many positions a block has that dilated attention never leaves; None where tokens see the first ones.

    All segments end together there: the least common multiple of their lengths.
    """
    return None if getattr(config, "global_tokens", None) else math.lcm(*config.segment_lengths)


# Under which names transformers knows dilated attention, and the backend of each: a choice of whoever loads a model, on
# the machine at hand, which like every attention implementation is no part of a saved configuration.
BACKENDS: dict[str, Backend] = {"dilated": "auto", "dilated_triton": "triton"}


def kind_of(config: PreTrainedConfig) -> str:
    """Return the attention implementation of a config: `"dilated"` whatever its backend, else the name it has."""
    name: str = config._attn_implementation
    return "dilated" if name in BACKENDS else name


def backend_of(config: PreTrainedConfig) -> Backend:
    """Return the backend that the attention implementation of a config asks for."""
    return BACKENDS.get(config._attn_implementation, "auto")


def dilated_by(backend: str) -> str:
    """Return the name of the attention implementation that computes dilated attention by a backend.

    Raises:
        ValueError: a backend that is none, or that serves no models.
    """
    names = {of_name: name for name, of_name in BACKENDS.items()}
    if backend not in names:
        known = " or ".join(f'"{name}"' for name in names)
        reason = (
            "serves no models, whose caches and chunks it does not know" if backend in get_args(Backend) else "is none"
        )
        raise ValueError(f"backend must be {known} for a model, got {backend!r}, which {reason}")
    return names[backend]


# What a config holds of a pattern, by the implementation that reads it, and what each field is where it is missing.
PATTERN_FIELDS: dict[str, dict[str, Any]] = {
    "dilated": {
        "segment_lengths": None, "dilation_rates": None, "head_offsets": "mod", "queries": "kept",
        "global_tokens": 0, "rotate_offsets": False,
    },
    "sparse_fixed": {"sparse_block": None, "sparse_summary": None, "sparse_stride": None},
}  # fmt: skip


def fields_of(config: PreTrainedConfig, implementation: str) -> dict[str, Any] | None:
    """Return the fields of the pattern that a config holds for an implementation, as in JSON; None without one."""
    fields = {
        name: default if getattr(config, name, None) is None else getattr(config, name)
        for name, default in PATTERN_FIELDS[implementation].items()
    }
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return None if next(iter(fields.values())) is None else fields


def is_of(pattern: DilationPattern, config: PreTrainedConfig, layer: int = 0) -> bool:
    """Say whether a layer of a config holds this pattern, without making one: a decoding step is short."""
    return (
        pattern.segment_lengths == tuple(config.segment_lengths)
        and pattern.dilation_rates == tuple(config.dilation_rates)
        and all(getattr(pattern, name) == value for name, value in _options(config, layer).items())
    )


def _options(config: PreTrainedConfig, layer: int) -> dict[str, Any]:
    rotates = getattr(config, "rotate_offsets", None) or False
    return {
        "head_offsets": getattr(config, "head_offsets", None) or "mod",
        "queries": getattr(config, "queries", None) or "kept",
        "global_tokens": getattr(config, "global_tokens", None) or 0,
        "offset_shift": layer * kv_heads_of(config) if rotates else 0,
    }


def layer_of(module: nn.Module) -> int:
    """Return which layer of its model an attention module is, 0 where all have one pattern.

    Raises:
        ValueError: offsets rotate with depth, and the module does not say its own.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None and getattr(module.config, "rotate_offsets", None):
        raise ValueError(
            f"rotate_offsets shifts the offsets layer by layer, and {type(module).__name__} does not know which layer "
            "it is: set rotate_offsets=False"
        )
    return layer or 0


def warn_of_unseen(pattern: DilationPattern, config: PreTrainedConfig) -> None:
    """Warn once where a model with a pattern has positions that no head of any layer keeps, in some branches."""
    heads, layers = kv_heads_of(config), config.num_hidden_layers
    rotates = getattr(config, "rotate_offsets", None) or False
    lacking = []
    for length, rate in pattern.branches:
        kept = {
            pattern.shifted(layer * heads).offset(rate, head, heads)
            for layer in range(min(layers, rate) if rotates else 1)
            for head in range(heads)
        }
        if len(kept) < min(rate, length):
            lacking.append((length, rate, min(rate, length) - len(kept)))
    if not lacking:
        return
    length, rate, unseen = lacking[0]
    others = {1: "", 2: " (and one other branch lacks some)"}.get(
        len(lacking), f" (and {len(lacking) - 1} other branches lack some)"
    )
    rates = f"up to {heads}" if pattern.head_offsets == "mod" else f"that divide {heads}"
    mend = f"or more than {layers} layers" if rotates else "or rotate_offsets=True, which shifts them with depth"
    warnings.warn(
        f"in the branch {length}:{rate} of {pattern} no head keeps {unseen} of each {rate} positions{others}, with "
        f"{heads} key/value heads: choose rates {rates}, {mend}",
        stacklevel=3,
    )


def kv_heads_of(config: PreTrainedConfig) -> int:
    """Return the key/value heads that a config tells of."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the key/value heads and their dimension that a config tells of."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kv_heads_of(config), head_dim


def sparse_pattern_of(config: PreTrainedConfig) -> SparseFixedPattern:
    """Read the pattern that a config holds in sparse_block, sparse_summary and, if not the block, sparse_stride.

    Raises:
        ValueError: the config holds none, or one that `SparseFixedPattern` refuses.
    """
    block, summary = getattr(config, "sparse_block", None), getattr(config, "sparse_summary", None)
    if block is None or summary is None:
        raise ValueError(
            f'attn_implementation="sparse_fixed" needs a pattern, and {type(config).__name__} holds none: call '
            "longnet.model.use_sparse_fixed_attention(model, pattern) on the loaded model, or set sparse_block and "
            "sparse_summary in the config"
        )
    return SparseFixedPattern(block, summary, getattr(config, "sparse_stride", None))
