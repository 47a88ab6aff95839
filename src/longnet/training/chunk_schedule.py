"""What a step in chunks needs, and in which order its chunks come: closed forms, before anything is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from longnet.attention.chunks import Tape
from longnet.attention.pattern import DilationPattern
from longnet.model.cache import refusal
from longnet.model.patterns import backend_of, heads_of, pattern_of


class Costs(NamedTuple):
    """Bytes that a step in chunks needs beside the weights and one chunk's activations.

    Attributes:
        state: keys and values of open segments, of all layers, in memory.
        owed: their gradients in memory, and one more such tensor while a chunk is sent back.
        log: on disk, at most.
    """

    state: int
    owed: int
    log: int


def chunk_costs(
    config: PreTrainedConfig, *, tokens: int, chunk_tokens: int, sequences: int = 1, itemsize: int = 4
) -> Costs:
    """Count what a step in chunks needs: closed forms, in bytes.

    For segments w₀ · f^i with rates f^i, and chunks of whole powers of f times w₀, the log takes
    2 · G · D · layers · itemsize · w₀ · f / (f + 1) bytes a chunk and row, whatever the length.

    Args:
        config: of a causal model with a pattern.
        tokens: of a sequence.
        chunk_tokens: of a chunk.
        sequences: rows that go through the model at a time.
        itemsize: bytes of a number among keys and values: 4 in float32, 2 under bfloat16 autocast.
    """
    heads, head_dim = heads_of(config)
    tape = tape_of(config, whole_rows(sequences, tokens), tokens, chunk_tokens)
    row = 2 * head_dim * itemsize
    rows = len(tape.patterns) * tape.places[-1] * sequences * heads
    given = tape.rows_given(heads)
    log = max((int(given[first:stop].sum()) for first, stop in spans_of(tape)), default=0)
    return Costs(state=rows * row, owed=2 * rows * 2 * head_dim * max(4, itemsize), log=log * row)


def tape_of(config: PreTrainedConfig, bounds: Tensor, tokens: int, chunk_tokens: int) -> Tape:
    """Return an empty tape of a model's layers.

    Raises:
        ValueError: a model that has no state of constant size.
    """
    reason = refusal(config)
    if reason is not None:
        raise ValueError(f"{type(config).__name__} cannot learn in chunks: {reason}")
    patterns: list[DilationPattern] = [pattern_of(config, layer) for layer in range(config.num_hidden_layers)]
    return Tape(patterns, tokens=tokens, chunk_tokens=chunk_tokens, bounds=bounds, backend=backend_of(config))


def spans_of(tape: Tape) -> list[tuple[int, int]]:
    """Return runs of chunks that give nothing to one another: first chunk, one past the last."""
    closed = (~tape.open_after()).nonzero().flatten() + 1
    return list(itertools.pairwise([0, *closed.tolist()]))


def order_of(first: int, stop: int) -> Iterator[tuple[int, bool]]:
    """Yield the chunks of a span, and whether they are learned from: the last one need not be read before."""
    for chunk in range(first, stop - 1):
        yield chunk, False
    for chunk in reversed(range(first, stop)):
        yield chunk, True


def whole_rows(rows: int, tokens: int) -> Tensor:
    """Return the bounds of rows without padding."""
    return torch.tensor([[row, 0, tokens] for row in range(rows)])


def rows_of(bounds: Tensor, first: int, stop: int) -> Tensor:
    """Return the bounds of some batch rows, counted from the first of them."""
    within = bounds[(bounds[:, 0] >= first) & (bounds[:, 0] < stop)]
    return within - torch.tensor([first, 0, 0])
