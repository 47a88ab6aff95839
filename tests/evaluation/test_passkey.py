"""Pass keys against models that copy, and that don't."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from longnet.evaluation.passkey import doubling_distances, iterate_passkey, make_prompts

QUESTION = "\nThe pass key is "


class Oracle(nn.Module):
    """Continues with what followed the question within the last `reach` ones; else it is indifferent."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.memory = reach, len(QUESTION) - 1

    def forward(self, input_ids, use_cache, logits_to_keep):
        assert not use_cache
        logits = torch.zeros(*input_ids.shape, 257)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(len(ids) - logits_to_keep, len(ids)):
                # The question, and as much of the key as is already given.
                known = ids[end + 1 - self.memory - (end - (len(ids) - logits_to_keep)) : end + 1]
                for start in range(end - len(known), max(-1, end - self.reach - len(known)), -1):
                    if ids[start : start + len(known)] == known:
                        logits[row, end, ids[start + len(known)]] = 20
                        break
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def retrieve(model, tokenizer, split, distances, **keywords):
    return list(iterate_passkey(
        model, tokenizer, split, distances, **{"trials": 6, "batch_tokens": 500, "device": "cpu", **keywords}
    ))  # fmt: skip


@pytest.mark.parametrize("distance", [37, 64, 500])
def test_the_key_stands_at_the_distance_asked(tokenizer, split, distance):
    for prompt in make_prompts(tokenizer, split, distance, trials=5, seed=1):
        told, other = (tokenizer.decode(ids, errors="replace") for ids in (prompt.told, prompt.other))
        key = tokenizer.decode(prompt.key)
        assert len(key) == 5
        assert key.isdecimal()
        assert told.endswith(QUESTION)
        place = len(prompt.told) - distance
        assert prompt.told[place : place + 5].tolist() == prompt.key.tolist()
        assert told.count(f"{QUESTION}{key}. Remember it.") == 1
        # The control tells another key, and is alike but for that.
        assert prompt.other[place : place + 5].tolist() != prompt.key.tolist()
        assert (
            np.delete(prompt.told, range(place, place + 5)) == np.delete(prompt.other, range(place, place + 5))
        ).all()
        assert key not in other


def test_a_model_that_copies_finds_every_key(tokenizer, split):
    for result in retrieve(Oracle(10**6), tokenizer, split, (40, 200)):
        assert result.exact == 1
        assert result.loss < 1e-5
        assert result.gain > 4  # with another key told, it copies that
        assert result.gain > 10 * result.gain_standard_error
        assert result.prompt_tokens == result.distance + len(QUESTION) + 16


def test_a_model_that_looks_back_less_far_finds_the_near_ones(tokenizer, split):
    near, far = retrieve(Oracle(100), tokenizer, split, (200, 40))
    assert (near.distance, far.distance) == (40, 200)
    assert (near.exact, far.exact) == (1, 0)
    assert far.gain == 0
    assert far.loss == pytest.approx(np.log(257))


def test_batches_change_nothing(tokenizer, split):
    one, all_ = (
        retrieve(Oracle(10**6), tokenizer, split, (60,), batch_tokens=size, trials=5) for size in (1, 10**6)
    )  # fmt: skip
    assert one == all_


def test_prompts_are_made_as_they_are_asked(tokenizer, split):
    """A list of all of them was out of memory, or never whole."""
    found = [prompt.key.tolist() for prompt in itertools.islice(make_prompts(tokenizer, split, 40, trials=10**18), 3)]
    assert found == [prompt.key.tolist() for prompt in make_prompts(tokenizer, split, 40, trials=3)]


def test_exact_is_what_greedy_generation_writes(tokenizer, split, model):
    model.float()
    (result,) = retrieve(model, tokenizer, split, (40,), trials=4)
    found = []
    for prompt in make_prompts(tokenizer, split, 40, trials=4):
        ids = torch.from_numpy(prompt.told)[None]
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0, -5:]
        found.append(new.tolist() == prompt.key.tolist())
    assert result.exact == np.mean(found)
    assert abs(result.gain) < 4 * result.gain_standard_error + 0.5  # a model that has learned nothing


@pytest.mark.parametrize(
    ("distance", "message"),
    [(20, "must be at least"), (5000, "needs .* tokens of filler, and the validation split has")],
)
def test_distances_that_cannot_be_made_are_refused(tokenizer, split, distance, message):
    with pytest.raises(ValueError, match=message):
        next(make_prompts(tokenizer, split, distance, trials=1))


def test_distances_double():
    assert doubling_distances(500) == (64, 128, 256)
    assert doubling_distances(512) == (64, 128, 256, 512)
    assert doubling_distances(10) == (64,)
