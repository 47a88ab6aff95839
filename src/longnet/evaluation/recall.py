"""Recall by distance: values told beside keys, and asked for by key so many tokens later, in sequences made here.

A sequence holds pairs, questions and filler, one row of C numbers each: a pair is a key's and a value's embedding in
parts of their own, a question the key's in a third part. So one hop of attention answers a question where some head
joins the two rows, and what is measured is reach alone: no text, no tokenizer, nothing to know beforehand. With many
pairs this is multi-query associative recall (arXiv:2312.04927), in one row a pair; with one pair, a pass key.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longnet.model.configuration import LongNetConfig
from longnet.model.modeling import LongNetModel
from longnet.model.patterns import kind_of, pattern_of, sparse_pattern_of

_LAYOUTS = 256  # drawn once for each number of pairs; a batch draws among them, and keys and values anew
_EVALUATION = 1  # stream of random numbers that training, stream 0, does not use
_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(kw_only=True)
class RecallTask:
    """The recipe's table `[task]`: sequences that tell values and ask for them."""

    tokens: int
    """Length of a sequence, in tokens."""

    distances: tuple[int, ...]
    """Edges of the buckets of distance between pair and question. Each bucket is asked for as often, and each distance
    in it."""

    pairs: tuple[int, ...] = (8, 64, 64, 64)
    """Pairs of a training sequence, and as many questions: of each step in turn."""

    scored: tuple[int, ...] = (64, 1)
    """Pairs of a scored sequence; 1 is a pass key, told once and asked for once."""

    keys: int = 128
    """Different keys; those of a sequence are drawn without repetition."""

    values: int = 16
    """Different values, so that guessing is right once in so many."""

    fillers: int = 32
    """Different rows that mean nothing."""

    sequences: int = 64
    """Sequences that are scored with many pairs; with few as many more as make as many questions, up to 16 times."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("pairs", "scored", "distances"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"task.{name} must be numbers of at least 1, got {list(getattr(self, name))}")
        for name in ("tokens", "keys", "values", "fillers", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        if len(self.distances) < 2 or any(high <= low for low, high in itertools.pairwise(self.distances)):
            raise ValueError(f"task.distances must be two edges or more that rise, got {list(self.distances)}")
        if self.distances[-1] >= self.tokens:
            raise ValueError(f"task.distances must lie below task.tokens = {self.tokens}, got {self.distances[-1]}")
        most = max(*self.pairs, *self.scored)
        if most > self.keys or 4 * most > self.tokens:
            raise ValueError(
                f"{most} pairs need as many task.keys, got {self.keys}, and four times as many task.tokens, so that "
                f"they can be placed, got {self.tokens}"
            )

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Distances from … to, the latter excluded."""
        return list(itertools.pairwise(self.distances))


class RecallBatch(NamedTuple):
    """Sequences that ask.

    Attributes:
        filler: (B, T) which filler a row is, if it is one.
        key: (B, T) the key of a pair or a question, −1 elsewhere.
        value: (B, T) the value of a pair, −1 elsewhere.
        told: (B, N) positions of the pairs.
        asked: (B, N) positions of their questions, each after its pair.
        answer: (B, N) the values.
    """

    filler: Tensor
    key: Tensor
    value: Tensor
    told: Tensor
    asked: Tensor
    answer: Tensor


class RecallData:
    """Batches as a pure function of (seed, step)."""

    def __init__(self, task: RecallTask, *, seed: int, is_evaluation: bool = False) -> None:
        self._task, self._seed = task, (int(is_evaluation) * _EVALUATION, seed)
        sizes = sorted(set(task.scored if is_evaluation else task.pairs))
        self._layouts = {
            size: _place(task, size, np.random.default_rng([*self._seed, _LAYOUTS, size])) for size in sizes
        }

    def batch(self, step: int, sequences: int, pairs: int) -> RecallBatch:
        """Return the sequences of a step, `pairs` of the task's sizes in each."""
        task, random = self._task, np.random.default_rng([*self._seed, step, pairs])
        places = self._layouts[pairs][random.integers(0, _LAYOUTS, sequences)]
        told, asked = places[..., 0], places[..., 1]
        shape, rows = (sequences, task.tokens), np.arange(sequences)[:, None]
        keys = random.permuted(np.tile(np.arange(task.keys), (sequences, 1)), axis=1)[:, :pairs]
        answer = random.integers(0, task.values, (sequences, pairs))
        key, value = np.full(shape, -1), np.full(shape, -1)
        key[rows, told], key[rows, asked], value[rows, told] = keys, keys, answer
        filler = random.integers(0, task.fillers, shape)
        return RecallBatch(*(torch.from_numpy(part) for part in (filler, key, value, told, asked, answer)))


def _place(task: RecallTask, pairs: int, random: np.random.Generator) -> _Ints:
    """Return layouts (_LAYOUTS, pairs, 2): where pairs and questions stand, no two rows in one place."""
    places = np.empty((_LAYOUTS, pairs, 2), np.int64)
    for layout in places:
        taken, placed = np.zeros(task.tokens, np.bool_), 0
        while placed < pairs:
            low, high = task.buckets[random.integers(len(task.buckets))]
            distance = random.integers(low, high)
            told = random.integers(0, task.tokens - distance)
            if not taken[told] and not taken[told + distance]:
                taken[[told, told + distance]] = True
                layout[placed] = told, told + distance
                placed += 1
    return places


