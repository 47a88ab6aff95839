"""Dilated and fixed sparse attention as attention implementations of any Hugging Face model.

transformers calls two functions by name: one that describes the mask, once per forward, and one that attends, once per
layer. The first reads masks into `Visible`; the second honours it or refuses. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longnet.attention.dilated import attend_within, document_bounds
from longnet.attention.pattern import DilationPattern
from longnet.attention.registration import cast_under_autocast
from longnet.attention.sequence_parallel import Slices, attend_slice, gather_slices
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention
from longnet.model.cache import StreamedKeys
from longnet.model.sequence_parallel import current_group, positions_fit
from longnet.model.versions import as_mask_function, is_asked_for_weights
from longnet.model.visibility import Visible, visible_slice, visible_tokens, window_refusal


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
    """Attend along the pattern of `module.config`: the attention implementation "dilated".

    Args:
        module: the attention layer; its config holds segment_lengths, dilation_rates and, optionally, head_offsets.
        query: (B, H, Tq, D).
        key: (B, G, Tk, D), everything in the cache included.
        value: (B, G, Tk, D).
        attention_mask: what `visible_tokens` returned.
        scaling: factor on q·k.
        dropout: only 0.
        kwargs: what the model passes on; `cu_seq_lens_q` and `is_causal` are honoured, what would change the result is
            refused.

    Returns:
        out (B, Tq, H, D), and None for the attention weights.

    Raises:
        ValueError: no pattern in the config, or something that dilated attention cannot honour.
    """
    config = _config_of(module)
    if isinstance(key, StreamedKeys):
        pattern = key.layer.pattern  # made once; a step is short
        if not _is_of(pattern, config):
            raise ValueError(f"this DilatedCache is for the pattern {pattern}, the model's is {pattern_of(config)}")
    else:
        pattern = pattern_of(config)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor | None, is_causal: bool) -> Tensor:
        if isinstance(key, StreamedKeys):
            return key.layer.attend(q, scale=scaling, bounds=bounds)
        if isinstance(attention_mask, Visible) and attention_mask.slices is not None:
            slices = attention_mask.slices
            slices = slices if bounds is None else replace(slices, bounds=bounds)
            q, k, v = cast_under_autocast(q, k, v)
            scale = q.shape[3] ** -0.5 if scaling is None else scaling
            return attend_slice(q, k, v, pattern, slices, is_causal=is_causal, scale=scale)[0]
        return attend_within(q, k, v, pattern, bounds=bounds, is_causal=is_causal, scale=scaling)[0]

    return _attend("dilated", attend, module, query, key, value, attention_mask, dropout, kwargs)


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
    pattern = sparse_pattern_of(_config_of(module))

    def attend(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor | None, is_causal: bool) -> Tensor:
        if not is_causal:
            raise ValueError(
                'sparse_fixed attention is causal, and this model is not: use attn_implementation="dilated"'
            )
        return sparse_fixed_attention(q, k, v, pattern, bounds=bounds, scale=scaling)

    return _attend("sparse_fixed", attend, module, query, key, value, attention_mask, dropout, kwargs)


def _attend(
    name: str,
    attend: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible | Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    if isinstance(visible, Tensor):
        raise ValueError(
            f"{name} attention got a mask of shape {tuple(visible.shape)}, which it cannot honour: pass a 2-D padding "
            'mask (batch, tokens), or cu_seq_lens for packed documents, or attn_implementation="sdpa"'
        )
    if visible is None and (group := current_group()) is not None:
        slices = gather_slices(group, query.transpose(1, 2), None)
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        visible = visible_slice(slices, query.shape[2], bool(is_causal))
    refusal = _refusal(name, module, query, key, value, visible, dropout, kwargs)
    if refusal is not None:
        raise ValueError(
            f"{name} attention in {type(module).__name__}: {refusal}; or attend in full, with "
            'attn_implementation="sdpa" or "eager"'
        )
    tokens, bounds, is_causal = key.shape[2], None, kwargs.get("is_causal")
    if visible is not None:
        tokens, bounds, is_causal = visible.tokens, visible.bounds, visible.is_causal
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        bounds = _bounds_read(visible, cu_seqlens)
        if bounds is None:
            whole = tokens if visible is None or visible.slices is None else int(visible.slices.edges[-1])
            bounds = document_bounds(cu_seqlens, whole)
            if visible is not None and not torch.compiler.is_compiling():
                visible.documents.append((cu_seqlens, bounds))
    out = attend(query, key[:, :, :tokens], value[:, :, :tokens], bounds=bounds, is_causal=bool(is_causal))
    return out.transpose(1, 2), None


# Keywords of models and caches that change the result, and what to do about each.
_REFUSED = {
    "softcap": "soft-capped logits cannot be honoured (attn_logit_softcapping=None in the config switches them off)",
    "s_aux": "attention sinks (s_aux) cannot be honoured",
    "position_bias": "an additive position bias cannot be honoured: choose a model with rotary or absolute positions",
    "indices": "sparse indices of the model's own cannot be honoured",
    "block_indices": "sparse indices of the model's own cannot be honoured",
    "topk_indices": "sparse indices of the model's own cannot be honoured",
    "sinks": "attention sinks cannot be honoured",
    "head_mask": "a head_mask cannot be honoured: zero the head's columns of the output projection instead",
    "cache": "a paged cache cannot be honoured: use the dynamic or the static cache",
    "block_table": "a paged cache cannot be honoured: use the dynamic or the static cache",
}


def _stream_refusal(name: str, visible: Visible | None, kwargs: dict[str, Any]) -> str | None:
    if name != "dilated":
        return f"a DilatedCache cannot serve {name} attention: use the dynamic or the static cache"
    if kwargs.get("cu_seq_lens_q") is not None:
        return "packed documents cannot be continued from a cache: pass use_cache=False"
    is_causal = visible.is_causal if visible is not None else kwargs.get("is_causal", True)
    return None if is_causal else "a DilatedCache serves causal attention alone"


def _slice_refusal(name: str, visible: Visible, slices: Slices, kwargs: dict[str, Any]) -> str | None:
    if name != "dilated":
        return f"{name} attention cannot be computed across ranks: leave longnet.sequence_parallel"
    is_packed = kwargs.get("cu_seq_lens_q") is not None
    if visible.refusal is not None and not is_packed:
        return visible.refusal
    positions = kwargs.get("position_ids")
    if positions is None or is_packed or visible.documents:
        return None
    visible.documents.append((positions, slices.bounds))  # once a pass
    if not positions_fit(positions, slices):
        return (
            "position_ids of some rank do not start where its slice of the sequence does: give the model to "
            "longnet.sequence_parallel(mesh, model), or position_ids of the whole sequence"
        )
    return None


def _refusal(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Say what of a call cannot be honoured and what to do, or None."""
    for keyword, reason in _REFUSED.items():
        if kwargs.get(keyword) is not None:
            return reason
    if isinstance(key, StreamedKeys):
        refusal = _stream_refusal(name, visible, kwargs)
        if refusal is not None:
            return refusal
    if kwargs.get("output_attentions") or is_asked_for_weights():
        return "output_attentions=True cannot be honoured: the weights are never formed"
    if dropout:
        return (
            f"attention dropout of {dropout} cannot be honoured: load the model with attention_dropout=0.0 "
            "(attn_pdrop in GPT-2, attention_probs_dropout_prob in BERT)"
        )
    if getattr(_config_of(module), "is_encoder_decoder", False):
        return "an encoder-decoder model attends across two sequences, which share no segments: it cannot be dilated"
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return "cross-attention cannot be dilated: queries and keys share no segments"
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        return (
            f"head dims that differ (q {query.shape[3]}, k {key.shape[3]}, v {value.shape[3]}) cannot be honoured: "
            "pad the values to those of the keys"
        )
    tokens = key.shape[2]
    if visible is None:
        if query.shape[2] != tokens:
            return f"{query.shape[2]} queries against {tokens} keys without a mask: their positions are unknown"
    else:
        if visible.slices is not None:
            refusal = _slice_refusal(name, visible, visible.slices, kwargs)
            if refusal is not None:
                return refusal
        elif visible.refusal is not None:
            return visible.refusal
        tokens = visible.tokens
        if visible.skipped != (key.layer.columns if isinstance(key, StreamedKeys) else 0):
            return "the mask was made without the cache, or for another one: give both the same"
        if query.shape[2] != visible.q_tokens or key.shape[2] < tokens - visible.skipped:
            return (
                f"the mask tells of {visible.q_tokens} queries and {tokens} keys, the layer has {query.shape[2]} and "
                f"{key.shape[2]}"
            )
    window = kwargs.get("sliding_window")
    if window is not None and window < tokens:
        return window_refusal(window, tokens)
    is_causal = kwargs.get("is_causal")
    if visible is not None and is_causal is not None and bool(is_causal) != visible.is_causal:
        return f"is_causal={is_causal} contradicts the mask: set is_causal in the config instead"
    if kwargs.get("cu_seq_lens_q") is not None:
        if query.shape[0] != 1 or query.shape[2] != tokens:
            return (
                "cu_seq_lens packs documents into one row without a cache, got a batch of "
                f"{query.shape[0]}, {query.shape[2]} queries and {tokens} keys: pass use_cache=False"
            )
        if visible is not None and visible.is_padded:
            return "an attention_mask beside cu_seq_lens is ambiguous: packed documents need no mask"
        q_edges, k_edges = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
        if k_edges is None or not (
            torch.compiler.is_compiling() or _bounds_read(visible, q_edges) is not None or torch.equal(q_edges, k_edges)
        ):
            return "cu_seq_lens_q needs cu_seq_lens_k, equal to it"
    return None


