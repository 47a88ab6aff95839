"""The slide encoder at GigaPath's size: seconds and memory by the number of tiles, against dense attention."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longnet.measurement import peak_bytes, seconds
from longnet.model.attention_maps import attention_map
from longnet.model.slides import LongNetSlideConfig, LongNetSlideModel

TILES = (2_500, 10_000, 50_000)
DENSE_TILES = 10_000  # beyond, dense attention takes the better part of an hour on two cores


class GateError(Exception):
    """The result is not right: nothing is measured."""


def run(tiles: Sequence[int], device: torch.device, *, dense_tiles: int = DENSE_TILES) -> Iterator[dict[str, Any]]:
    """Yield a row for the construction of the encoder, and one for each number of tiles.

    Weights are random, of the published shape (12 × 768, 16 heads, input 1536) with its segments; inputs are random on
    a square of tiles. Each length is encoded once, after a small one that counts for nothing.

    Args:
        tiles: of a slide.
        device: where it is computed.
        dense_tiles: up to so many, the same encoder with dense attention is measured, too.

    Raises:
        GateError: with one branch over all, the encoder is not the dense one, or attention in several is not their one
            softmax.
    """
    gate(device)
    gate_branches(device)
    peak_bytes(device, reset=True)
    before = peak_bytes(device)
    began = time.process_time(), time.perf_counter()
    model = _make(device)
    yield {
        "case": "construct",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - began[1],
        "cpu_seconds": time.process_time() - began[0],
        "bytes": peak_bytes(device) - before,
    }
    dense = _make(device, tail="exact", attn_implementation="sdpa")
    dense.load_state_dict(model.state_dict(), assign=True)
    _measure(model, 300, device)
    for count in tiles:
        row: dict[str, Any] = {"case": "encode", "tiles": count, **_measure(model, count, device)}
        if count <= dense_tiles:
            figures = _measure(dense, count, device)
            row |= {f"dense_{name}": value for name, value in figures.items()}
            row["dense_over_dilated"] = figures["cpu_seconds"] / row["cpu_seconds"]
        yield row


def _make(device: torch.device, **settings: Any) -> LongNetSlideModel:
    model = LongNetSlideModel(LongNetSlideConfig(**settings))
    torch.nn.Module.to(model, device)
    model.train(mode=False)
    return model


def gate(device: torch.device) -> None:
    """Check a small encoder of one branch over all tiles against dense attention.

    Raises:
        GateError: they differ.
    """
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "segment_lengths": (4096,),
        "dilation_rates": (1,),
        "tail": "exact",
    }
    dilated = _make(device, **sizes)
    dense = _make(device, **sizes, attn_implementation="sdpa")
    dense.load_state_dict(dilated.state_dict())
    slide = _slide(500, device)
    with torch.inference_mode():
        error = float((dilated(*slide).pooled - dense(*slide).pooled).abs().max())
    if not error < 1e-4:
        raise GateError(f"one branch over all tiles is not dense attention: pooled embeddings differ by {error:.1e}")


def gate_branches(device: torch.device) -> None:
    """Check attention in five branches of several segments, with torchscale's tail, against rows of the one softmax.

    Raises:
        GateError: they differ.
    """
    model = _make(
        device, num_hidden_layers=1, segment_lengths=(64, 160, 256, 384, 512), dilation_rates=(1, 2, 4, 8, 16)
    )
    attention: Any = model.layers[0].self_attn
    slide, seen = _slide(700, device), []
    hooks = [
        attention.v_proj.register_forward_hook(lambda _, __, values: seen.append(values)),
        attention.sub_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    with torch.inference_mode():
        model(*slide)
        for hook in hooks:
            hook.remove()
        weights = attention_map(model, *slide, layer=0, query=range(701))
    values, got = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in seen)
    error = float((got - weights @ values).norm() / got.norm())
    if not error < 1e-5:
        raise GateError(f"attention in several branches is not their one softmax: it is off by {error:.1e} (relative)")


def _measure(model: LongNetSlideModel, tiles: int, device: torch.device) -> dict[str, float]:
    slide = _slide(tiles, device)
    peak_bytes(device, reset=True)
    began = time.process_time()
    with torch.inference_mode():
        elapsed = seconds(lambda: model(*slide), device)
    return {"seconds": elapsed, "cpu_seconds": time.process_time() - began, "peak_bytes": peak_bytes(device)}


def _slide(tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tiles)
    side = int(tiles**0.5) + 1
    places = torch.arange(tiles)
    coords = 256 * torch.stack([places // side, places % side], 1)
    return torch.randn(tiles, 1536, generator=generator).to(device), coords
