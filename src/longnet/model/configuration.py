"""LongNetConfig: what a LongNet is, under Hugging Face's names, and the sizes that have names."""

import difflib
import inspect
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Self, get_args, get_origin

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from longnet.attention.pattern import DilationPattern, HeadOffsets, Queries
from longnet.model.patterns import block_of, pattern_of
from longnet.model.tails import TailKind, tail_refusal
from longnet.model.versions import FieldsConfig
from longnet.positions import xpos_span

PositionEmbedding = Literal["xpos", "rope", "learned", "sinusoidal", "none"]

# What others call our fields; nearness of spelling would not find these.
_ALIASES = {
    "d_model": "hidden_size", "n_embd": "hidden_size", "embed_dim": "hidden_size", "decoder_embed_dim": "hidden_size",
    "n_layer": "num_hidden_layers", "num_layers": "num_hidden_layers", "decoder_layers": "num_hidden_layers",
    "n_head": "num_attention_heads", "num_heads": "num_attention_heads",
    "decoder_attention_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size", "decoder_ffn_embed_dim": "intermediate_size",
    "dilated_ratio": "dilation_rates", "max_length": "max_position_embeddings", "subln": "sub_layernorm",
    "share_decoder_input_output_embed": "tie_word_embeddings", "dropout": "hidden_dropout",
}  # fmt: skip

# Keys that transformers itself hands to a configuration, or writes into its file, beside the fields.
_OF_TRANSFORMERS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "attn_implementation",
    "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions",
    "per_layer_config", "quantization_config", "tie_last_hidden_states", "torch_dtype",
}  # fmt: skip

# Keywords about files and devices, which callers hand to whatever loads.
_OF_LOADING = {
    "adapter_kwargs", "code_revision", "device_map", "dtype", "gguf_file", "low_cpu_mem_usage", "max_memory", "mirror",
    "offload_folder", "state_dict", "tp_plan", "use_auth_token", "use_safetensors", "variant", "weights_only",
}  # fmt: skip

# In a saved configuration: the keys that others had set on it, whatever they are called, so that it always loads.
_KEYS_OF_OTHERS = "keys_of_others"

_LAPTOP: dict[str, Any] = {"vocab_size": 320, "segment_lengths": (256, 512, 1024, 2048), "dilation_rates": (1, 2, 4, 8)}
_THREE: dict[str, Any] = {"vocab_size": 320, "segment_lengths": (256, 512, 1024), "dilation_rates": (1, 2, 4)}
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **_THREE},
    "5m": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, **_LAPTOP},
    "25m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, **_LAPTOP},
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "760m": {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 16},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32},
}


