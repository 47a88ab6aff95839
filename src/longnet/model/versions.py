"""What transformers calls otherwise from one version to the next, each in one place.

Nothing here asks for a version number: it asks whether the name is there. Comments say from which version on it is, so
that what no supported version needs can go.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import create_causal_mask, sdpa_mask

output_capturing: Any
try:
    from transformers.utils import output_capturing
except ImportError:  # before 5.2
    output_capturing = None

if hasattr(PreTrainedConfig, "__post_init__"):
    FieldsConfig = PreTrainedConfig
else:  # before 5.4

    class FieldsConfig(PreTrainedConfig):  # type: ignore[no-redef,no-untyped-call]
        """A configuration whose fields are its annotations, and are checked in __post_init__, as a dataclass's."""

        def __init__(self, **kwargs: Any) -> None:
            kinds = type(self).__mro__
            for name in {name for kind in kinds[: kinds.index(FieldsConfig)] for name in inspect.get_annotations(kind)}:
                setattr(self, name, kwargs.pop(name) if name in kwargs else getattr(type(self), name))
            common = {"transformers_version", *inspect.signature(PreTrainedConfig).parameters} - {"kwargs"}
            self.__dict__["common"] = {name: kwargs.pop(name) for name in common & kwargs.keys()}
            self.__post_init__(**kwargs)

        def __post_init__(self, **kwargs: Any) -> None:
            super().__init__(**self.__dict__.pop("common"), **kwargs)


# What models, masks and generate() call a cache that they take, and the field in which models return it: "cache" from
# 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Before 5.4 models, masks and caches are told the columns of the new tokens, in a tensor.
TAKES_COLUMNS = "cache_position" in inspect.signature(sdpa_mask).parameters

# From 5.14 on generate() tells a cache when it may have to go back, and by how much; before it told the length to keep.
TELLS_WHAT_TO_RECORD = hasattr(Cache, "activate_past_recording")


def one_of(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that was given, under either of its names.

    Raises:
        ValueError: both were given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "cache and past_key_values are two names of one argument: give one of them. (PEFT hands a prefix on by the "
            "old name, beside the cache of generate(), where it would be lost: call model(ids) itself.)"
        )
    return past_key_values if cache is None else cache


def refuse_tracing(name: str, *, has_cache: bool) -> None:
    """Refuse what writes down a pass as a graph of another kind than torch.compile's and torch.export's.

    Raises:
        ValueError: torch.jit.trace, torch.onnx.export, or torch.export of a pass with a cache, as ExecuTorch wants it.
    """
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"ONNX has no operator for {name} attention: use torch.export.export without a cache, or "
            'attn_implementation="sdpa"'
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise ValueError(
            f"torch.jit.trace cannot record {name} attention: use torch.export.export without a cache, or "
            'attn_implementation="sdpa"'
        )
    if has_cache and torch.compiler.is_exporting():
        raise ValueError(
            f"torch.export, and so ExecuTorch, cannot record {name} attention with a cache, whose length a graph would "
            'not know: export with use_cache=False, or with attn_implementation="sdpa"'
        )


def query_offset(cache: Cache) -> Any:
    """Return the column of the next token in a padding mask: an int, or a 0-D tensor from a static cache.

    Caches say so themselves from 5.14 on; before it was their length.
    """
    return cache.get_query_offset(0) if hasattr(cache, "get_query_offset") else cache.get_seq_length()


def rewind(cache: StaticCache, tokens: int) -> None:
    """Make a full static cache one of its first tokens alone, in place; before 5.4 its rows of zeros were no tokens."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(tokens)
        else:
            layer.keys[:, :, tokens:] = 0


def checkpoint_layers(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Keep only what enters each layer for the backward pass, in place; the rest is computed once more.

    Args:
        model: any model of transformers, which called this gradient_checkpointing_enable before 5.23, and warns since.
        use_reentrant: which of torch.utils.checkpoint's two ways.
    """
    has_new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if has_new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def capture_outputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give a model's forward output_hidden_states and output_attentions."""
    if output_capturing is not None:
        return output_capturing.capture_outputs(forward)  # type: ignore[no-any-return]
    from transformers.utils.generic import check_model_inputs  # noqa: PLC0415

    # It also puts the configuration's use_cache in the place of one that is None or missing, so it is shown another.
    @check_model_inputs  # type: ignore[untyped-decorator]
    def checked(self: PreTrainedModel, *args: Any, use_cache_given: dict[str, Any], **kwargs: Any) -> Any:
        del kwargs["use_cache"]
        return forward(self, *args, **use_cache_given, **kwargs)

    @functools.wraps(forward)
    def capturing(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {"use_cache": kwargs.pop("use_cache")} if "use_cache" in kwargs else {}
        return checked(self, *args, use_cache=False, use_cache_given=given, **kwargs)

    return capturing


def is_asked_for_weights() -> bool:
    """Say whether the model that runs was asked for attention weights and has not told its attention.

    Models leave the request to hooks. Before 5.4 many kept it where it came in: it is read there, in the frames of
    transformers' functions, which torch.compile does not show.
    """
    if output_capturing is not None:
        collected = output_capturing._active_collector.get()
        if collected is not None and any("attentions" in name for name in collected):
            return True
    if not TAKES_COLUMNS or torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers."):
            given, kwargs = frame.f_locals, frame.f_locals.get("kwargs")
            if given.get("output_attentions") or (isinstance(kwargs, dict) and kwargs.get("output_attentions")):
                return True
        frame = frame.f_back
    return False


def columns_of(hidden_states: Tensor, past_columns: Any, given: Tensor | None) -> dict[str, Tensor]:
    """Return, as a keyword, what masks and caches before 5.4 are told of the new tokens; since then nothing.

    Args:
        hidden_states: (B, T, C) of the new tokens.
        past_columns: tokens before, padding counted.
        given: (T,) columns that generate() gave the model, or None.
    """
    if not TAKES_COLUMNS:
        return {}
    if given is None:
        given = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_columns
    return {"cache_position": given}


def as_mask_function(describe: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mask function that is written for 5.4 and later as one for this version."""
    if not TAKES_COLUMNS:
        return describe

    @functools.wraps(describe)
    def describe_columns(*, cache_position: Tensor, kv_length: int, kv_offset: int = 0, **kwargs: Any) -> Any:
        q_length, device = cache_position.shape[0], cache_position.device
        # After a prefill in chunks generate() of 5.0 to 5.2 counts one column too many, which a growing cache has not.
        q_offset = cache_position[0].clamp(max=max(0, kv_offset + kv_length - q_length))
        return describe(
            q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, device=device, **kwargs
        )

    return describe_columns