def _bounds_read(visible: Visible | None, cu_seqlens: Tensor) -> Tensor | None:
    documents = [] if visible is None else visible.documents
    return next((bounds for edges, bounds in documents if edges is cu_seqlens), None)


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


def _is_of(pattern: DilationPattern, config: PreTrainedConfig) -> bool:
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


def use_dilated_attention(model: nn.Module, pattern: DilationPattern) -> None:
    """Turn a loaded Hugging Face model into its dilated self, in place; no weight changes.

    The pattern goes into the config, so that `save_pretrained` keeps it; which attention to use is not saved, so load
    with `attn_implementation="dilated"`.

    Args:
        model: a `PreTrainedModel`, or a module around one (PEFT).
        pattern: the branches.

    Raises:
        TypeError: `pattern` is no DilationPattern, or `model` holds no Hugging Face model.
        ValueError: a model whose attention cannot be chosen.
    """
    if not isinstance(pattern, DilationPattern):
        raise TypeError(
            f"pattern must be a DilationPattern, got {type(pattern).__name__}: DilationPattern.parse reads text"
        )
    _use(
        model, "dilated",
        segment_lengths=list(pattern.segment_lengths),
        dilation_rates=list(pattern.dilation_rates),
        head_offsets=pattern.head_offsets,
    )  # fmt: skip


