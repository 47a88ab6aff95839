"""generate() with a DilatedCache by itself, and prompts in parts, for every model whose attention is "dilated"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from longnet.model.cache import DilatedCache, refusal
from longnet.model.documents import refuse_documents
from longnet.model.patterns import PATTERN_FIELDS, kind_of
from longnet.model.versions import CACHE, TAKES_COLUMNS, TELLS_WHAT_TO_RECORD

_PREFILL = 8192  # tokens of a prompt that go forward at a time, so that memory does not grow with the prompt

_prepare: Callable[..., Any] = GenerationMixin._prepare_cache_for_generation


@functools.wraps(_prepare)
def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, length: int
) -> Any:
    config = self.config.get_text_config(decoder=True)
    is_dilated = kind_of(config) == "dilated"
    if kind_of(config) in PATTERN_FIELDS and generation_config.use_cache is not False:
        mask, positions = (
            x if isinstance(x, Tensor) and x.ndim == 2 else None
            for x in (model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        )
        refuse_documents(positions, mask)
    given = model_kwargs.get(CACHE)
    if isinstance(given, DilatedCache) and given.start:
        raise ValueError(
            f"generate() counts positions from the start of its input_ids, got a cache that starts at {given.start}: "
            f"decode with model(ids, {CACHE}=cache)"
        )
    if (
        is_dilated
        and given is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and self._supports_default_dynamic_cache()
        and refusal(config) is None
        and _is_causal(self)
    ):
        cache = DilatedCache(config, max_tokens=length)
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION and not TELLS_WHAT_TO_RECORD
        if generation_config.is_assistant or is_assisted:
            cache.activate_past_recording()
        for layer in cache.layers:
            layer.may_keep_all = True
        model_kwargs[CACHE] = cache
        is_plain = generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant
        if is_plain and length > _PREFILL and generation_config.prefill_chunk_size is None and _is_text(model_kwargs):
            generation_config.prefill_chunk_size = _PREFILL  # of this call's own copy
        return None
    return _prepare(self, generation_config, model_kwargs, generation_mode, batch_size, length)


def _is_text(model_kwargs: dict[str, Any]) -> bool:
    """Say whether a prompt is tokens alone, which transformers cuts into parts, from 5.4 on rightly."""
    given = {name: x for name, x in model_kwargs.items() if isinstance(x, Tensor)}
    mask = given.pop("attention_mask", None)
    has_features = any(x.is_floating_point() for x in given.values())
    return not TAKES_COLUMNS and not has_features and (mask is None or mask.ndim == 2)


def _is_causal(model: nn.Module) -> bool:
    """Say whether every layer that has a place in a cache hides later keys."""
    return all(getattr(m, "is_causal", None) is not False for m in model.modules() if hasattr(m, "layer_idx"))


# Models of others know of caches only what this method tells them; subclassing would change their type.
GenerationMixin._prepare_cache_for_generation = _prepare_cache  # type: ignore[method-assign,assignment]
