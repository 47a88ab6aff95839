"""What calls ask of attention, and which implementation honours it: one table for all models.

A model, a cache or a user asks by a keyword, a mask, the shapes of what is attended to, or the kind of its layer. What
an implementation does not honour is refused in one line: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from longnet.model.cache import StreamedKeys
from longnet.model.sequence_parallel import positions_fit
from longnet.model.versions import is_asked_for_weights
from longnet.model.visibility import Visible, window_refusal

Implementation = Literal["dilated", "sparse_fixed"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an attention implementation, as transformers makes it.

    Args:
        name: of the implementation.
        module: the attention layer.
        query: (B, H, Tq, D).
        key: (B, G, Tk, D), from a DilatedCache the new ones alone.
        value: (B, G, Tk, D).
        mask: what the pass may see, a mask that was not made for this implementation, or None.
        dropout: of the weights.
        kwargs: what the model passes on.
    """

    name: Implementation
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Visible | Tensor | None
    dropout: float
    kwargs: dict[str, Any]

    @property
    def visible(self) -> Visible | None:
        """What the pass may see, where a mask was made that says so."""
        return None if isinstance(self.mask, Tensor) else self.mask

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, which every layer holds that asks for an implementation by name."""
        return cast("PreTrainedConfig", self.module.config)

    @property
    def sinks(self) -> Tensor | None:
        """(H,) or (B, H, Tq) logits of one more key of value 0, by the names that models give them."""
        sinks: Tensor | None = self.kwargs.get("s_aux")
        if sinks is None:
            sinks = self.kwargs.get("sinks")
        return sinks.squeeze(-1) if sinks is not None and sinks.ndim == 4 else sinks

    @property
    def tokens(self) -> int:
        """Valid keys, those that a DilatedCache does not hand out included."""
        return self.key.shape[2] if self.visible is None else self.visible.tokens

    @property
    def is_causal(self) -> bool:
        """What the mask says, else the keyword, else the layer."""
        if self.visible is not None:
            return self.visible.is_causal
        is_causal = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if is_causal is None else is_causal)


class Demand(NamedTuple):
    """One thing that a call may ask for.

    Args:
        what: its name, found in `HONOURED` where an implementation can do it.
        refusal: say of a call that asks for it why that cannot be honoured and what to do; None where it does not ask.
    """

    what: str
    refusal: Callable[[Call], str | None]


# What each implementation can do beyond attending within one row of real tokens, or several packed, behind a mask or
# a cache that keeps all keys.
HONOURED: dict[Implementation, frozenset[str]] = {
    "dilated": frozenset({"a DilatedCache", "a slice of a sequence", "no causality"}),
    "sparse_fixed": frozenset(),
}


def refusal(call: Call) -> str | None:
    """Say what of a call cannot be honoured and what to do, or None."""
    honoured = HONOURED[call.name]
    for what, refusal_of in _DEMANDS:
        if what not in honoured:
            reason = refusal_of(call)
            if reason is not None:
                return reason
    return None


def bounds_read(visible: Visible | None, cu_seqlens: Tensor) -> Tensor | None:
    """Return the bounds of documents that an earlier layer of the pass has read from these cu_seqlens, or None."""
    documents = [] if visible is None else visible.documents
    return next((bounds for edges, bounds in documents if edges is cu_seqlens), None)


def _keyword(what: str, names: tuple[str, ...], reason: str) -> Demand:
    def refusal_of(call: Call) -> str | None:
        for name in names:
            if call.kwargs.get(name) is not None:
                return reason
        return None

    return Demand(what, refusal_of)


def _sinks_of_other_heads(call: Call) -> str | None:
    sinks, shape = call.sinks, call.query.shape
    if sinks is None or sinks.shape in (shape[1:2], shape[:3]):
        return None
    return f"attention sinks {tuple(sinks.shape)} do not fit {shape[1]} heads and {shape[2]} queries"


def _dense_mask(call: Call) -> str | None:
    if not isinstance(call.mask, Tensor):
        return None
    return (
        f"a dense mask of shape {tuple(call.mask.shape)}, given or made by the model itself, cannot be honoured: pass "
        "a 2-D padding mask (batch, tokens), or cu_seq_lens for packed documents; a model that makes it itself cannot "
        "be dilated"
    )


def _weights(call: Call) -> str | None:
    if call.kwargs.get("output_attentions") or is_asked_for_weights():
        return "output_attentions=True cannot be honoured: the weights are never formed"
    return None


def _dropout(call: Call) -> str | None:
    if not call.dropout:
        return None
    return (
        f"attention dropout of {call.dropout} cannot be honoured: load the model with attention_dropout=0.0 "
        "(attn_pdrop in GPT-2, attention_probs_dropout_prob in BERT)"
    )


def _two_sequences(call: Call) -> str | None:
    if getattr(call.config, "is_encoder_decoder", False):
        return "an encoder-decoder model attends across two sequences, which share no segments: it cannot be dilated"
    if getattr(call.module, "is_cross_attention", False) or "Cross" in type(call.module).__name__:
        return "cross-attention cannot be dilated: queries and keys share no segments"
    return None


def _head_dims(call: Call) -> str | None:
    q, k, v = call.query.shape[3], call.key.shape[3], call.value.shape[3]
    if q == k == v:
        return None
    return f"head dims that differ (q {q}, k {k}, v {v}) cannot be honoured: pad the values to those of the keys"


def _cached_stream(call: Call) -> str | None:
    if not isinstance(call.key, StreamedKeys):
        return None
    return f"a DilatedCache cannot serve {call.name} attention: use the dynamic or the static cache"


def _stream_of_another_kind(call: Call) -> str | None:
    if not isinstance(call.key, StreamedKeys):
        return None
    if call.kwargs.get("cu_seq_lens_q") is not None:
        return "packed documents cannot be continued from a cache: pass use_cache=False"
    return None if call.is_causal else "a DilatedCache serves causal attention alone"


def _slice(call: Call) -> str | None:
    if call.visible is None or call.visible.slices is None:
        return None
    return f"{call.name} attention cannot be computed across ranks: leave longnet.sequence_parallel"


def _slice_misplaced(call: Call) -> str | None:
    visible = call.visible
    if visible is None or visible.slices is None:
        return None
    positions, is_packed = call.kwargs.get("position_ids"), call.kwargs.get("cu_seq_lens_q") is not None
    if positions is None or is_packed or visible.documents:
        return None
    visible.documents.append((positions, visible.slices.bounds))  # once a pass
    if positions_fit(positions, visible.slices):
        return None
    return (
        "position_ids of some rank do not start where its slice of the sequence does: give the model to "
        "longnet.sequence_parallel(mesh, model), or position_ids of the whole sequence"
    )


def _mask(call: Call) -> str | None:
    visible = call.visible
    if visible is None or visible.refusal is None:
        return None
    is_packed_slice = visible.slices is not None and call.kwargs.get("cu_seq_lens_q") is not None
    return None if is_packed_slice else visible.refusal  # across ranks these edges stand for the mask


def _keys_without_place(call: Call) -> str | None:
    visible, q_tokens, k_tokens = call.visible, call.query.shape[2], call.key.shape[2]
    if visible is None:
        if q_tokens == k_tokens:
            return None
        return f"{q_tokens} queries against {k_tokens} keys without a mask: their positions are unknown"
    if visible.skipped != (call.key.layer.columns if isinstance(call.key, StreamedKeys) else 0):
        return "the mask was made without the cache, or for another one: give both the same"
    if q_tokens != visible.q_tokens or k_tokens < visible.tokens - visible.skipped:
        return (
            f"the mask tells of {visible.q_tokens} queries and {visible.tokens} keys, the layer has {q_tokens} and "
            f"{k_tokens}"
        )
    return None


def _window(call: Call) -> str | None:
    window = call.kwargs.get("sliding_window")
    return window_refusal(window, call.tokens) if window is not None and window < call.tokens else None


def _contradiction(call: Call) -> str | None:
    is_causal = call.kwargs.get("is_causal")
    if call.visible is None or is_causal is None or bool(is_causal) == call.visible.is_causal:
        return None
    return f"is_causal={is_causal} contradicts the mask: set is_causal in the config instead"


def _no_causality(call: Call) -> str | None:
    if call.is_causal:
        return None
    return f'{call.name} attention is causal, and this model is not: use attn_implementation="dilated"'


def _packing(call: Call) -> str | None:
    q_edges, k_edges, visible = call.kwargs.get("cu_seq_lens_q"), call.kwargs.get("cu_seq_lens_k"), call.visible
    if q_edges is None:
        return None
    if call.query.shape[0] != 1 or call.query.shape[2] != call.tokens:
        return (
            "cu_seq_lens packs documents into one row without a cache, got a batch of "
            f"{call.query.shape[0]}, {call.query.shape[2]} queries and {call.tokens} keys: pass use_cache=False"
        )
    if visible is not None and visible.is_padded:
        return "an attention_mask beside cu_seq_lens is ambiguous: packed documents need no mask"
    if k_edges is None or not (
        torch.compiler.is_compiling() or bounds_read(visible, q_edges) is not None or torch.equal(q_edges, k_edges)
    ):
        return "cu_seq_lens_q needs cu_seq_lens_k, equal to it"
    return None


_DEMANDS = (
    Demand("a dense mask", _dense_mask),
    _keyword(
        "soft-capped logits", ("softcap",),
        "soft-capped logits cannot be honoured (attn_logit_softcapping=None in the config switches them off)",
    ),
    Demand("sinks of other heads", _sinks_of_other_heads),
    _keyword(
        "a position bias", ("position_bias",),
        "an additive position bias cannot be honoured: choose a model with rotary or absolute positions",
    ),
    _keyword(
        "sparse indices", ("indices", "block_indices", "topk_indices"),
        "sparse indices of the model's own cannot be honoured",
    ),
    _keyword(
        "a head mask", ("head_mask",),
        "a head_mask cannot be honoured: zero the head's columns of the output projection instead",
    ),
    _keyword(
        "a paged cache", ("cache", "block_table"),
        "a paged cache cannot be honoured: use the dynamic or the static cache",
    ),
    Demand("a DilatedCache", _cached_stream),
    Demand("a DilatedCache of another kind", _stream_of_another_kind),
    Demand("attention weights", _weights),
    Demand("dropout", _dropout),
    Demand("two sequences", _two_sequences),
    Demand("head dims that differ", _head_dims),
    Demand("a slice of a sequence", _slice),
    Demand("a slice that lies elsewhere", _slice_misplaced),
    Demand("a mask of another kind", _mask),
    Demand("keys without a place", _keys_without_place),
    Demand("a window", _window),
    Demand("causality against the mask", _contradiction),
    Demand("no causality", _no_causality),
    Demand("packed documents beside something else", _packing),
)  # fmt: skip
