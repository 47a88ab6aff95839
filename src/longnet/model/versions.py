"""What transformers calls otherwise from one version to the next, each in one place.

Nothing here asks for a version number: it asks whether the name is there. Comments say from which version on it is, so
that what no supported version needs can go.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

# What models, masks and generate() call a cache that they take, and the field in which models return it: "cache" from
# 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# From 5.14 on generate() tells a cache when it may have to go back, and by how much; before it told the length to keep.
TELLS_WHAT_TO_RECORD = hasattr(Cache, "activate_past_recording")


def query_offset(cache: Cache) -> Any:
    """Return the column of the next token in a padding mask: an int, or a 0-D tensor from a static cache.

    Caches say so themselves from 5.14 on; before it was their length.
    """
    return cache.get_query_offset(0) if hasattr(cache, "get_query_offset") else cache.get_seq_length()


def checkpoint_layers(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Keep only what enters each layer for the backward pass, in place; the rest is computed once more.

    Args:
        model: any model of transformers, which called this gradient_checkpointing_enable before 5.23, and warns since.
        use_reentrant: which of torch.utils.checkpoint's two ways.
    """
    has_new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if has_new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
