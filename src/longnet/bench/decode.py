"""`longnet bench decode`: one token after the other at many lengths, with the DilatedCache and with the dense one.

Nothing is timed before cached logits have agreed with those of a whole forward pass.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from longnet.attention.pattern import DilationPattern
from longnet.bench.attention import GateError
from longnet.bench.model import random_model
from longnet.measurement import interleaved, ratio
from longnet.model import DilatedCache, LongNetConfig, LongNetForCausalLM
from longnet.model.versions import rewind

Row = dict[str, Any]

SHAPES = {"LongNet-125M": (12, 12, 64), "Llama-8B": (32, 8, 128)}  # layers, key/value heads, head dim
LENGTHS = (2**15, 2**20, 10**9)


@dataclass(frozen=True)
class Settings:
    """What `longnet bench decode` measures.

    Attributes:
        contexts: tokens before those that are decoded.
        dense_contexts: the same for the dense cache, which has to hold them.
        segment_length: of the first branch; the others double up to 2³⁰.
        hidden_size: C; heads have 64 channels.
        layers: of the model, whose weights are random.
        steps: tokens that a round decodes; they end with a segment of the first branch.
        repeats: counted rounds; figures are medians.
        gate_tokens: length at which logits are compared.
    """

    contexts: tuple[int, ...] = (2**12, 2**15, 2**18, 2**20, 10**9 - 1)
    dense_contexts: tuple[int, ...] = (2**12, 2**15, 2**18)
    segment_length: int = 2048
    hidden_size: int = 768
    layers: int = 2
    steps: int = 128
    repeats: int = 5
    gate_tokens: int = 5000


QUICK = Settings(
    contexts=(2**12, 2**20, 10**9 - 1), dense_contexts=(2**12, 2**15), hidden_size=256, steps=64, repeats=3
)


def cache_bytes() -> Iterator[Row]:
    """Count the bytes of both caches in bfloat16, for known shapes and lengths, in closed form."""
    pattern = DilationPattern.geometric(2048, 2**30)
    for name, (layers, heads, head_dim) in SHAPES.items():
        for tokens in LENGTHS:
            row_bytes = 2 * layers * heads * head_dim * torch.bfloat16.itemsize
            dilated, dense = row_bytes * pattern.state_rows(tokens=tokens), row_bytes * tokens
            yield {
                "case": "bytes", "shape": name, "pattern": str(pattern), "tokens": tokens,
                "dilated_bytes": dilated, "dense_bytes": dense, "times_less": dense / dilated,
            }  # fmt: skip


def run(settings: Settings, device: torch.device) -> Iterator[Row]:
    """Measure every context, yielding rows.

    Raises:
        GateError: cached logits differ from those of one forward pass.
    """
    pattern = DilationPattern.geometric(settings.segment_length, 2**30)
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=320, hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 64, position_embedding="rope",
        segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
    )  # fmt: skip
    model = random_model(config)
    model.eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)  # type: ignore[no-untyped-call]
    dense_queries = copy.deepcopy(
        model
    )  # in which a step reads all rows of the state, not those of its own phase alone
    dense_queries.config.queries = "all"
    cases: list[tuple[str, int, int, Callable[[], None]]] = []
    for name, decoded in (("dilated", model), ("dilated, all queries", dense_queries)):
        gate(decoded, settings.gate_tokens)
        for context in settings.contexts:
            cache = as_if_read(decoded, context // settings.segment_length * settings.segment_length - settings.steps)
            cases.append((name, context, cache.nbytes, _decoder(decoded, cache, settings.steps)))
    cases += [
        ("dense", context, *_dense_decoder(model, context, settings.steps)) for context in settings.dense_contexts
    ]
    seconds = interleaved([case[3] for case in cases], settings.repeats, device)
    for (name, context, size, _), times in zip(cases, seconds, strict=True):
        first = next(t for case, t in zip(cases, seconds, strict=True) if case[0] == name)
        yield {
            "case": "decode", "cache": name, "context": context, "pattern": str(pattern), "cache_bytes": size,
            "dense_bytes": 2 * settings.layers * settings.hidden_size * context * model.dtype.itemsize,
            "hidden_size": settings.hidden_size, "layers": settings.layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokens_per_second": settings.steps / statistics.median(times), "over_shortest": ratio(times, first),
        }  # fmt: skip


def as_if_read(model: LongNetForCausalLM, tokens: int) -> DilatedCache:
    """Return a cache in which every row that so many tokens would have left is there, with random values."""
    config = model.config
    cache = DilatedCache(config, 1, model.dtype, model.device, start=tokens)
    for layer in cache.layers:
        if layer.state is not None:
            layer.state.first = [0]
            layer.state.keys.normal_()
            layer.state.values.normal_()
    return cache


@torch.inference_mode()
def gate(model: LongNetForCausalLM, tokens: int) -> None:
    """Compare logits, prefilled in chunks and decoded token by token, with those of one forward pass.

    Raises:
        GateError: a logit off by more than 1e-3 in float32, 0.1 in half precision.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    cache, last = DilatedCache(model.config), 40
    parts = [model(chunk, cache=cache).logits for chunk in torch.split(ids[:, :-last], 1777, 1)]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(tokens - last, tokens)]
    error = (torch.cat(parts, 1) - model(ids, use_cache=False).logits).abs().max().item()
    if not error <= (1e-3 if model.dtype == torch.float32 else 0.1):
        raise GateError(f"cached logits are off by {error:.1e} at {tokens} tokens; not timed")


def _decoder(model: LongNetForCausalLM, cache: DilatedCache, steps: int) -> Callable[[], None]:
    ids = torch.randint(0, model.config.vocab_size, (1, steps), device=model.device)

    @torch.inference_mode()
    def decode() -> None:
        where = [list(layer.state.next) for layer in cache.layers if layer.state is not None]
        for step in range(steps):
            model(ids[:, step : step + 1], cache=cache)
        for layer, position in zip(cache.layers, where, strict=True):  # each round at the same place
            if layer.state is not None:
                layer.state.next, layer.columns = position, 0

    return decode


def _dense_decoder(model: LongNetForCausalLM, context: int, steps: int) -> tuple[int, Callable[[], None]]:
    """The same weights with full attention and transformers' StaticCache, which is written in place as ours is."""
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("sdpa")
    config = dense.config
    heads = config.num_attention_heads
    cache = StaticCache(config, context)
    cache.early_initialization(1, heads, config.hidden_size // heads, model.dtype, model.device)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
    ids = torch.randint(0, config.vocab_size, (1, steps), device=model.device)

    @torch.inference_mode()
    def decode() -> None:
        rewind(cache, context - steps)
        for step in range(steps):
            dense(ids[:, step : step + 1], cache=cache)

    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers), decode
