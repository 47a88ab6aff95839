"""LongNetModel with a head on top: language modelling, masked or not, and transformers' generic classifiers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from longnet.attention.sequence_parallel import gather_slices
from longnet.model.blocks import LongNetPreTrainedModel
from longnet.model.configuration import LongNetConfig
from longnet.model.loss import IGNORED, next_token_loss
from longnet.model.modeling import LongNetModel
from longnet.model.sequence_parallel import current_group, loss_of_all, next_labels
from longnet.model.versions import CACHE, one_of


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """LongNetModel with a language-modelling head, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "a causal language model needs is_causal=True, got False: LongNetForMaskedLM is for encoders"
            )
        self.model = LongNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss, the logits, a cache.

        Args:
            input_ids: as LongNetModel's, and so the next five.
            attention_mask: (B, past + T).
            position_ids: (B or 1, T).
            cache: keys and values of earlier tokens.
            inputs_embeds: (B, T, C).
            use_cache: return a cache.
            labels: (B, T), usually the input_ids: the loss asks token t for labels[:, t + 1], and for nothing where
                that is −100.
            logits_to_keep: compute logits of the last so many tokens only, 0 for all, or of the given indices, (n,) or
                (B, n). The loss is over all labels whatever this says.
            num_items_in_batch: what the sum of losses is divided by, instead of the labels asked for.
            past_key_values: the cache by its name before transformers 5.24, instead of `cache`.
            **kwargs: as LongNetModel's; `shift_labels` (B, T), instead of labels, already shifted. It is no argument of
                its own, since transformers' Trainer takes each whose name has "label" for one that every batch holds.

        Returns:
            loss, None without labels. logits (B, T or fewer, V), **None where labels are given in training**: there
            they are never held for all tokens (`longnet.model.loss`).
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_of(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None or shift_labels is not None:
            group = current_group()
            if group is not None:
                if shift_labels is None and labels is not None:
                    shift_labels = next_labels(labels, group, gather_slices(group, hidden_states, None))
                if num_items_in_batch is None and shift_labels is not None:
                    num_items_in_batch = (shift_labels != IGNORED).sum()
                    torch.distributed.all_reduce(num_items_in_batch, group=group)
            loss = next_token_loss(
                self.lm_head,
                hidden_states,
                labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
            )
            if group is not None:
                loss = loss_of_all(loss, group)
        if loss is None or not self.training:
            logits = self.lm_head(_wanted(hidden_states, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Return transformers' own, without the reminder that a text is beyond max_position_embeddings.

        That limits no LongNet; positions that are limited, learned ones and xPos's of one centre, are refused.
        """
        criteria: StoppingCriteriaList = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def _prepare_generated_length(
        self,
        generation_config: Any,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: Any,
    ) -> Any:
        """Return transformers' lengths, by default as many new tokens behind a long prompt as behind a short one."""
        by_default = generation_config.max_length
        prepared = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config, has_default_max_length, has_default_min_length, model_input_name, input_ids_length,
            inputs_tensor,
        )  # fmt: skip
        is_limited = self.config.position_embedding == "learned"
        if has_default_max_length and prepared.max_new_tokens is None and not is_limited:
            prepared.max_length = by_default + input_ids_length
        return prepared


class LongNetForMaskedLM(LongNetPreTrainedModel):
    """LongNetModel with a head that says which token was masked, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        _refuse_causal(self, config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return the loss and the logits.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for real tokens.
            labels: (B, T): the token that belongs there, −100 where none is asked for.
            **kwargs: as LongNetModel's.

        Returns:
            loss, None without labels. logits (B, T, V), None where labels are given in training.
        """
        outputs = self.model(input_ids, attention_mask=attention_mask, **kwargs)
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = next_token_loss(
                self.lm_head, hidden_states, None, vocab_size=self.config.vocab_size, shift_labels=labels
            )
        if loss is None or not self.training:
            logits = self.lm_head(hidden_states)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LongNetForSequenceClassification(GenericForSequenceClassification, LongNetPreTrainedModel):  # type: ignore[no-untyped-call]
    """One label a sequence, read off its last real token, which `pad_token_id` tells: transformers' generic head."""


class LongNetForTokenClassification(GenericForTokenClassification, LongNetPreTrainedModel):  # type: ignore[no-untyped-call]
    """One label a token: transformers' generic head."""


class LongNetForQuestionAnswering(GenericForQuestionAnswering, LongNetPreTrainedModel):  # type: ignore[no-untyped-call]
    """Where an answer starts and ends: transformers' generic head."""


def _refuse_causal(model: nn.Module, config: LongNetConfig) -> None:
    if config.is_causal:
        raise ValueError(f"{type(model).__name__} must see both ways: set is_causal=False in the configuration")


def _wanted(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LongNetConfig, LongNetForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LongNetConfig, LongNetForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(LongNetConfig, LongNetForQuestionAnswering, exist_ok=True)
