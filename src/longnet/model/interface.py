"""Dilated and fixed sparse attention as attention implementations of any Hugging Face model.

transformers calls two functions by name: one that describes the mask, once per forward, and one that attends, once per
layer. The first reads masks into `Visible`; the second honours it or refuses. Nothing is dropped silently.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longnet.attention.backends.dispatch import Backend
from longnet.attention.dilated import attend_within, document_bounds
from longnet.attention.pattern import DilationPattern
from longnet.attention.registration import cast_under_autocast
from longnet.attention.sequence_parallel import attend_slice
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention
from longnet.model.cache import StreamedKeys
from longnet.model.demands import Call, bounds_read, refusal
from longnet.model.documents import read_by
from longnet.model.patterns import (
    BACKENDS,
    PATTERN_FIELDS,
    backend_of,
    dilated_by,
    fields_of,
    is_of,
    layer_of,
    pattern_of,
    sparse_pattern_of,
    warn_of_unseen,
)
from longnet.model.sequence_parallel import current_chunk, is_within_chunk, slices_here
from longnet.model.tensor_parallel import pattern_of_rank
from longnet.model.versions import as_mask_function
from longnet.model.visibility import Visible, visible_slice, visible_tokens


def dilated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along the pattern of `module.config`: the attention implementations of `longnet.model.patterns.BACKENDS`.

    Args:
        module: the attention layer; its config holds the pattern (`longnet.model.patterns.pattern_of`).
        query: (B, H, Tq, D).
        key: (B, G, Tk, D), everything in the cache included.
        value: (B, G, Tk, D).
        attention_mask: what `visible_tokens` returned.
        scaling: factor on q·k.
        dropout: only 0.
        kwargs: what the model passes on; `longnet.model.demands` says what of it is honoured, and what is refused.

    Returns:
        out (B, Tq, H, D), and None for the attention weights.

    Raises:
        ValueError: no pattern in the config, or something that dilated attention cannot honour.
    """
    if torch.compiler.is_compiling() and (is_within_chunk() or isinstance(key, StreamedKeys)):
        # What each chunk, layer and cache has of its own stays out of what is compiled, which then serves all of them.
        uncompiled = _attend_uncompiled(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        return cast("tuple[Tensor, None]", uncompiled)
    config = cast("PreTrainedConfig", module.config)
    layer = layer_of(module)
    if isinstance(key, StreamedKeys) and not key.layer.holds(value):
        key = key.as_subclass(Tensor)
    if isinstance(key, StreamedKeys):
        pattern = key.layer.pattern  # made once; a step is short
        if not is_of(pattern, config, layer):
            wanted = pattern_of(config, layer)
            raise ValueError(f"this DilatedCache is for the pattern {pattern}, the model's is {wanted}")
    else:
        pattern = pattern_of(config, layer)

    pattern = pattern_of_rank(pattern, module, num_heads=query.shape[1], num_kv_heads=key.shape[1])
    call = Call("dilated", module, query, key, value, attention_mask, dropout, kwargs)
    backend = backend_of(config)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor | None, is_causal: bool) -> Tensor:
        sinks = call.sinks
        if isinstance(key, StreamedKeys):
            return key.layer.attend(q, pattern, scale=scaling, bounds=bounds, sinks=sinks, backend=backend)
        if isinstance(attention_mask, Visible) and attention_mask.slices is not None:
            slices = attention_mask.slices
            slices = slices if bounds is None else replace(slices, bounds=bounds)
            scale = q.shape[3] ** -0.5 if scaling is None else float(scaling)
            chunk = current_chunk()
            if chunk is not None:
                if not is_causal or not isinstance(getattr(module, "layer_idx", None), int):
                    raise ValueError(f"chunks serve causal layers that know their number, not {type(module).__name__}")
                return chunk.attend(layer, q, k, v, pattern, scale=scale, sinks=sinks)
            q, k, v = cast_under_autocast(q, k, v)
            options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "sinks": sinks, "backend": backend}
            return attend_slice(q, k, v, pattern, slices, **options)[0]
        options = {"is_causal": is_causal, "scale": scaling, "sinks": sinks, "backend": backend}
        return attend_within(q, k, v, pattern, bounds=bounds, **options)[0]

    return _attend(call, attend)