class RecallModel(nn.Module):
    """A LongNet, any of its attentions, between embeddings of keys, values and fillers and a choice among the values.

    q_proj and k_proj begin as a match on the key: k_proj at random on a pair's part of the row, q_proj the same on a
    question's, so that few steps do: finding the match is not what is asked here. All else begins as in any LongNet,
    and everything is trained.

    Args:
        task: what is told and asked.
        config: of the LongNet.
    """

    def __init__(self, task: RecallTask, config: LongNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.part = part = 3 * width // 8
        self.keys, self.values, self.fillers = (
            nn.Embedding(size, width) for size in (task.keys, task.values, task.fillers)
        )
        self.decoder = LongNetModel(config)
        self.head = nn.Linear(width, task.values)
        with torch.no_grad():
            self.keys.weight[:, part:] = 0
            self.values.weight[:, : 2 * part] = 0
            for layer in self.decoder.layers:
                attention: Any = layer.self_attn
                query, key = attention.q_proj.weight, attention.k_proj.weight
                match = torch.randn(key.shape[0], part) * part**-0.5
                key.zero_()[:, :part] = match
                heads = query.unflatten(0, (config.num_key_value_heads or 1, -1, int(config.head_dim or 0)))
                heads.zero_()[..., part : 2 * part] = match.unflatten(0, (heads.shape[0], 1, -1))

    def embed(self, batch: RecallBatch) -> Tensor:
        """Return the rows (B, T, C)."""
        key, value = batch.key[..., None], batch.value[..., None]
        keys = self.keys(batch.key.clamp(min=0))
        is_pair = value >= 0
        pair = keys + self.values(batch.value.clamp(min=0))
        rows = torch.where(is_pair, pair, keys.roll(self.part, -1))
        return torch.where(key >= 0, rows, self.fillers(batch.filler))

    def forward(self, batch: RecallBatch) -> Tensor:
        """Return the logits (B, N, values) of the answers."""
        states = self.decoder(inputs_embeds=self.embed(batch), use_cache=False).last_hidden_state
        answers: Tensor = self.head(torch.take_along_dim(states, batch.asked[..., None], dim=1))
        return answers


@dataclass(frozen=True)
class RecallResult:
    """Answers by distance.

    Attributes:
        pairs: of a sequence.
        asked: questions at distance 0, 1, ….
        right: those answered right.
        joined_asked: those whose pair some head of a layer joins to them.
        joined_right: those of them that were answered right.
    """

    pairs: int
    asked: list[int]
    right: list[int]
    joined_asked: list[int]
    joined_right: list[int]

    def accuracy(self, low: int, high: int, *, modulus: int = 1, rest: int = 0) -> float | None:
        """Return the share of right answers at distances low … high − 1 that leave `rest`; None without any."""
        places = slice(low + (rest - low) % modulus, high, modulus)
        return _share(self.right[places], self.asked[places])

    def reached(self, low: int, high: int, *, is_joined: bool) -> float | None:
        """Return that share among questions whose pair a head joins to them, or among the others."""
        right, asked = np.array(self.joined_right[low:high]), np.array(self.joined_asked[low:high])
        if not is_joined:
            right, asked = np.array(self.right[low:high]) - right, np.array(self.asked[low:high]) - asked
        return _share(right, asked)

    def __add__(self, other: RecallResult) -> RecallResult:
        """Return the answers of both together, as of two seeds."""
        counts = [
            (np.array(getattr(self, name)) + np.array(getattr(other, name))).tolist()
            for name in ("asked", "right", "joined_asked", "joined_right")
        ]
        return RecallResult(self.pairs, *counts)


def _share(right: Sequence[int] | _Ints, asked: Sequence[int] | _Ints) -> float | None:
    total = int(np.sum(asked))
    return int(np.sum(right)) / total if total else None


@torch.no_grad()
def evaluate_recall(model: RecallModel, task: RecallTask, *, pairs: int, batch_sequences: int) -> RecallResult:
    """Ask a model, in sequences that no training has seen and that are the same for every model.

    Args:
        model: whose mode (training or not) is left as it was.
        task: what is asked.
        pairs: of a sequence, one of `task.scored`.
        batch_sequences: of a forward pass; with another number other sequences are asked.
    """
    was_training = model.training
    model.eval()
    data = RecallData(task, seed=0, is_evaluation=True)
    sequences = task.sequences * min(16, max(1, max(task.scored) // pairs))
    counts = np.zeros((4, task.tokens), np.int64)
    for step in range(-(-sequences // batch_sequences)):
        batch = data.batch(step, batch_sequences, pairs)
        right = (model(batch).argmax(-1) == batch.answer).numpy()
        told, asked = batch.told.numpy(), batch.asked.numpy()
        is_joined = joins(model.decoder.config, asked, told)
        distances = asked - told
        for row, chosen in enumerate((distances > 0, right, is_joined, is_joined & right)):
            counts[row] += np.bincount(distances[chosen], minlength=task.tokens)
    model.train(was_training)
    return RecallResult(pairs, *counts.tolist())


def joins(config: LongNetConfig, query: _Ints, key: _Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell of each query and each key at or before it whether some head of the first layer lets the one see the other.

    Args:
        config: whose attention it is.
        query: positions.
        key: positions, as many.
    """
    kind = kind_of(config)
    if kind == "sparse_fixed":
        fixed = sparse_pattern_of(config)
        joined = (query // fixed.block == key // fixed.block) | (key % fixed.step >= fixed.step - fixed.summary)
        return np.asarray(joined)
    if kind != "dilated":
        return np.ones(query.shape, np.bool_)
    pattern, heads = pattern_of(config), config.num_key_value_heads or 1
    joined = key < pattern.global_tokens
    for length, rate in pattern.branches:
        offsets = [pattern.offset(rate, head, heads) for head in range(heads)]
        met = (query // length == key // length) & np.isin(key % length % rate, offsets)
        joined |= met if pattern.queries == "all" else met & ((query - key) % rate == 0)
    return joined
