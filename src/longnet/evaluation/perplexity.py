"""Perplexity by context length and by position, every context scoring the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from transformers import PreTrainedModel

from longnet.evaluation.scoring import Scorer, refuse_more_positions

if TYPE_CHECKING:
    from longnet.data.shards import Split

_FIRST_BIN = 16  # positions of the first bin; each later one ends at twice the position
_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass
class EvaluateConfig:
    """The recipe's table `[evaluate]`."""

    every: int = 0
    """Steps between two evaluations; 0 evaluates after the last step only."""

    contexts: tuple[int, ...] = ()
    """Context lengths, in tokens, each a divisor of the longest; empty for the training length alone."""

    tokens: int = 65_536
    """Validation tokens that every context scores, at most; whole windows of the longest context, at least one."""

    batch_tokens: int = 32_768
    """Tokens in a batch, at most, but for a longer context, whose windows go one by one. The results are the same."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (("every", 0), ("tokens", 1), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluate.{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.contexts, default=1) < 1:
            raise ValueError(f"evaluate.contexts must be lengths of at least 1 token, got {list(self.contexts)}")


class PositionLoss(NamedTuple):
    """The mean loss of the tokens with position_from … position_to − 1 tokens of context before their own input."""

    position_from: int
    position_to: int
    loss: float
    standard_error: float | None


@dataclass(frozen=True)
class ContextResult:
    """What one context length gives.

    Attributes:
        context: tokens of a window.
        tokens: scored tokens, the same ones for every context.
        bytes: of text, which those tokens stand for.
        loss: mean, in nats per token.
        standard_error: of the loss, the units being windows of the longest context; None where there is one.
        by_position: in bins of doubling positions.
        by_unit: mean loss of each window of the longest context, which pairs contexts and models.
    """

    context: int
    tokens: int
    bytes: int
    loss: float
    standard_error: float | None
    by_position: list[PositionLoss]
    by_unit: list[float]

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, over the bytes of text: comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def as_row(self) -> dict[str, Any]:
        """Return the attributes, perplexity and bits per byte as plain values; `from_row` reads them."""
        row = dataclasses.asdict(self)
        row["by_position"] = [part._asdict() for part in self.by_position]
        bits = self.bits_per_byte if self.bytes else None
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None  # JSON has no infinity
        return {**row, "perplexity": perplexity, "bits_per_byte": bits}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return what `as_row` was called on."""
        values = {item.name: row[item.name] for item in dataclasses.fields(cls)}
        return cls(**{**values, "by_position": [PositionLoss(**part) for part in row["by_position"]]})


class Difference(NamedTuple):
    """The mean of paired differences, and its standard error; None where there is but one pair."""

    mean: float
    standard_error: float | None


def evaluate_contexts(
    model: PreTrainedModel,
    split: Split,
    contexts: Sequence[int],
    *,
    token_bytes: np.ndarray[tuple[int], np.dtype[np.int32]],
    tokens: int,
    batch_tokens: int,
    device: torch.device | str,
) -> list[ContextResult]:
    """Score the same tokens with windows of each context length, shortest first.

    Windows of the longest context, spread evenly over the split, are what is scored; a shorter context cuts each of
    them into windows that know nothing of one another, and the loss is over all positions. So a context gains from
    length alone, and differences between contexts pair.

    Args:
        model: a causal language model on `device`; its mode (training or not) is left as it was.
        split: of token data.
        contexts: lengths in tokens, each a divisor of the longest; may exceed the length of training.
        token_bytes: (V,) bytes of text that each token stands for.
        tokens: scored at most, rounded down to windows of the longest context, but at least one.
        batch_tokens: tokens in a batch, at most, unless one window has more.
        device: of the model.

    Raises:
        ValueError: contexts that don't divide the longest, or a split too short for it.
    """
    return list(
        iterate_contexts(
            model, split, contexts, token_bytes=token_bytes, tokens=tokens, batch_tokens=batch_tokens, device=device
        )
    )


