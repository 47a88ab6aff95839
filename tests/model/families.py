"""Tiny random models of the families that the compatibility table names."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, use_dilated_attention
from longnet.model.versions import CACHE, TAKES_COLUMNS

VERSION = Version(transformers.__version__)
VOCAB = 101
ONE_BRANCH = DilationPattern((512,), (1,))  # w ≥ T, r = 1: full attention
BRANCHES = DilationPattern((4, 8, 32), (1, 2, 3))  # 3 divides neither 8 nor 32

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
_NO_DROPOUT_GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """A family of models: its classes, a tiny configuration, whether it is causal and reads text."""

    model: type[PreTrainedModel]
    config: type
    settings: dict
    is_causal: bool = True
    is_text: bool = True
    sharpen: float = 4.0  # most are initialised so small that attention is all but uniform; weights are scaled by this


FAMILIES = {
    "LongNet": Family(LongNetForCausalLM, LongNetConfig, {**_SIZES, **_TOKENS, **_GROUPED}, sharpen=1.0),
    "Llama": Family(LlamaForCausalLM, LlamaConfig, {**_SIZES, **_TOKENS, **_GROUPED}),
    "Qwen3": Family(Qwen3ForCausalLM, Qwen3Config, {**_SIZES, **_TOKENS, **_GROUPED}),
    "Mistral": Family(MistralForCausalLM, MistralConfig, {**_SIZES, **_TOKENS, **_GROUPED, "sliding_window": None}),
    "GPT-NeoX": Family(GPTNeoXForCausalLM, GPTNeoXConfig, {**_SIZES, **_TOKENS}),
    "GPT-2": Family(
        GPT2LMHeadModel,
        GPT2Config,
        {**_TOKENS, **_NO_DROPOUT_GPT2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "BERT": Family(BertForMaskedLM, BertConfig, {**_SIZES, **_TOKENS, **_NO_DROPOUT_BERT}, is_causal=False),
    "ModernBERT": Family(
        ModernBertForMaskedLM,
        ModernBertConfig,
        {**_SIZES, **_TOKENS, "local_attention": 1024, "cls_token_id": 1, "sep_token_id": 2},
        is_causal=False,
    ),
    "ViT": Family(
        ViTModel,
        ViTConfig,
        {**_SIZES, "image_size": 24, "patch_size": 4, **_NO_DROPOUT_BERT},
        is_causal=False,
        is_text=False,
    ),
}
TEXT = [name for name, family in FAMILIES.items() if family.is_text]
CAUSAL = [name for name, family in FAMILIES.items() if family.is_causal]


def build(name: str, attn_implementation: str = "sdpa", **settings) -> PreTrainedModel:
    """Build the family's model, the same weights at every call."""
    family = FAMILIES[name]
    if name == "ModernBERT" and Version("5.8") > VERSION:
        pytest.skip(f"transformers {VERSION} does not let the attention of {name} be chosen")
    config = family.config(**{**family.settings, **settings})
    torch.manual_seed(3)
    config._attn_implementation = attn_implementation
    model = family.model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(family.sharpen)
    return model.eval()


def dilated(model: PreTrainedModel, pattern: DilationPattern) -> PreTrainedModel:
    """Return a copy of the model with dilated attention."""
    model = copy.deepcopy(model)
    use_dilated_attention(model, pattern)
    return model


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions as generate() derives them from a padding mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def skip_broken_prefill(cache: str) -> None:
    """Skip a test of generate() with a prefill in chunks where transformers gets that wrong, with any attention."""
    if Version("5.3") > VERSION >= Version("5.2"):
        pytest.skip(f"transformers {VERSION} gives the chunks of a prefill the positions of the last")
    if cache == "static" and Version("5.3") > VERSION:
        pytest.skip(f"transformers {VERSION} writes beyond a static cache after a prefill in chunks")


def columns_of(past: int, tokens: int) -> dict:
    """What generate() tells models and masks of the new tokens: before transformers 5.4 their columns."""
    return {"cache_position": torch.arange(past, past + tokens)} if TAKES_COLUMNS else {}


def mask_of(make, config, embeddings, attention_mask=None, *, cache=None, past=0, **keywords):
    """Call a function of transformers that makes masks; its versions want to know different things of the past."""
    of_past = {CACHE: cache, **columns_of(past, embeddings.shape[1])}
    wanted = inspect.signature(make).parameters
    keywords |= {name: value for name, value in of_past.items() if name in wanted}
    return make(config, embeddings, attention_mask=attention_mask, **keywords)
