"""What a model costs, in closed form."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from longnet.attention.pattern import DilationPattern
from longnet.model.configuration import LongNetConfig
from longnet.model.patterns import kind_of, pattern_of, sparse_pattern_of


def attention_flops(config: LongNetConfig, *, tokens: int) -> int:
    """Count the floating-point operations of attention in one forward pass over one sequence, all layers.

    Projections are not counted; a query and a key cost 4 · head_dim, only where the key is visible
    (`DilationPattern.flops`, `SparseFixedPattern.flops`).
    """
    heads, head_dim = config.num_attention_heads, cast("int", config.head_dim)  # the configuration has filled it in
    kind = kind_of(config)
    if kind == "dilated":
        sizes: dict[str, Any] = {
            "tokens": tokens,
            "num_heads": heads,
            "head_dim": head_dim,
            "num_kv_heads": config.num_key_value_heads,
        }
        patterns = [pattern_of(config, layer) for layer in range(config.num_hidden_layers)]
        return sum(
            count * pattern.flops(**sizes, is_causal=config.is_causal) for pattern, count in Counter(patterns).items()
        )
    if kind == "sparse_fixed":
        flops = sparse_pattern_of(config).flops(tokens=tokens, num_heads=heads, head_dim=head_dim)
    else:
        dense = DilationPattern((max(1, tokens),), (1,))
        flops = dense.flops(tokens=tokens, num_heads=heads, head_dim=head_dim, is_causal=True)
    return config.num_hidden_layers * flops


def matrix_parameters(model: nn.Module, config: PreTrainedConfig) -> int:
    """Count the parameters that every token is multiplied with: all but an embedding that is not the head's, too."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total if config.tie_word_embeddings else total - config.vocab_size * config.hidden_size


def training_flops(model: nn.Module, config: LongNetConfig, *, tokens: int) -> int:
    """Count the floating-point operations of training on one sequence: forward, and backward at twice its cost.

    6 a parameter and token, 3 times the attention's forward pass; what is computed again (activation checkpointing, the
    scores in flash backward) is not counted, so that utilisation rewards none of it.
    """
    return 6 * matrix_parameters(model, config) * tokens + 3 * attention_flops(config, tokens=tokens)