def iterate_contexts(
    model: PreTrainedModel,
    split: Split,
    contexts: Sequence[int],
    *,
    token_bytes: np.ndarray[tuple[int], np.dtype[np.int32]],
    tokens: int,
    batch_tokens: int,
    device: torch.device | str,
) -> Iterator[ContextResult]:
    """Yield the results of `evaluate_contexts`, which takes the same arguments, one by one."""
    starts = unit_starts(split, contexts, tokens)
    largest = max(contexts)
    scored_bytes = sum(
        int(token_bytes[split.read(start + 1, start + largest + 1)].sum(dtype=np.int64)) for start in starts
    )
    if not scored_bytes:
        raise ValueError(
            "the validation tokens stand for no text: its tokenizer knows none of it, perhaps; prepare with another one"
        )
    refuse_more_positions(model, largest)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        score = Scorer(model)
        for context in sorted(set(contexts)):
            bins = position_bins(context)
            sums = _bin_sums(score, split, starts, largest, context, bins, batch_tokens, torch.device(device))
            by_unit = sums.sum(1) / largest
            by_position = []
            for (low, high), losses in zip(bins, sums.T, strict=True):
                mean, error = mean_difference(losses / (largest // context * (high - low)))
                by_position.append(PositionLoss(low, high, mean, error))
            loss, standard_error = mean_difference(by_unit)
            yield ContextResult(
                context=context,
                tokens=len(starts) * largest,
                bytes=scored_bytes,
                loss=loss,
                standard_error=standard_error,
                by_position=by_position,
                by_unit=by_unit.tolist(),
            )
    finally:
        model.train(was_training)


def unit_starts(split: Split, contexts: Sequence[int], tokens: int) -> list[int]:
    """Return where the windows of the longest context start, spread evenly over the split; check what is asked.

    A training run calls this before its first step, so that it does not fail at its first evaluation.

    Raises:
        ValueError: as `evaluate_contexts`.
    """
    if not contexts or min(contexts) < 1:
        raise ValueError(f"contexts must be lengths of at least one token, got {list(contexts)}")
    largest = max(contexts)
    odd = [context for context in contexts if largest % context]
    if odd:
        raise ValueError(
            f"each context must divide the longest, {largest}, so that all score the same tokens, got {odd[0]}: "
            "choose powers of two, say"
        )
    available = (split.tokens - 1) // largest
    if available < 1:
        raise ValueError(
            f"a context of {largest:,} tokens needs {largest + 1:,} validation tokens, and there are "
            f"{split.tokens:,}: shorten the contexts, or prepare the data with a larger validation split"
        )
    count = max(1, min(tokens // largest, available))
    slack = split.tokens - 1 - count * largest
    return [unit * largest + (slack * unit // (count - 1) if count > 1 else 0) for unit in range(count)]


def position_bins(context: int) -> list[tuple[int, int]]:
    """Return bins of positions, from … to − 1: 16, then each as long as all before it; the last may be cut."""
    edges = [0]
    while edges[-1] < context:
        edges.append(min(context, max(_FIRST_BIN, 2 * edges[-1])))
    return list(itertools.pairwise(edges))


def paired_difference(result: ContextResult, than: ContextResult) -> Difference:
    """Return loss of `result` minus loss of `than`, and its standard error over the same windows; below 0 is better.

    Raises:
        ValueError: results over different windows.
    """
    if len(result.by_unit) != len(than.by_unit) or (result.tokens, result.bytes) != (than.tokens, than.bytes):
        raise ValueError(
            f"results over {result.tokens:,} and {than.tokens:,} tokens do not pair: evaluate the same tokens"
        )
    return mean_difference(np.array(result.by_unit) - np.array(than.by_unit))


def mean_difference(differences: _Array) -> Difference:
    """Return the mean of paired differences, or of anything, and its standard error."""
    count = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return Difference(float(differences.mean()), error)


@torch.no_grad()
def _bin_sums(
    score: Scorer,
    split: Split,
    starts: Sequence[int],
    largest: int,
    context: int,
    bins: Sequence[tuple[int, int]],
    batch_tokens: int,
    device: torch.device,
) -> _Array:
    """Return the sum of the losses of each unit in each bin of positions, (units, bins)."""
    windows = [start + offset for start in starts for offset in range(0, largest, context)]
    sums = np.empty((len(windows), len(bins)))
    size = max(1, batch_tokens // context)
    for first in range(0, len(windows), size):
        rows = np.stack([split.read(start, start + context + 1) for start in windows[first : first + size]])
        ids = torch.from_numpy(rows).to(device)
        losses = score(ids[:, :-1], ids[:, 1:])
        sums[first : first + size] = torch.stack(
            [losses[:, low:high].sum(1, dtype=torch.float64) for low, high in bins], 1
        ).numpy(force=True)
    by_unit: _Array = sums.reshape(len(starts), -1, len(bins)).sum(1)
    return by_unit