def use_sparse_fixed_attention(model: nn.Module, pattern: SparseFixedPattern) -> None:
    """Turn a loaded Hugging Face model into a Sparse Transformer with the fixed pattern, in place.

    Args, errors and what is saved are those of `use_dilated_attention`.
    """
    if not isinstance(pattern, SparseFixedPattern):
        raise TypeError(f"pattern must be a SparseFixedPattern, got {type(pattern).__name__}")
    _use(
        model,
        "sparse_fixed",
        sparse_block=pattern.block,
        sparse_summary=pattern.summary,
        sparse_stride=pattern.stride,
    )


def _use(model: nn.Module, name: str, **fields: Any) -> None:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise TypeError(f"a Hugging Face model is expected, got {type(model).__name__}, which holds no PreTrainedModel")
    models[0].set_attn_implementation(name)
    for inner in models:
        if inner.config._attn_implementation != name:
            raise ValueError(f"{type(inner).__name__} does not let its attention be chosen through AttentionInterface")
    for config in {id(module.config): module.config for module in model.modules() if _has_config(module)}.values():
        for name_of_field, value in fields.items():
            setattr(config, name_of_field, value)


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def _config_of(module: nn.Module) -> PreTrainedConfig:
    return cast("PreTrainedConfig", module.config)


AttentionInterface.register("dilated", dilated_attention_forward)
AttentionMaskInterface.register("dilated", as_mask_function(visible_tokens))
AttentionInterface.register("sparse_fixed", sparse_fixed_attention_forward)
AttentionMaskInterface.register("sparse_fixed", as_mask_function(visible_tokens))
