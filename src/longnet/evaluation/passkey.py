"""Passkey retrieval by distance: a number told somewhere in a text, and asked for later.

The filler is the data's own text; the key's sentence, the question and all keys are made here. The answer needs what
was said so many tokens before, whatever the model knows of the text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longnet.data.unknown import refuse_lost
from longnet.evaluation.perplexity import mean_difference

if TYPE_CHECKING:
    from longnet.data.shards import Split

_SAID, _AFTER, _ASKED = "\nThe pass key is ", ". Remember it.\n", "\nThe pass key is "
_LEAD = 16  # tokens of filler before the sentence
_DRAWS = 1000
_Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class PasskeyResult:
    """What one distance gives.

    Attributes:
        distance: tokens from the key, where it is told, to the answer.
        prompt_tokens: length of the prompts.
        trials: prompts, each with its own filler and key.
        exact: share of trials whose greedy continuation is the key.
        loss: of the key's tokens as the answer, mean in nats.
        gain: by how much that loss is lower than with another key in the sentence, mean in nats a token. Above 0, the
            answer is informed by what was told at that distance.
        gain_standard_error: of the gain over trials; None where there is one.
    """

    distance: int
    prompt_tokens: int
    trials: int
    exact: float
    loss: float
    gain: float
    gain_standard_error: float | None


class Prompt(NamedTuple):
    """Token ids of one trial.

    Attributes:
        told: prompt whose sentence tells the key.
        other: the same prompt, telling another key.
        key: the key's tokens, which are the answer.
    """

    told: _Ids
    other: _Ids
    key: _Ids


def iterate_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    distances: Sequence[int],
    *,
    trials: int,
    batch_tokens: int,
    device: torch.device | str,
    seed: int = 0,
) -> Iterator[PasskeyResult]:
    """Yield a result for each distance, shortest first.

    Args:
        model: a causal language model on `device`; its mode (training or not) is left as it was.
        tokenizer: of the model and the data.
        split: gives the filler.
        distances: tokens from the key to the answer.
        trials: prompts a distance.
        batch_tokens: tokens in a batch, at most, unless one prompt has more.
        device: of the model.
        seed: of keys and fillers.

    Raises:
        ValueError: a distance too short for the sentence and the question, or too long for the split.
    """
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        for distance in sorted(set(distances)):
            prompt_tokens, parts = 0, []
            for prompts in _batches(make_prompts(tokenizer, split, distance, trials=trials, seed=seed), batch_tokens):
                prompt_tokens = len(prompts[0].told)
                exact, losses = _answers(model, prompts, torch.device(device), is_told=True)
                parts.append((exact, losses, _answers(model, prompts, torch.device(device), is_told=False)[1]))
            exact, losses, control = (np.concatenate(part) for part in zip(*parts, strict=True))
            gain = mean_difference(control - losses)
            yield PasskeyResult(
                distance=distance,
                prompt_tokens=prompt_tokens,
                trials=trials,
                exact=float(exact.mean()),
                loss=float(losses.mean()),
                gain=gain.mean,
                gain_standard_error=gain.standard_error,
            )
    finally:
        model.train(was_training)


def make_prompts(
    tokenizer: PreTrainedTokenizerBase, split: Split, distance: int, *, trials: int, seed: int = 0
) -> Iterator[Prompt]:
    """Yield trials of one length, filler from places of the split drawn at random.

    Raises:
        ValueError: as `iterate_passkey`.
    """
    refuse_lost(tokenizer, f"{_SAID}0123456789{_AFTER}{_ASKED}", "the pass keys' sentences")
    random = np.random.default_rng([seed, distance])
    said, after, asked = (_encode(tokenizer, text) for text in (_SAID, _AFTER, _ASKED))
    key_tokens = len(_encode(tokenizer, _draw(random)))
    middle = distance - key_tokens - len(after) - len(asked)
    if middle < 0:
        raise ValueError(
            f"a passkey distance must be at least {distance - middle}, so long are the sentence and the question, got "
            f"{distance}"
        )
    filler = _LEAD + middle
    if split.tokens < filler:
        raise ValueError(
            f"a passkey distance of {distance:,} needs {filler:,} tokens of filler, and the {split.name} split has "
            f"{split.tokens:,}: shorten the distances"
        )
    for _ in range(trials):
        key, other = _draw_keys(tokenizer, random, key_tokens)
        start = int(random.integers(0, split.tokens - filler + 1))
        text = split.read(start, start + filler)
        told, control = (
            np.concatenate([text[:_LEAD], said, told_key, after, text[_LEAD:], asked]) for told_key in (key, other)
        )
        yield Prompt(told, control, key)


def _batches(prompts: Iterator[Prompt], batch_tokens: int) -> Iterator[list[Prompt]]:
    """Yield prompts of one length in batches, never all of them at once."""
    for first in prompts:
        size = max(1, batch_tokens // (len(first.told) + len(first.key)))
        yield [first, *itertools.islice(prompts, size - 1)]


@torch.no_grad()
def _answers(
    model: PreTrainedModel, prompts: Sequence[Prompt], device: torch.device, *, is_told: bool
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Return, of each prompt, whether the key is the greedy continuation (1 or 0), and the mean loss of its tokens.

    The key's tokens are given as input one after the other. They are what greedy generation writes if and only if each
    is the likeliest after the ones before: so one pass tells both.
    """
    keys = torch.from_numpy(np.stack([prompt.key for prompt in prompts])).to(device)
    rows = torch.from_numpy(np.stack([prompt.told if is_told else prompt.other for prompt in prompts])).to(device)
    inputs = torch.cat([rows, keys[:, :-1]], 1)
    logits: Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=keys.shape[1]).logits
    exact = (logits.argmax(-1) == keys).all(1).double()
    losses = functional.cross_entropy(logits.double().mT, keys, reduction="none").mean(1)
    return exact.numpy(force=True), losses.numpy(force=True)


def _draw_keys(tokenizer: PreTrainedTokenizerBase, random: np.random.Generator, tokens: int) -> tuple[_Ids, _Ids]:
    """Return two keys of so many tokens, which differ in their first one."""
    found: list[_Ids] = []
    for _ in range(_DRAWS):
        key = _encode(tokenizer, _draw(random))
        if len(key) == tokens and (not found or key[0] != found[0][0]):
            found.append(key)
        if len(found) == 2:
            return found[0], found[1]
    raise ValueError(
        f"the tokenizer gives no two numbers of five digits the same length of {tokens} tokens, so that no pass keys "
        "can be compared: leave --passkey out"
    )


def _draw(random: np.random.Generator) -> str:
    return str(random.integers(10**4, 10**5))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> _Ids:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def doubling_distances(longest: int, shortest: int = 64) -> tuple[int, ...]:
    """Return shortest, twice that, … up to `longest`."""
    return tuple(shortest << step for step in range(max(1, int(math.log2(max(1, longest / shortest))) + 1)))
