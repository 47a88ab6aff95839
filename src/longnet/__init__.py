"""LongNet (arXiv:2307.02486): Transformers on very long sequences through dilated attention."""

from longnet.attention.dilated import dilated_attention
from longnet.attention.pattern import DilationPattern

__all__ = ["DilationPattern", "dilated_attention"]
