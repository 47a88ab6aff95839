"""The patterns that the configuration of a Hugging Face model holds."""

from __future__ import annotations

from transformers import PreTrainedConfig

from longnet.attention.pattern import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern


def pattern_of(config: PreTrainedConfig) -> DilationPattern:
    """Read the pattern that a config holds in segment_lengths, dilation_rates and, if not "mod", head_offsets.

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
    return DilationPattern(tuple(lengths), tuple(rates), getattr(config, "head_offsets", None) or "mod")


def is_of(pattern: DilationPattern, config: PreTrainedConfig) -> bool:
    """Say whether a config holds this pattern, without making one: a decoding step is short."""
    return (
        pattern.segment_lengths == tuple(config.segment_lengths)
        and pattern.dilation_rates == tuple(config.dilation_rates)
        and pattern.head_offsets == (getattr(config, "head_offsets", None) or "mod")
    )


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
