"""evaluate_contexts against the loss written out with all logits in float64."""

import math

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from cases import DEVICES
from longnet.evaluation import perplexity, scoring
from longnet.evaluation.perplexity import (
    ContextResult,
    evaluate_contexts,
    paired_difference,
    position_bins,
    unit_starts,
)


def brute_force(model, ids, starts, largest, context):
    """Return the loss of every scored token, (units, largest), from the full logits of one window at a time."""
    losses = []
    for start in starts:
        for low in range(start, start + largest, context):
            window = torch.from_numpy(ids[low : low + context + 1]).to(model.device)
            with torch.no_grad():
                logits = model.eval()(input_ids=window[None, :-1]).logits[0].double()
            losses.append(-logits.log_softmax(-1).gather(1, window[1:, None])[:, 0])
    return torch.cat(losses).view(len(starts), largest).numpy(force=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_losses_are_those_of_the_full_logits(model, split, token_bytes, batch_tokens, monkeypatch, device):
    model.to(device)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 257 * 7)  # chunks that fit neither windows nor batches
    results = evaluate_contexts(
        model, split, (64, 16, 32), token_bytes=token_bytes, tokens=5 * 64, batch_tokens=batch_tokens, device=device
    )
    starts = unit_starts(split, (64,), 5 * 64)
    assert len(starts) == 5
    assert [result.context for result in results] == [16, 32, 64]
    for result in results:
        exact = brute_force(model, split.ids, starts, 64, result.context)
        assert result.loss == pytest.approx(exact.mean(), abs=1e-12)
        assert result.by_unit == pytest.approx(exact.mean(1), abs=1e-12)
        assert result.standard_error == pytest.approx(exact.mean(1).std(ddof=1) / math.sqrt(5), abs=1e-12)
        assert result.perplexity == pytest.approx(math.exp(exact.mean()))
        windows = exact.reshape(5, -1, result.context)
        for low, high, loss, standard_error in result.by_position:
            assert loss == pytest.approx(windows[:, :, low:high].mean(), abs=1e-12)
            units = windows[:, :, low:high].mean((1, 2))
            assert standard_error == pytest.approx(units.std(ddof=1) / math.sqrt(5), abs=1e-12)


def test_every_context_scores_the_same_tokens(model, split, token_bytes):
    token_bytes = np.arange(257, dtype=np.int32)  # the bytes tell which tokens were counted
    results = evaluate_contexts(
        model, split, (16, 64), token_bytes=token_bytes, tokens=300, batch_tokens=64, device="cpu"
    )
    starts = unit_starts(split, (16, 64), 300)
    targets = np.concatenate([split.ids[start + 1 : start + 65] for start in starts])
    for result in results:
        assert (result.tokens, result.bytes) == (4 * 64, targets.sum())
        weights = [(high - low) / result.context for low, high, *_ in result.by_position]
        losses = [loss for _, _, loss, _ in result.by_position]
        assert np.dot(weights, losses) == pytest.approx(result.loss)


def test_units_are_spread_over_the_split_without_overlap(make_split):
    split = make_split(np.zeros(1000))
    starts = unit_starts(split, (100,), 450)
    assert starts[0] == 0
    assert starts[-1] + 101 == 1000
    assert len(starts) == 4
    assert min(np.diff(starts)) >= 100
    assert unit_starts(split, (111,), 10**9) == list(range(0, 999, 111))
    assert unit_starts(split, (999,), 1) == [0]


def test_a_paired_difference_is_that_of_the_units(model, split, token_bytes):
    short, long = evaluate_contexts(
        model, split, (16, 64), token_bytes=token_bytes, tokens=640, batch_tokens=640, device="cpu"
    )
    differences = np.subtract(long.by_unit, short.by_unit)
    got = paired_difference(long, short)
    assert got.mean == pytest.approx(long.loss - short.loss)
    assert got.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(len(differences)))
    # Pairing is the point: the units differ from one another more than the contexts do.
    assert got.standard_error < short.standard_error
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(long, ContextResult(16, 320, 320, 1.0, 1.0, [], [1.0] * 5))


def test_one_unit_has_no_standard_error(model, split, token_bytes):
    (result,) = evaluate_contexts(
        model, split, (512,), token_bytes=token_bytes, tokens=1, batch_tokens=16, device="cpu"
    )
    assert result.tokens == 512
    assert result.standard_error is None
    assert result.by_position[-1].standard_error is None


def test_bits_per_byte_of_bytes_are_the_loss_over_log_2():
    result = ContextResult(context=8, tokens=80, bytes=80, loss=math.log(16), standard_error=None,
                           by_position=[], by_unit=[])  # fmt: skip
    assert result.bits_per_byte == pytest.approx(4)
    assert result.perplexity == pytest.approx(16)
    words = ContextResult(8, 80, 320, math.log(16), None, [], [])  # tokens of four bytes
    assert words.bits_per_byte == pytest.approx(1)


def test_bins_of_positions_double():
    assert position_bins(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert position_bins(8) == [(0, 8)]
    assert position_bins(64)[-1] == (32, 64)


def test_a_model_that_changes_its_logits_is_scored_by_those(split, token_bytes):
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.1, initializer_range=1.0)).double()
    plain = LlamaForCausalLM(LlamaConfig(**sizes)).double()
    for model in (capped, plain):
        (result,) = evaluate_contexts(
            model, split, (32,), token_bytes=token_bytes, tokens=320, batch_tokens=64, device="cpu"
        )
        exact = brute_force(model, split.ids, unit_starts(split, (32,), 320), 32, 32)
        assert result.loss == pytest.approx(exact.mean(), abs=1e-12)


def test_logits_of_all_tokens_are_never_held(model, split, token_bytes, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 257 * 10)
    rows = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, out: rows.append(out.shape[:-1].numel()))
    evaluate_contexts(model, split, (64,), token_bytes=token_bytes, tokens=128, batch_tokens=128, device="cpu")
    assert rows == [64, 64, *[10] * 12, 8]  # the head is tried first, on 64 tokens


def test_the_mode_of_the_model_is_left(model, split, token_bytes):
    model.train()
    evaluate_contexts(model, split, (64,), token_bytes=token_bytes, tokens=64, batch_tokens=64, device="cpu")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("contexts", "message"),
    [((48, 64), "must divide the longest, 64"), ((1024,), "needs 1,025 validation tokens, and there are 700"),
     ((), "at least one token"), ((0, 4), "at least one token")],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(split, contexts, message):
    with pytest.raises(ValueError, match=message):
        unit_starts(split, contexts, 64)
    assert perplexity.EvaluateConfig().every == 0
