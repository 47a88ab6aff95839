"""LongNetModel: embeddings, positions and a stack of blocks, a decoder (arXiv:2210.06423) or an encoder.

With `attn_implementation` "dilated" it is LongNet (arXiv:2307.02486 §4.1), with "sdpa" or "eager" the paper's dense
Transformer, with "sparse_fixed" its Sparse Transformer: the same parameters, the same positions.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from longnet.model.blocks import LongNetBlock, LongNetPreTrainedModel, see_both_ways
from longnet.model.configuration import LongNetConfig
from longnet.model.patterns import block_of, kind_of
from longnet.model.sequence_parallel import current_chunk, current_group, positions_of_slice, slices_here
from longnet.model.versions import CACHE, capture_outputs, columns_of, one_of, query_offset
from longnet.model.visibility import bounds_of_mask, real_tokens, visible_slice
from longnet.positions import RotaryPositions, Rotation, refuse_late_starts, sinusoidal


class LongNetModel(LongNetPreTrainedModel):
    """Token ids (B, T) → hidden states (B, T, C): a decoder, or an encoder with `is_causal=False`."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.embed_positions = None
        if config.position_embedding == "learned":
            rows = config.first_position + config.max_position_embeddings
            self.embed_positions = nn.Embedding(rows, config.hidden_size)
        self.rotary = None
        if config.position_embedding in ("xpos", "rope"):
            self.rotary = RotaryPositions(
                cast("int", config.head_dim),
                config.rope_theta,
                xpos_scale_base=config.xpos_scale_base if config.position_embedding == "xpos" else None,
                max_position_embeddings=config.max_position_embeddings,
            )
        self.layers = nn.ModuleList(LongNetBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm: nn.Module = nn.Identity()  # behind a post-LayerNorm block all is normalised
        if not config.post_layernorm:
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
        cache = one_of(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            raise ValueError(
                "gradient checkpointing runs each layer twice, which would fill the cache twice: call model.eval(), or "
                "leave out the cache and use_cache"
            )
        if not self.config.is_causal:
            if cache is not None or use_cache:
                raise ValueError("an encoder (is_causal=False) sees later tokens and cannot be cached: leave it out")
            use_cache = False
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training and position_ids is None)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if kwargs.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("cu_seq_lens needs position_ids that restart with each document, as collators send them")
        is_slice = current_group() is not None or current_chunk() is not None
        if is_slice:
            if cache is not None:
                raise ValueError("a sequence across ranks or chunks cannot be cached: leave out the cache")
            use_cache = False
            if kind_of(self.config) != "dilated":
                raise ValueError(
                    f'across ranks or chunks only "dilated" attention can be computed, not '
                    f'"{self.config._attn_implementation}"'
                )
        past_tokens = past_columns = 0
        if cache is not None:
            past_tokens, past_columns = cache.get_seq_length(), query_offset(cache)
        columns = columns_of(hidden_states, past_columns, kwargs.pop("cache_position", None))
        rotations = None
        highest = None
        slices = slices_here(hidden_states, bounds_of_mask(attention_mask)) if is_slice else None
        if position_ids is None and slices is not None:
            position_ids = positions_of_slice(slices, hidden_states.shape[1], hidden_states.device)
            highest = int(slices.edges[-1]) - 1
        elif position_ids is None:
            position_ids = _positions(hidden_states, attention_mask, past_tokens, past_columns)
            highest = past_tokens + hidden_states.shape[1] - 1
        elif attention_mask is None and (use_cache or cache is not None):
            _refuse_packed(position_ids)
        elif not self.config.is_causal and kwargs.get("cu_seq_lens_q") is None and attention_mask is None:
            _refuse_packed(position_ids, to_encoder=True)
        if self.rotary is not None:
            is_cached = bool(use_cache) or cache is not None
            rotations = self._rotations(
                self.rotary, position_ids, hidden_states, attention_mask, past_tokens, highest, is_cached=is_cached
            )
        hidden_states = self._placed(hidden_states, position_ids)
        # Packed documents are looked for only where there is no cache: an empty one is made after the mask.
        visible: dict[str, Any]
        if slices is not None:
            if self.config.tail != "exact":
                raise ValueError(f'across ranks or chunks tail={self.config.tail!r} cannot be had: set tail="exact"')
            mask = visible_slice(slices, hidden_states.shape[1], is_causal=self.config.is_causal)
            visible = {"attention_mask": mask}
        elif not self.config.is_causal:
            visible = see_both_ways(self.config, hidden_states, attention_mask, **kwargs)
        else:
            visible = {
                "attention_mask": create_causal_mask(
                    self.config,
                    hidden_states,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{CACHE: cache},
                    **columns,
                )
            }
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                **visible,
                rotations=rotations,
                position_ids=position_ids,
                cache=cache,
                columns=columns,
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **kept)

    @property
    def _period(self) -> int | None:
        return block_of(self.config) if kind_of(self.config) == "dilated" else None

    def refuse_beyond(self, highest: int) -> None:
        """Raise ValueError where xPos cannot serve positions up to `highest`, before they are computed."""
        if self.rotary is not None:
            self.rotary.refuse_beyond(highest, dtype=self.dtype, period=self._period)

    def _placed(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        config = self.config
        if config.embedding_scale != 1:
            hidden_states = hidden_states * config.embedding_scale
        if config.position_embedding not in ("learned", "sinusoidal"):
            return hidden_states
        places = position_ids.to(hidden_states.device) + config.first_position
        if self.embed_positions is None:
            return hidden_states + sinusoidal(places, config.hidden_size).to(hidden_states.dtype)
        rows = self.embed_positions.num_embeddings
        if not torch.compiler.is_compiling() and places.numel() and int(places.max()) >= rows:
            raise ValueError(
                f"learned positions end at {rows - config.first_position - 1}, got position "
                f"{int(places.max()) - config.first_position}: shorten the sequence"
            )
        return hidden_states + self.embed_positions(places)  # type: ignore[no-any-return]

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
        period = self._period
        if rotary.xpos_scale_base is not None and not torch.compiler.is_compiling() and position_ids.numel():
            rotary.refuse_beyond(int(position_ids.max() if highest is None else highest), dtype=dtype, period=period)
        is_new = (isinstance(past_tokens, int) or not torch.compiler.is_compiling()) and not past_tokens
        if rotary.xpos_scale_base is not None and period is not None and highest is None and is_new:
            real = real_tokens(attention_mask, *hidden_states.shape[:2])
            real = None if real is None else real.to(position_ids.device)
            refuse_late_starts(position_ids, period, real=real, is_cached=is_cached)
        rotations: tuple[Rotation, Rotation] = rotary(position_ids, dtype=dtype, period=period)
        return rotations


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


def _refuse_packed(position_ids: Tensor, *, to_encoder: bool = False) -> None:
    if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) != 1).any()):
        if to_encoder:
            raise ValueError(
                "position_ids restart within a row, which packs documents: an encoder needs cu_seq_lens_q and "
                "cu_seq_lens_k to tell them apart"
            )
        raise ValueError(
            "position_ids restart within a row, which packs documents, but a cache cannot tell documents apart: leave "
            "out the cache and use_cache, or give an attention_mask where the row is padded"
        )


AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