_attend_uncompiled = torch.compiler.disable(dilated_attention_forward)  # type: ignore[no-untyped-call]


def sparse_fixed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along the fixed pattern of the Sparse Transformer: the attention implementation "sparse_fixed".

    Args, returns and errors are those of `dilated_attention_forward`, except that the config holds sparse_block,
    sparse_summary and, optionally, sparse_stride, and that a model that is not causal is refused.
    """
    pattern = sparse_pattern_of(cast("PreTrainedConfig", module.config))
    call = Call("sparse_fixed", module, query, key, value, attention_mask, dropout, kwargs)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor | None, is_causal: bool) -> Tensor:
        return sparse_fixed_attention(q, k, v, pattern, bounds=bounds, scale=scaling, sinks=call.sinks)

    return _attend(call, attend)


def _attend(call: Call, attend: Callable[..., Tensor]) -> tuple[Tensor, None]:
    slices = slices_here(call.query.transpose(1, 2), None) if call.mask is None else None
    if slices is not None:
        call = replace(call, mask=visible_slice(slices, call.query.shape[2], call.is_causal))
    reason = refusal(call)
    if reason is not None:
        raise ValueError(
            f"{call.name} attention in {type(call.module).__name__}: {reason}; or attend in full, with "
            'attn_implementation="sdpa" or "eager"'
        )
    visible, tokens = call.visible, call.tokens
    bounds = None if visible is None else visible.bounds
    cu_seqlens = call.kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        bounds = bounds_read(visible, cu_seqlens)
        if bounds is None:
            whole = tokens if visible is None or visible.slices is None else int(visible.slices.edges[-1])
            bounds = document_bounds(cu_seqlens, whole)
            if visible is not None and not torch.compiler.is_compiling():
                visible.documents.append((cu_seqlens, bounds))
    key, value = call.key[:, :, :tokens], call.value[:, :, :tokens]
    out = attend(call.query, key, value, bounds=bounds, is_causal=call.is_causal)
    return out.transpose(1, 2), None


def use_dilated_attention(
    model: nn.Module, pattern: DilationPattern, *, rotate_offsets: bool = False, backend: Backend = "auto"
) -> None:
    """Turn a loaded Hugging Face model into its dilated self, in place; no weight changes.

    The pattern goes into the config, so that `save_pretrained` keeps it; which attention to use, and its backend, is
    not saved, so load with `attn_implementation="dilated"`.

    Args:
        model: a `PreTrainedModel`, or a module around one (PEFT).
        pattern: the branches.
        rotate_offsets: shift the heads' offsets with depth, by the number of key/value heads a layer, so that rates
            above that number leave out no position.
        backend: `"auto"`, or `"triton"`, as in `dilated_attention`: the attention implementation `"dilated_triton"`.

    Raises:
        TypeError: `pattern` is no DilationPattern, or `model` holds no Hugging Face model, or one without attention.
        ValueError: a model whose attention cannot be chosen, a backend that models do not have, or a pattern for some
            of a layer's heads, or shifted.
    """
    if not isinstance(pattern, DilationPattern):
        raise TypeError(
            f"pattern must be a DilationPattern, got {type(pattern).__name__}: DilationPattern.parse reads text"
        )
    if pattern.offset_shift or pattern.head_shard is not None:
        raise ValueError(
            f"a model shifts offsets by layer and knows its own heads, got {pattern!r}: rotate_offsets=True shifts them"
        )
    exchange(
        model, dilated_by(backend),
        segment_lengths=list(pattern.segment_lengths),
        dilation_rates=list(pattern.dilation_rates),
        head_offsets=pattern.head_offsets,
        queries=pattern.queries,
        global_tokens=pattern.global_tokens,
        rotate_offsets=rotate_offsets,
    )  # fmt: skip
    for config in {id(inner.config): inner.config for inner in _models_in(model)}.values():
        warn_of_unseen(pattern, config.get_text_config())


def use_sparse_fixed_attention(model: nn.Module, pattern: SparseFixedPattern) -> None:
    """Turn a loaded Hugging Face model into a Sparse Transformer with the fixed pattern, in place.

    Args, errors and what is saved are those of `use_dilated_attention`.
    """
    if not isinstance(pattern, SparseFixedPattern):
        raise TypeError(f"pattern must be a SparseFixedPattern, got {type(pattern).__name__}")
    exchange(
        model,
        "sparse_fixed",
        sparse_block=pattern.block,
        sparse_summary=pattern.summary,
        sparse_stride=pattern.stride,
    )


def exchange(model: nn.Module, name: str, **fields: Any) -> None:
    """Let a loaded model attend by another implementation, in place; its config takes the fields of the pattern.

    Args:
        model: a `PreTrainedModel`, or a module around one.
        name: of the implementation.
        fields: of the pattern, by their names in the config (`longnet.model.patterns.PATTERN_FIELDS`).

    Raises:
        TypeError: no Hugging Face model, or one without attention.
        ValueError: its attention cannot be chosen.
    """
    models = _models_in(model)
    if not models:
        raise TypeError(f"a Hugging Face model is expected, got {type(model).__name__}, which holds no PreTrainedModel")
    heads = [getattr(inner.config.get_text_config(), "num_attention_heads", None) for inner in models]
    if not any(heads):
        raise TypeError(
            f"{type(models[0]).__name__} has no attention heads (its config holds no num_attention_heads): there is no "
            "attention that could be exchanged"
        )
    if any(isinstance(number, list | tuple) for number in heads):
        raise TypeError(
            f"{type(models[0]).__name__} has stages with numbers of heads of their own, {heads[0]}: the attention "
            "within its windows cannot be exchanged"
        )
    models[0].set_attn_implementation(name)
    for inner in models:
        if inner.config._attn_implementation != name:
            raise ValueError(f"{type(inner).__name__} does not let its attention be chosen through AttentionInterface")
    for config in {id(module.config): module.config for module in model.modules() if _has_config(module)}.values():
        for name_of_field, value in fields.items():
            setattr(config, name_of_field, value)


def _models_in(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


_check_and_adjust: Callable[..., Any] = PreTrainedModel._check_and_adjust_attn_implementation


@functools.wraps(_check_and_adjust)
def _choose(
    self: PreTrainedModel, attn_implementation: str | None, is_init_check: bool = False, *args: Any, **kwargs: Any
) -> Any:
    if attn_implementation in PATTERN_FIELDS or attn_implementation in BACKENDS:
        for module in (self, *self.modules()):
            if isinstance(module, PreTrainedModel):
                read_by(type(module))
        if is_init_check and attn_implementation in BACKENDS and fields_of(self.config, "dilated") is not None:
            config = self.config.get_text_config()  # models of other parts come here with their own
            if isinstance(getattr(config, "num_attention_heads", None), int):
                warn_of_unseen(pattern_of(self.config), config)
    elif attn_implementation is None:
        for name in PATTERN_FIELDS:
            if fields_of(self.config, name) is not None:
                warnings.warn(
                    f"the configuration of {type(self).__name__} holds a pattern of {name} attention, and the model "
                    f'attends in full: load it with attn_implementation="{name}", or with "sdpa" if that is meant',
                    stacklevel=2,
                )
    return _check_and_adjust(self, attn_implementation, is_init_check, *args, **kwargs)


# Whoever builds, loads or changes a model passes here.
PreTrainedModel._check_and_adjust_attn_implementation = _choose  # type: ignore[method-assign]
for _name in BACKENDS:
    AttentionInterface.register(_name, dilated_attention_forward)
    AttentionMaskInterface.register(_name, as_mask_function(visible_tokens))
AttentionInterface.register("sparse_fixed", sparse_fixed_attention_forward)
AttentionMaskInterface.register("sparse_fixed", as_mask_function(visible_tokens))
