"""What a model needs: parameters, the FLOPs of a step as kernels run it, memory of training and of generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longnet.model.configuration import LongNetConfig
from longnet.model.cost import attention_flops
from longnet.model.interface import pattern_of


class Parameters(NamedTuple):
    """Numbers of weights; tied ones count once.

    Attributes:
        total: all.
        embedding: of the token embeddings, and of the head where it has its own weight.
        multiplied: those that each token is multiplied with, the head's included.
    """

    total: int
    embedding: int
    multiplied: int


class Memory(NamedTuple):
    """Bytes that training holds at its peak, estimated."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum; the process itself, some 0.4 GB with PyTorch, comes on top."""
        return sum(self)


def count_parameters(config: PreTrainedConfig) -> Parameters:
    """Count the weights of any causal model, which is built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    heads = {id(weight): weight for part in (model.get_input_embeddings(), model.get_output_embeddings())
             if part is not None for weight in part.parameters()}  # fmt: skip
    return Parameters(
        total=sum(weight.numel() for weight in model.parameters()),
        embedding=sum(weight.numel() for weight in heads.values()),
        multiplied=sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)),
    )


def step_flops(config: LongNetConfig, *, tokens: int, sequences: int) -> int:
    """Count the FLOPs that one training step executes, forward and backward.

    A multiply and an add are two; attention counts the pairs that are seen, half of all where it is dense and causal;
    LayerNorms, activations and the optimizer are left out. Backward multiplies each weight twice where forward does
    once, and attention's five products stand against two: the scores are computed again, which `training_flops`, the
    measure of utilisation, leaves out. Activation checkpointing, which runs forward twice, is not counted.
    """
    weights = 6 * count_parameters(config).multiplied * tokens
    return sequences * (weights + attention_flops(config, tokens=tokens) * 7 // 2)


def training_memory(
    config: LongNetConfig, *, tokens: int, sequences: int, bfloat16: bool = False, checkpoint_activations: bool = False
) -> Memory:
    """Estimate what training holds: float32 weights, gradients and Adam's two moments, and activations.

    A layer keeps, of each token, ten rows of the hidden width (inputs and outputs of two LayerNorms, q, k, v, the
    attention's output, laid out by heads and by tokens, and after its LayerNorm) and three of the feed-forward width.
    The loss adds the logits of a chunk of tokens and the gradients of the last hidden states and of the head. On the
    CPU glibc may hold a third more than it was asked for; MALLOC_MMAP_THRESHOLD_=65536 in the environment avoids that.

    Args:
        config: of the model.
        tokens: of a sequence.
        sequences: of one forward pass: those of a step, divided by `accumulate`.
        bfloat16: autocast, which keeps matrix products' inputs in 2 bytes.
        checkpoint_activations: layers keep their input alone, but for the one that is recomputed.
    """
    parameters = count_parameters(config)
    total = 4 * parameters.total
    count = tokens * sequences
    hidden, wide = config.hidden_size, _int(config.intermediate_size)
    heads = config.num_attention_heads
    q, kv = heads * _int(config.head_dim), _int(config.num_key_value_heads) * _int(config.head_dim)
    small = 2 if bfloat16 else 4
    row = 4 * 2 * hidden + small * (2 * hidden + 3 * q + 2 * kv + 2 * wide) + 4 * heads
    if config.sub_layernorm:
        row += small * (q + wide)
    if bfloat16:  # LayerNorms keep their input in both types
        row += small * 2 * hidden
    layers = config.num_hidden_layers
    kept = (4 * hidden * layers + row) if checkpoint_activations else row * layers
    logits = min(count, max(1, 2**24 // config.vocab_size)) * config.vocab_size
    head = 4 * (logits + config.vocab_size * hidden + 3 * count * hidden)
    copies = 2 * parameters.multiplied if bfloat16 else 0
    return Memory(weights=total + copies, gradients=total, optimizer=2 * total, activations=count * kept + head)


def cache_bytes(config: LongNetConfig, *, tokens: int, bytes_per_value: int = 4) -> dict[str, int]:
    """Return the bytes of keys and values when generating, one sequence: `"dense"`, and `"dilated"` streaming state."""
    row = 2 * config.num_hidden_layers * _int(config.num_key_value_heads) * _int(config.head_dim) * bytes_per_value
    return {"dense": row * tokens, "dilated": row * pattern_of(config).state_rows(tokens=tokens)}


def _int(value: Any) -> int:
    return int(value)  # the configuration has filled in what was None
