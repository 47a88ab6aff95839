"""The loss of every token under a causal model, without the logits of all tokens."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from longnet.model.modeling import LongNetModel

_CHUNK_LOGITS = 2**24  # logits held at a time: 64 MiB in float32
_TRIED = 64
_SEEN = 8


class Scorer:
    """Scores tokens under a causal language model of transformers, LongNet or another.

    Where the model's logits are its head's output, which is tried on the first tokens, they exist for a chunk of
    tokens at a time. Models that do more to them (soft caps, scales) are scored by their own logits, all those of a
    batch.

    Args:
        model: on its device, in the mode that the caller wants.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._is_tried = False

    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each target in nats, (B, T) float32 (float64 for float64).

        Args:
            input_ids: (B, T).
            targets: (B, T); targets[:, t] follows input_ids[:, t].
        """
        if not self._is_tried:
            self._try_head(input_ids[:1, :_TRIED])
        if self._head is None:
            return _losses(self._model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1), targets)
        hidden_states = self._base(input_ids).flatten(0, 1)
        rows = max(1, _CHUNK_LOGITS // int(self._model.config.vocab_size))
        chunks = zip(torch.split(hidden_states, rows), torch.split(targets.flatten(), rows), strict=True)
        return torch.cat([_losses(self._head(chunk), wanted) for chunk, wanted in chunks]).view_as(targets)

    @torch.no_grad()
    def _try_head(self, input_ids: Tensor) -> None:
        self._is_tried = True
        if self._head is not None and self._model.base_model is not self._model:
            logits = self._model(input_ids=input_ids, use_cache=False).logits
            if torch.equal(self._head(self._base(input_ids)), logits):
                return
        self._head = None

    def _base(self, input_ids: Tensor) -> Tensor:
        hidden_states: Tensor = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden_states


def refuse_more_positions(model: PreTrainedModel, tokens: int) -> None:
    """Raise ValueError where so many tokens are beyond a model's table of positions, or beyond a LongNet's xPos."""
    for module in model.modules():
        if isinstance(module, LongNetModel):
            module.refuse_beyond(tokens - 1)
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"(wpe|position\w*)$", name)
    ]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if tables and limit is not None and tokens > limit:
        raise ValueError(
            f"{type(model).__name__} knows {limit:,} positions, those of its table {tables[0]}, and not {tokens:,}: "
            "give fewer tokens"
        )


def refuse_sight_of_later_tokens(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose prediction depends on the token to predict, or on later ones: an encoder.

    The derivative of earlier logits by the last token's embedding is 0 in a causal model, exactly, whatever its dtype.
    """
    later: list[Tensor] = []

    def keep(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        later.append(embedded.detach().requires_grad_())
        return later[-1]

    embedding: nn.Module = model.get_input_embeddings()
    ids = torch.arange(_SEEN, device=model.device)[None] % model.config.vocab_size
    handle = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if not later:
        raise ValueError(f"{type(model).__name__} does not call its own input embeddings: it cannot be scored")
    (gradient,) = torch.autograd.grad(logits[:, :-1].float().square().sum(), later[:1], allow_unused=True)
    if gradient is not None and gradient[:, -1].any():
        raise ValueError(
            f"{type(model).__name__} is no causal language model: its tokens see later ones, so that it knows what it "
            "is to predict, and a perplexity of it means nothing; give a model that was trained to write on"
        )


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
