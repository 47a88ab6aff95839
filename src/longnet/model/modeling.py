"""LongNetModel and LongNetForCausalLM: a MAGNETO decoder (arXiv:2210.06423) whose attention is an implementation.

With `attn_implementation` "dilated" it is LongNet (arXiv:2307.02486 §4.1), with "sdpa" or "eager" the paper's dense
Transformer, with "sparse_fixed" its Sparse Transformer: the same parameters, the same positions.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from longnet.attention.sequence_parallel import gather_slices
from longnet.model import interface  # noqa: F401  # registers "dilated" with transformers
from longnet.model.configuration import LongNetConfig
from longnet.model.loss import IGNORED, next_token_loss
from longnet.model.patterns import warn_of_unseen
from longnet.model.sequence_parallel import current_group, loss_of_all, next_labels, positions_of_slice
from longnet.model.versions import CACHE, capture_outputs, columns_of, query_offset
from longnet.model.visibility import bounds_of_mask, real_tokens, visible_slice
from longnet.positions import RotaryPositions, Rotation, refuse_late_starts, rotate, turn_steps

_CPU_TOKENS = 2048  # that go through a feed-forward layer at a time where no gradient is wanted


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend densely in plain PyTorch and return the weights too: transformers' "eager" implementation.

    Args:
        module: the attention layer.
        query: (B, H, Tq, D).
        key: (B, G, T, D).
        value: (B, G, T, D).
        attention_mask: (B or 1, 1, Tq, T), added to the scores.
        scaling: factor on q·k.
        dropout: of the weights, while training.

    Returns:
        out (B, Tq, H, D) and the weights (B, H, Tq, T).
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    out = functional.dropout(weights, dropout, module.training) @ value
    return out.transpose(1, 2), weights


class LongNetAttention(nn.Module):
    """LayerNorm'd input → q, k, v → attention → sub-LayerNorm → o_proj (arXiv:2210.06423 fig. 2)."""

    def __init__(self, config: LongNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, cast("int", config.head_dim)
        num_key_value_heads = cast("int", config.num_key_value_heads)  # the configuration has filled in what was None
        width, kv_width = config.num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = _projection(config.hidden_size, width, bias=config.attention_bias, gain=1.0)
        self.k_proj = _projection(config.hidden_size, kv_width, bias=config.attention_bias, gain=1.0)
        self.v_proj = _projection(config.hidden_size, kv_width, bias=config.attention_bias, gain=_gain(config))
        self.sub_layernorm = _sub_layernorm(config, width)
        self.o_proj = _projection(width, config.hidden_size, bias=config.attention_bias, gain=_gain(config))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Any,
        rotations: tuple[Rotation, Rotation] | None,
        cache: Cache | None,
        columns: dict[str, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return out (B, T, C) and, from implementations that have them, the attention weights."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotations is not None:
            query, key = rotate(query, rotations[0]), rotate(key, rotations[1])
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, columns)
        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(self.sub_layernorm(out.flatten(2))), weights


class LongNetMLP(nn.Module):
    """LayerNorm'd input → fc1 → activation → sub-LayerNorm → fc2 (arXiv:2210.06423 fig. 2)."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        width = cast("int", config.intermediate_size)
        self.fc1 = _projection(config.hidden_size, width, bias=config.mlp_bias, gain=_gain(config))
        self.act_fn = ACT2FN[config.hidden_act]
        self.sub_layernorm = _sub_layernorm(config, width)
        self.fc2 = _projection(width, config.hidden_size, bias=config.mlp_bias, gain=_gain(config))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (B, T, C)."""
        hidden_states = self.sub_layernorm(self.act_fn(self.fc1(hidden_states)))
        return self.fc2(hidden_states)  # type: ignore[no-any-return]


class LongNetDecoderLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """One block: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, config: LongNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = LongNetAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LongNetMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return (B, T, C); keywords go to the attention."""
        out, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(out)
        if hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not self.training:
            # In place, part by part: what is four times as wide stays in cache, and memory is not four times as much.
            for part in torch.split(hidden_states, _CPU_TOKENS, dim=1):
                part.add_(self.mlp(self.post_attention_layernorm(part)))
            return hidden_states
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(out)  # type: ignore[no-any-return]


class LongNetPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """What LongNet's models share: initialisation, loading and saving."""

    config: LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetDecoderLayer"]  # noqa: RUF012  # transformers' own form, here and below
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LongNetDecoderLayer, "attentions": LongNetAttention}  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers reads the file to find out, and each version looks for other words

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, RotaryPositions):
            initialization.copy_(module.turn_steps, turn_steps(module.theta, module.head_dim))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            gain = getattr(module, "xavier_gain", None)
            if gain is not None:
                initialization.xavier_normal_(module.weight, gain=cast("float", gain))
            else:
                std = config.hidden_size**-0.5 if config.initializer_range is None else config.initializer_range
                initialization.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                _zero_padding(module)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class LongNetModel(LongNetPreTrainedModel):
    """The decoder: token ids (B, T) → hidden states (B, T, C)."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.rotary = None
        if config.position_embedding != "none":
            self.rotary = RotaryPositions(
                cast("int", config.head_dim),
                config.rope_theta,
                xpos_scale_base=config.xpos_scale_base if config.position_embedding == "xpos" else None,
                max_position_embeddings=config.max_position_embeddings,
            )
        if config._attn_implementation == "dilated":
            warn_of_unseen(config.pattern, config)
        self.layers = nn.ModuleList(LongNetDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, and a cache.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, past + T), 1 for real tokens; positions count from the first of each row.
            position_ids: (B or 1, T), instead of positions derived from the mask and the cache. Where they restart, and
                neither mask nor cache is given, a new document begins, which does not see the ones before.
            cache: keys and values of earlier tokens; the new ones are added to it.
            inputs_embeds: (B, T, C), instead of input_ids.
            use_cache: return a cache. When None, where the configuration says so, outside training, and where no
                position_ids are given, since packed documents cannot be continued.
            past_key_values: the cache by its name before transformers 5.24, instead of `cache`.
            **kwargs: for the attention implementation; `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; two caches; a mask of another length; positions
                that xPos cannot serve; packed documents with a cache; a cache while layers are checkpointed.
        """
        cache = _one_of(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            raise ValueError(
                "gradient checkpointing runs each layer twice, which would fill the cache twice: call model.eval(), or "
                "leave out the cache and use_cache"
            )
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training and position_ids is None)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if kwargs.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("cu_seq_lens needs position_ids that restart with each document, as collators send them")
        group = current_group()
        if group is not None:
            if cache is not None:
                raise ValueError("a sequence that lies across ranks cannot be cached: leave out the cache")
            use_cache = False
            if self.config._attn_implementation != "dilated":
                raise ValueError(
                    f'across ranks only "dilated" attention can be computed, not "{self.config._attn_implementation}"'
                )
        past_tokens = past_columns = 0
        if cache is not None:
            past_tokens, past_columns = cache.get_seq_length(), query_offset(cache)
        columns = columns_of(hidden_states, past_columns, kwargs.pop("cache_position", None))
        rotations = None
        highest = None
        slices = None if group is None else gather_slices(group, hidden_states, bounds_of_mask(attention_mask))
        if position_ids is None and slices is not None:
            position_ids = positions_of_slice(slices, hidden_states.shape[1], hidden_states.device)
            highest = int(slices.edges[-1]) - 1
        elif position_ids is None:
            position_ids = _positions(hidden_states, attention_mask, past_tokens, past_columns)
            highest = past_tokens + hidden_states.shape[1] - 1
        elif attention_mask is None and (use_cache or cache is not None):
            _refuse_packed(position_ids)
        if self.rotary is not None:
            is_cached = bool(use_cache) or cache is not None
            rotations = self._rotations(
                self.rotary, position_ids, hidden_states, attention_mask, past_tokens, highest, is_cached=is_cached
            )
        # Packed documents are looked for only where there is no cache: an empty one is made after the mask.
        mask: Any = None
        if slices is not None:
            mask = visible_slice(slices, hidden_states.shape[1], is_causal=True)
        else:
            mask = create_causal_mask(
                self.config,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **columns,
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                rotations=rotations,
                position_ids=position_ids,
                cache=cache,
                columns=columns,
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **kept)

    def _rotations(
        self,
        rotary: RotaryPositions,
        position_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Any,
        past_tokens: Any,
        highest: Any,
        *,
        is_cached: bool,
    ) -> tuple[Rotation, Rotation]:
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        is_dilated = self.config._attn_implementation == "dilated"
        period = math.lcm(*self.config.segment_lengths) if is_dilated else None
        if rotary.xpos_scale_base is not None and not torch.compiler.is_compiling() and position_ids.numel():
            rotary.refuse_beyond(int(position_ids.max() if highest is None else highest), dtype=dtype, period=period)
        is_new = (isinstance(past_tokens, int) or not torch.compiler.is_compiling()) and not past_tokens
        if rotary.xpos_scale_base is not None and period is not None and highest is None and is_new:
            real = real_tokens(attention_mask, *hidden_states.shape[:2])
            real = None if real is None else real.to(position_ids.device)
            refuse_late_starts(position_ids, period, real=real, is_cached=is_cached)
        rotations: tuple[Rotation, Rotation] = rotary(position_ids, dtype=dtype, period=period)
        return rotations


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """LongNetModel with a language-modelling head, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
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
        shift_labels: Tensor | None = None,
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
            shift_labels: (B, T), instead of labels, already shifted.
            num_items_in_batch: what the sum of losses is divided by, instead of the labels asked for.
            past_key_values: the cache by its name before transformers 5.24, instead of `cache`.
            **kwargs: as LongNetModel's.

        Returns:
            loss, None without labels. logits (B, T or fewer, V), **None where labels are given in training**: there
            they are never held for all tokens (`longnet.model.loss`).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_of(cache, past_key_values),
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


def _wanted(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


def _sub_layernorm(config: LongNetConfig, width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if config.sub_layernorm else nn.Identity()


def _projection(in_features: int, out_features: int, *, bias: bool, gain: float) -> nn.Linear:
    projection = nn.Linear(in_features, out_features, bias=bias)
    # transformers initialises the modules that own parameters, one by one, and no name reaches it.
    projection.xavier_gain = gain  # type: ignore[assignment]
    return projection


def _gain(config: LongNetConfig) -> float:
    if config.initializer_gain is not None:
        return config.initializer_gain
    return math.sqrt(math.log(2 * config.num_hidden_layers)) if config.sub_layernorm else 1.0


def _zero_padding(embedding: nn.Embedding) -> None:
    if not getattr(embedding.weight, "_is_hf_initialized", False):  # a slice has lost the mark of loaded weights
        embedding.weight[embedding.padding_idx].zero_()


def _positions(hidden_states: Tensor, attention_mask: Tensor | None, past_tokens: Any, past_columns: Any) -> Tensor:
    tokens = hidden_states.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        if isinstance(past_tokens, int) and attention_mask.shape[1] != past_columns + tokens:
            raise ValueError(
                f"attention_mask must cover the {past_columns} cached and the {tokens} new tokens, got "
                f"{tuple(attention_mask.shape)}"
            )
        columns: Tensor = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        columns += past_tokens - past_columns
        return columns
    positions: Tensor = torch.arange(tokens, device=hidden_states.device) + past_tokens
    return positions[None]


def _one_of(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def _refuse_packed(position_ids: Tensor) -> None:
    if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids restart within a row, which packs documents, but a cache cannot tell documents apart: leave "
            "out the cache and use_cache, or give an attention_mask where the row is padded"
        )


AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
