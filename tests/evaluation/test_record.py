import dataclasses
import json
import math

import pytest

from longnet.evaluation.passkey import PasskeyResult
from longnet.evaluation.perplexity import ContextResult, Difference, PositionLoss
from longnet.evaluation.record import Evaluation, judge, with_error


def context(length, losses):
    mean = sum(losses) / len(losses)
    return ContextResult(
        length, 64 * len(losses), 60 * len(losses), mean, 0.1, [PositionLoss(0, length, mean, 0.1)], losses
    )


@pytest.fixture
def evaluation():
    shorter, longer = [2.0, 3.0, 2.5, 2.2], [1.9, 2.88, 2.41, 2.1]
    keys = [PasskeyResult(64, 90, 5, 0.8, 0.1, 3.0, 0.2), PasskeyResult(128, 154, 5, 0.0, 5.0, 0.1, 0.2)]
    contexts = [context(16, shorter), context(32, longer), context(64, [1.95, 2.85, 2.4, 2.1])]
    return Evaluation("run", "data", "dilated", 32, contexts, keys, {"commit": "abc"})


def test_json_comes_back(evaluation):
    text = evaluation.as_json()
    assert Evaluation.from_json(text) == evaluation
    row = json.loads(text)
    assert row["contexts"][0]["perplexity"] == pytest.approx(math.exp(2.425))
    assert row["contexts"][0]["bits_per_byte"] == pytest.approx(2.425 / math.log(2) * 64 / 60)
    assert [part["beyond_training"] for part in row["contexts"]] == [False, False, True]
    assert row["differences"][0]["loss"] == pytest.approx(-0.1025)
    assert row["differences"][0]["standard_error"] == pytest.approx(0.0062915, rel=1e-4)  # of .1, .12, .09, .1


def test_sentences_follow_the_figures(evaluation):
    first, second, beyond, rough, keys = evaluation.sentences()
    assert (
        "From 16 to 32 of context, on the same tokens: the loss falls: the longer context helps (−0.1025 ± 0.0063"
        in first
    )
    assert "From 32 to 64 of context, on the same tokens: no clear change" in second
    assert "Contexts of 64 are longer than the training sequences of 32" in beyond
    assert "are 4 windows of the longest context" in rough
    assert "retrieved at 64 (80%) tokens; the key told raises its own probability at 64 tokens" in keys
    worse = dataclasses.replace(evaluation, contexts=evaluation.contexts[1::-1], training_length=None, passkey=[])
    assert "the loss rises: the longer context harms (+0.1025 ± 0.0063" in worse.sentences()[0]
    assert len(worse.sentences()) == 2


def test_no_key_found_is_said(evaluation):
    lost = [dataclasses.replace(result, exact=0.0, gain=-0.3) for result in evaluation.passkey]
    said = dataclasses.replace(evaluation, passkey=lost).sentences()[-1]
    assert "not retrieved at any distance; at no distance does the key told raise" in said


def test_pictures_are_drawn(evaluation, tmp_path):
    pictures = evaluation.draw(tmp_path / "new")
    assert set(pictures) == {"perplexity", "difference", "position", "passkey", "gain"}
    assert "training length" in pictures["difference"].read_text()
    assert "loss with 16 of context" in pictures["difference"].read_text()


def test_the_headline_is_of_what_was_trained(evaluation):
    assert evaluation.headline() == (
        "With 32 of context in place of 16, perplexity on the same tokens is 10.20 in place of 11.30: the longer "
        "context helps (−0.1025 ± 0.0063 nats per token)."
    )
    alone = dataclasses.replace(evaluation, contexts=evaluation.contexts[:1])
    assert alone.headline() == "Perplexity 11.30 with 16 of context."


def test_judgement_needs_two_standard_errors():
    assert judge(Difference(-0.3, 0.1)) == "falls"
    assert judge(Difference(0.3, 0.1)) == "rises"
    assert judge(Difference(-0.19, 0.1)) == judge(Difference(-1e-9, 0.0)) == "does not clearly change"
    assert judge(Difference(-5.0, None)) == "does not clearly change"  # one pair tells nothing


def test_figures_have_the_digits_that_their_error_tells():
    assert with_error(Difference(-0.1025, 0.0063)) == "−0.1025 ± 0.0063"
    assert with_error(Difference(0.000123456, 0.0000451)) == "+0.000123 ± 0.000045"
    assert with_error(Difference(0.5, None)) == "+0.5000"