class LongNetConfig(FieldsConfig):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Configuration of a LongNet (arXiv:2307.02486 §4.1); the defaults are the paper's 125M model.

    A key that is no field is an error that names the nearest field, as is a value of the wrong type or range.
    `attn_implementation` is `"dilated"` unless given, and no part of the file; `"dilated_triton"` computes the same by
    another backend (`longnet.model.patterns.BACKENDS`), `"sdpa"` and `"eager"` make the same
    model the paper's dense Transformer, `"sparse_fixed"` its Sparse Transformer.

    Args:
        vocab_size: V. The default is cl100k_base's 100,277, rounded up to a multiple of 128.
        hidden_size: C.
        num_hidden_layers: blocks.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G, a divisor of H; H when None.
        head_dim: D; hidden_size / num_attention_heads when None. Even, for xPos and RoPE.
        intermediate_size: width of the feed-forward layers; 4 · hidden_size when None.
        hidden_act: activation between fc1 and fc2, a name of transformers.
        max_position_embeddings: tokens the model is meant for. Limits nothing by itself: where xPos has one
            centre of its scales, with dense attention and with global tokens, it places that (`longnet.positions`).
        segment_lengths: w_i of the branches, in tokens (arXiv:2307.02486 eq. 3-12).
        dilation_rates: r_i of the branches.
        head_offsets: `"mod"` (the paper) or `"block"` (torchscale).
        queries: `"kept"`, a branch drops queries as it drops keys (the paper), or `"all"`, every query of a segment
            attends to the keys kept.
        global_tokens: so many first tokens of a document are keys of all its tokens, in every head.
        rotate_offsets: shift the heads' offsets by num_key_value_heads a layer, so that rates above the number of heads
            leave out no position.
        sparse_block: tokens of a block of the Sparse Transformer's fixed pattern (arXiv:1904.10509 §4.3), for
            `attn_implementation="sparse_fixed"`.
        sparse_summary: its last positions of each stride, which all later tokens see.
        sparse_stride: distance of the summaries; sparse_block when None.
        is_causal: hide later tokens: a decoder, or an encoder where False.
        tail: of encoders, how segments end that the end of a sequence cuts: `"exact"`, or `"torchscale"`, where zero
            keys stand for what is missing, as its published weights were trained (`longnet.model.tails`).
        position_embedding: `"xpos"` (the paper), `"rope"`, `"learned"` or `"sinusoidal"`, which are added to the
            embeddings, or `"none"`.
        first_position: of learned and sinusoidal positions, what the first token is called (fairseq: 2).
        embedding_scale: factor on the embeddings of tokens.
        rope_theta: base of the angles of xPos and RoPE, at least 1.
        xpos_scale_base: tokens over which xPos decays (arXiv:2212.10554). At 512 its scales span 32,861 tokens; wider
            patterns without a common segment boundary within that need a larger one.
        sub_layernorm: MAGNETO's second LayerNorms, before o_proj and fc2 (arXiv:2210.06423). Without them a plain
            pre-LayerNorm Transformer.
        deepnorm: DeepNorm's factor on what goes past a sublayer, and its initialisation (arXiv:2203.00555); without
            sub_layernorm.
        post_layernorm: LayerNorms behind the sublayers in place of before them, and then none behind the last block; as
            deepnorm when None.
        layer_norm_eps: added to the variance.
        attention_bias: biases in q_proj, k_proj, v_proj, o_proj.
        mlp_bias: biases in fc1, fc2.
        attention_dropout: of attention weights, in [0, 1). Dilated attention takes only 0, as in the paper.
        hidden_dropout: of embeddings and of each sublayer's output, in [0, 1). The paper: 0.
        drop_path: stochastic depth (arXiv:1603.09382) in training: the last layer's sublayers are left out so often,
            earlier ones in proportion to their depth, in [0, 1).
        initializer_range: standard deviation of the embeddings and of the head; hidden_size ** -0.5 when None.
        initializer_gain: Xavier gain of v_proj, o_proj, fc1, fc2; when None MAGNETO's √log(2 · num_hidden_layers) for
            decoders (arXiv:2210.06423 §3), DeepNorm's (8 · num_hidden_layers) ** -0.25, or 1 in plain blocks.
        tie_word_embeddings: the head shares the embeddings' weight.
        use_cache: return a key/value cache in eval mode.
        pad_token_id: token of padding; its embedding is not trained.
        bos_token_id: first token of a document.
        eos_token_id: token, or tokens, that end generation.

    Raises:
        TypeError: an unknown key, or a value of the wrong type.
        ValueError: a value out of range, or fields that contradict each other.
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # transformers' own form

    vocab_size: int = 100_352
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 32_768
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    head_offsets: HeadOffsets = "mod"
    queries: Queries = "kept"
    global_tokens: int = 0
    rotate_offsets: bool = False
    sparse_block: int | None = None
    sparse_summary: int | None = None
    sparse_stride: int | None = None
    is_causal: bool = True
    tail: TailKind = "exact"
    position_embedding: PositionEmbedding = "xpos"
    first_position: int = 0
    embedding_scale: float = 1.0
    rope_theta: float = 10_000.0
    xpos_scale_base: float = 512.0
    sub_layernorm: bool = True
    deepnorm: bool = False
    post_layernorm: bool | None = None
    layer_norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    drop_path: float = 0.0
    initializer_range: float | None = None
    initializer_gain: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return a configuration by size, with fields replaced by `overrides`.

        `"125m"`, `"350m"`, `"760m"`, `"2.7b"` are the sizes of the paper's Figure 7, with the widths and depths that
        GPT-3 gave them (arXiv:2005.14165 table 2.1) and the paper's pattern; they count a vocabulary half as large as
        cl100k_base. `"tiny"` (tests), `"5m"` and `"25m"` are for laptops: bytes for tokens, segments 256 … 2048
        (tiny: … 1024), as many heads as the largest rate.

        Raises:
            ValueError: another name.
        """
        if name.lower() not in _PRESETS:
            raise ValueError(
                f"no preset is called {name!r}{_nearest(name.lower(), _PRESETS)}; there are {list(_PRESETS)}"
            )
        return cls(**{**_PRESETS[name.lower()], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a dictionary, with fields replaced by `kwargs`; see transformers.

        A dictionary that was saved may hold what others have set on the configuration, which `to_dict` lists; it is
        kept.

        Raises:
            TypeError: beside the errors of the constructor, a keyword that nobody reads.
        """
        # transformers would set these after the checks, and drop the unknown ones.
        replaced = {name: kwargs.pop(name) for name in cls._own_fields().keys() & kwargs.keys()}
        if kwargs.get("attn_implementation") is None:  # before 5.4 it would forget what the dictionary says
            kwargs["attn_implementation"] = config_dict.get("attn_implementation")
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        if "transformers_version" in config_dict:  # saved, before `keys_of_others` was written perhaps
            foreign = {name for name in config_dict if cls._is_of_others(name)}
            config_dict = {**config_dict, _KEYS_OF_OTHERS: sorted({*config_dict.get(_KEYS_OF_OTHERS, ()), *foreign})}
        config, unused = super().from_dict({**config_dict, **replaced}, return_unused_kwargs=True, **kwargs)
        if return_unused_kwargs:
            return config, unused
        unknown = {name for name, value in unused.items() if value is not None} - _OF_LOADING
        if unknown:
            raise cls._unknown(sorted(unknown))
        return config

    @property
    def pattern(self) -> DilationPattern:
        """The branches of dilated attention, with the first layer's offsets."""
        return pattern_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and what others have set on the configuration, with the list of their keys."""
        fields: dict[str, Any] = super().to_dict()
        foreign = sorted(fields.keys() - self._known_names())
        return {**fields, _KEYS_OF_OTHERS: foreign} if foreign else fields

    def __post_init__(self, **kwargs: Any) -> None:
        foreign = set(kwargs.pop(_KEYS_OF_OTHERS, ()))
        unknown = kwargs.keys() - _OF_TRANSFORMERS - foreign
        if unknown:
            raise self._unknown(sorted(unknown))
        for name, hint in self._own_fields().items():
            _check_type(name, getattr(self, name), hint)
        self.segment_lengths = tuple(self.segment_lengths)
        self.dilation_rates = tuple(self.dilation_rates)
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.post_layernorm is None:
            self.post_layernorm = self.deepnorm
        self._check_positions()
        pattern_of(self)
        refusal = tail_refusal(self)
        if refusal is not None:
            raise ValueError(refusal)
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = kwargs.pop("_attn_implementation", None) or "dilated"
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings", "sparse_block", "sparse_summary", "sparse_stride",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.first_position < 0:
            raise ValueError(f"first_position must be at least 0, got {self.first_position}")
        if (self.deepnorm or self.post_layernorm) and self.sub_layernorm:
            raise ValueError("deepnorm and post_layernorm go without sub-LayerNorms: set sub_layernorm=False")
        for name in ("attention_dropout", "hidden_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("layer_norm_eps", "embedding_scale", "xpos_scale_base", "initializer_range", "initializer_gain"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"no activation is called {self.hidden_act!r}{_nearest(self.hidden_act, ACT2FN)}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads unless head_dim is given, got "
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got num_attention_heads="
                f"{self.num_attention_heads}, num_key_value_heads={self.num_key_value_heads}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be a token below vocab_size={self.vocab_size}, got {value}")

    def _check_positions(self) -> None:
        if self.position_embedding == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            raise ValueError(f"sinusoidal positions need an even hidden_size of at least 4, got {self.hidden_size}")
        if self.position_embedding not in ("xpos", "rope"):
            return
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for {self.position_embedding}, whose pairs turn, got {self.head_dim}"
            )
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be at least 1, got {self.rope_theta}")
        if self.position_embedding == "rope":
            return
        span, period = xpos_span(self.xpos_scale_base, torch.float32), block_of(self)
        if self.max_position_embeddings > span and (period is None or period > span):
            of_segments = (
                f" and less than the {period} tokens after which all segments of {self.segment_lengths} end together"
                if period is not None
                else f", and every token sees the first {self.global_tokens}"
            )
            enough = math.ceil(self.xpos_scale_base * self.max_position_embeddings / span)
            raise ValueError(
                f"xPos with xpos_scale_base={self.xpos_scale_base} stays finite over {span} tokens, which is less than "
                f"max_position_embeddings={self.max_position_embeddings}{of_segments}: set xpos_scale_base to {enough} "
                "or more, or "
                "position_embedding='rope'"
            )

    @classmethod
    def _own_fields(cls) -> dict[str, Any]:
        """Return the fields and their types, a subclass's among them."""
        kinds = [kind for kind in reversed(cls.__mro__) if issubclass(kind, LongNetConfig)]
        return {name: hint for kind in kinds for name, hint in inspect.get_annotations(kind).items()}

    @classmethod
    def _known_names(cls) -> set[str]:
        """Return the keys that are this configuration's or transformers'."""
        of_transformers = PreTrainedConfig().to_dict().keys() | inspect.signature(PreTrainedConfig).parameters.keys()
        return {_KEYS_OF_OTHERS, *cls._own_fields(), *_OF_TRANSFORMERS, *of_transformers}

    @classmethod
    def _is_of_others(cls, name: str) -> bool:
        """Say whether a key is neither this configuration's, nor transformers', nor one of this one's misspelt."""
        known = cls._known_names() | _ALIASES.keys() | GenerationConfig().to_dict().keys()  # type: ignore[no-untyped-call]
        return name not in known and not difflib.get_close_matches(name, list(cls._own_fields()), n=1, cutoff=0.7)

    @classmethod
    def _unknown(cls, names: Iterable[str]) -> TypeError:
        generation = GenerationConfig().to_dict().keys()  # type: ignore[no-untyped-call]
        complaints = []
        for name in names:
            near = f": did you mean {_ALIASES[name]!r}?" if name in _ALIASES else _nearest(name, cls._own_fields())
            if name in generation and name not in _ALIASES:
                near = ": it belongs to generation, see model.generation_config"
            complaints.append(f"{cls.__name__} has no field {name!r}{near}")
        return TypeError("; ".join(complaints))


def _check_type(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            near = _nearest(value, get_args(hint)) if isinstance(value, str) else ""
            raise ValueError(f"{name} must be one of {get_args(hint)}, got {value!r}{near}")
    elif not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) in (tuple, list):  # JSON knows lists only
        return isinstance(value, (tuple, list)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""
