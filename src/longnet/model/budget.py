"""What a model needs: parameters, the FLOPs of a step as kernels run it, memory of training and of generation."""

from __future__ import annotations

import bisect
import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longnet.model.configuration import LongNetConfig
from longnet.model.cost import attention_flops
from longnet.model.patterns import kind_of, pattern_of


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
    """Bytes that a rank holds in training at its peak, estimated.

    Attributes:
        weights: its share, and copies of those that tokens are multiplied with, where they are computed in bfloat16.
        gradients: its share.
        optimizer: its share of Adam's two moments.
        gathered: weights of which other ranks have a share, while they are needed, and their gradients.
        activations: what layers keep of the tokens of its slice.
        halo: rows of other slices, keys and values.
        loss: the logits of a chunk, the gradients of the head and of the last hidden states; where layers are
            recomputed, what is not over by then, or goes beyond what they take.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    halo: int
    loss: int

    @property
    def total(self) -> int:
        """Their sum; the process itself, some 0.4 GB with PyTorch, comes on top."""
        return sum(self)


def count_parameters(config: PreTrainedConfig) -> Parameters:
    """Count the weights of any causal model, which is built without memory."""
    if isinstance(config, LongNetConfig) and config.num_hidden_layers > 2:
        # They are alike: two and their difference tell of any number.
        layers = config.num_hidden_layers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what so few layers lack
            one, two = (count_parameters(_with_layers(config, count)) for count in (1, 2))
        return Parameters(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.tie_weights()  # transformers 5.0 does not, without memory
    heads = {id(weight): weight for part in (model.get_input_embeddings(), model.get_output_embeddings())
             if part is not None for weight in part.parameters()}  # fmt: skip
    return Parameters(
        total=sum(weight.numel() for weight in model.parameters()),
        embedding=sum(weight.numel() for weight in heads.values()),
        multiplied=sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)),
    )


def _with_layers(config: LongNetConfig, layers: int) -> LongNetConfig:
    other = copy.deepcopy(config)
    other.num_hidden_layers = layers
    return other


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
    config: LongNetConfig,
    *,
    tokens: int,
    sequences: int,
    bfloat16: bool = False,
    checkpoint_activations: bool = False,
    dp: int = 1,
    sp: int = 1,
) -> Memory:
    """Estimate what a rank holds in training: float32 weights, gradients and Adam's two moments, and activations.

    Across ranks each has a share of weights, gradients and moments (FSDP2) and a slice of every sequence. It gathers
    the embeddings, which are the head where they are tied, for the whole step; of the layers two at a time, one of them
    in advance, with the gradients of one on their way to their ranks.

    A layer keeps, of each token, ten rows of the hidden width (inputs and outputs of two LayerNorms, q, k, v, the
    attention's output, laid out by heads and by tokens, and after its LayerNorm) and three of the feed-forward width;
    of the slices before its own the halo, never more rows than a streaming state has (`DilationPattern.state_rows`):
    a number that ceases to grow with the length. The layer at work has its halo's gradient, and both once more as they
    travel. The loss adds the logits of a chunk of tokens and the gradients of the last hidden states and of the head;
    the logits are gone before a layer is recomputed, so the larger of the two counts.
    On the CPU glibc may hold a third more than it was asked for; MALLOC_MMAP_THRESHOLD_=65536 in the environment
    avoids that.

    Args:
        config: of the model.
        tokens: of a sequence.
        sequences: of one forward pass of a rank: those of a step, divided by `accumulate` and by `dp`.
        bfloat16: autocast, which keeps matrix products' inputs in 2 bytes.
        checkpoint_activations: layers keep their input alone, but for the one that is recomputed.
        dp: ranks that divide a step's sequences among them.
        sp: ranks that divide each sequence among them.

    Raises:
        ValueError: slices of another attention than dilated.
    """
    return _memory(
        config, count_parameters(config), tokens=tokens, sequences=sequences, bfloat16=bfloat16,
        checkpoint_activations=checkpoint_activations, dp=dp, sp=sp,
    )  # fmt: skip


def longest_sequence(
    config: LongNetConfig,
    *,
    memory: int,
    sequences: int,
    bfloat16: bool = False,
    checkpoint_activations: bool = False,
    dp: int = 1,
    sp: int = 1,
) -> int:
    """Return the most tokens of a sequence with which a rank's `training_memory` stays within `memory` bytes, or 0.

    Args:
        config: of the model.
        memory: bytes of a rank.
        sequences: as `training_memory`'s, and so the others.
        bfloat16: autocast.
        checkpoint_activations: layers keep their input alone.
        dp: ranks that divide a step's sequences among them.
        sp: ranks that divide each sequence among them.

    Raises:
        ValueError: slices of another attention than dilated.
    """
    parameters = count_parameters(config)

    def needed(tokens: int) -> int:
        return _memory(
            config, parameters, tokens=tokens, sequences=sequences, bfloat16=bfloat16,
            checkpoint_activations=checkpoint_activations, dp=dp, sp=sp,
        ).total  # fmt: skip

    beyond = 1
    while needed(beyond) <= memory:
        beyond *= 2
    return bisect.bisect_right(range(1, beyond), memory, key=needed)


def _memory(
    config: LongNetConfig,
    parameters: Parameters,
    *,
    tokens: int,
    sequences: int,
    bfloat16: bool,
    checkpoint_activations: bool,
    dp: int,
    sp: int,
) -> Memory:
    if sp > 1 and kind_of(config) != "dilated":
        raise ValueError(
            f'across ranks only "dilated" attention can be computed, not "{config._attn_implementation}": set sp to 1'
        )
    ranks, layers = dp * sp, config.num_hidden_layers
    share = -(-4 * parameters.total // ranks)
    copies = 2 * parameters.multiplied if bfloat16 else 0
    layer = (parameters.total - parameters.embedding) // layers
    gathered = 4 * (parameters.embedding + 3 * layer) if ranks > 1 else 0

    size = -(-tokens // sp)
    count = size * sequences
    hidden, wide = config.hidden_size, _int(config.intermediate_size)
    heads = config.num_attention_heads
    q, kv = heads * _int(config.head_dim), _int(config.num_key_value_heads) * _int(config.head_dim)
    small = 2 if bfloat16 else 4
    row = 4 * 2 * hidden + small * (2 * hidden + 3 * q + 2 * kv + 2 * wide) + 4 * heads
    if config.sub_layernorm:
        row += small * (q + wide)
    if bfloat16:  # LayerNorms keep their input in both types
        row += small * 2 * hidden
    kept = 4 * hidden * layers if checkpoint_activations else row * layers
    recomputed = count * row if checkpoint_activations else 0

    halo_rows = config.pattern.state_rows(tokens=min(tokens, (sp - 1) * size)) * sequences
    halo_row = 2 * kv * small
    at_work = 2 * kv * (4 + 2 * small)  # the gradient, which is float32, and what comes and goes
    halo = halo_rows * ((1 if checkpoint_activations else layers) * halo_row + at_work)

    logits = min(count, max(1, 2**24 // config.vocab_size)) * config.vocab_size
    loss = 4 * (logits + config.vocab_size * hidden + 3 * count * hidden)
    if checkpoint_activations:  # when a layer is recomputed, two gradients alone are left of the loss
        loss = max(loss - recomputed, 4 * (config.vocab_size + count) * hidden)
    return Memory(
        weights=share + copies,
        gradients=share,
        optimizer=2 * share,
        gathered=gathered,
        activations=count * kept + recomputed,
        halo=halo,
        loss=loss,
    )


def cache_bytes(config: LongNetConfig, *, tokens: int, bytes_per_value: int = 4) -> dict[str, int]:
    """Return the bytes of keys and values when generating, one sequence: `"dense"`, and `"dilated"` streaming state."""
    row = 2 * config.num_hidden_layers * _int(config.num_key_value_heads) * _int(config.head_dim) * bytes_per_value
    return {"dense": row * tokens, "dilated": row * pattern_of(config).state_rows(tokens=tokens)}


def _int(value: Any) -> int:
    return int(value)  # the configuration has filled in what was None
