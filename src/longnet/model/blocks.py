"""The block of every LongNet, decoder or encoder: attention, feed-forward layer, norms, and how they begin.

MAGNETO's pre-LayerNorm block with sub-LayerNorms (arXiv:2210.06423), the plain pre-LayerNorm one, or DeepNorm's
(arXiv:2203.00555); the attention is any implementation that transformers knows.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longnet.model import interface  # noqa: F401  # registers "dilated" with transformers
from longnet.model.configuration import LongNetConfig
from longnet.model.patterns import kind_of
from longnet.model.sequence_parallel import is_read_up_to
from longnet.model.tails import Tail, tail_of
from longnet.positions import RotaryPositions, Rotation, rotate, turn_steps

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
        self.is_causal = config.is_causal
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
        tail: Tail | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return out (B, T, C) and, from implementations that have them, the attention weights."""
        query, key, value = self.project(hidden_states, rotations)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, columns)
        if tail is not None:
            out = tail.attend(query, key, value, scale=self.scaling).transpose(1, 2)
            return self.o_proj(self.sub_layernorm(out.flatten(2))), None
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

    def project(
        self, hidden_states: Tensor, rotations: tuple[Rotation, Rotation] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, T, D), k and v (B, G, T, D) of what enters the layer, rotated where positions rotate."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotations is not None:
            query, key = rotate(query, rotations[0]), rotate(key, rotations[1])
        return query, key, value


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


class LongNetBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """One block: x + attention(LN(x)), then x + mlp(LN(x)); post-LayerNorm: LN(x + attention(x)), LN(x + mlp(x)).

    DeepNorm multiplies what goes past a sublayer by α = (2 · num_hidden_layers)^¼ (arXiv:2203.00555).
    """

    def __init__(self, config: LongNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = LongNetAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LongNetMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.is_post_layernorm = bool(config.post_layernorm)
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0
        self.drop_path = config.drop_path * layer_idx / max(1, config.num_hidden_layers - 1)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return (B, T, C); keywords go to the attention."""
        if self.is_post_layernorm:
            out, _ = self.self_attn(hidden_states, **kwargs)
            if is_read_up_to(self.self_attn):
                return hidden_states
            hidden_states = self.input_layernorm(self._past(hidden_states) + self._drop(out))
            out = self._past(hidden_states) + self._drop(self.mlp(hidden_states))
            return self.post_attention_layernorm(out)  # type: ignore[no-any-return]
        out, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if is_read_up_to(self.self_attn):
            return hidden_states
        hidden_states = self._past(hidden_states) + self._drop(out)
        is_plain = self.residual_scale == 1 and not (self.training and (self.dropout.p or self.drop_path))
        is_eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if is_plain and is_eager and hidden_states.device.type == "cpu":
            # In place, part by part: what is four times as wide stays in cache, and memory is not four times as much.
            for part in torch.split(hidden_states, _CPU_TOKENS, dim=1):
                part.add_(self.mlp(self.post_attention_layernorm(part)))
            return hidden_states
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return self._past(hidden_states) + self._drop(out)

    def _past(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.residual_scale == 1 else self.residual_scale * hidden_states

    def _drop(self, out: Tensor) -> Tensor:
        out = self.dropout(out)
        if not self.training or not self.drop_path:
            return out
        keep = 1 - self.drop_path  # stochastic depth (arXiv:1603.09382): whole rows lose the sublayer
        return out * (torch.rand(len(out), 1, 1, device=out.device) < keep).to(out.dtype) / keep


class LongNetPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """What LongNet's models share: initialisation, loading and saving."""

    config: LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetBlock"]  # noqa: RUF012  # transformers' own form, here and below
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LongNetBlock, "attentions": LongNetAttention}  # noqa: RUF012

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


def see_both_ways(config: LongNetConfig, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what an encoder's layers are told of a pass: the mask, and the tail where it is torchscale's.

    Args:
        config: of the model.
        hidden_states: (B, T, C), as they enter the first layer.
        attention_mask: (B, T), true for real tokens, or None.
        **kwargs: what the caller passed on; a tail cannot be had for packed documents.

    Returns:
        Keywords for every layer.

    Raises:
        ValueError: a tail of torchscale's beside packed documents, or where attention is not dilated.
    """
    mask = create_bidirectional_mask(config, hidden_states, attention_mask)
    if config.tail == "exact":
        return {"attention_mask": mask}
    if kind_of(config) != "dilated" or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            'tail="torchscale" is of dilated attention over one sequence a row, got attn_implementation='
            f'"{config._attn_implementation}"{" and packed documents" if "cu_seq_lens_q" in kwargs else ""}: '
            'set tail="exact" in the configuration'
        )
    return {"attention_mask": mask, "tail": tail_of(config, hidden_states, getattr(mask, "bounds", None))}


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
    if config.deepnorm:
        return float((8 * config.num_hidden_layers) ** -0.25)
    return math.sqrt(math.log(2 * config.num_hidden_layers)) if config.sub_layernorm else 1.0


def _zero_padding(embedding: nn.Embedding) -> None:
    if not getattr(embedding.weight, "_is_hf_initialized", False):  # a slice has lost the mark of loaded weights
        embedding.weight[embedding.padding_idx].zero_()
