"""LongNet in Hugging Face's terms. Importing this makes the attention implementations known to transformers."""

from longnet.model.interface import use_dilated_attention, use_sparse_fixed_attention

__all__ = ["use_dilated_attention", "use_sparse_fixed_attention"]
