"""Sequences that tell and ask, the start of the model that learns them, and who meets whom."""

import numpy as np
import pytest
import torch

from longnet.attention.pattern import DilationPattern
from longnet.attention.reference import multiplicity
from longnet.evaluation.recall import RecallData, RecallModel, RecallResult, RecallTask, evaluate_recall, joins
from longnet.model import LongNetConfig

TASK = RecallTask(tokens=64, distances=(2, 8, 32, 62), pairs=(4, 8), scored=(8, 1), keys=16, values=4, sequences=8)


def config(**fields):
    sizes = {"vocab_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    pattern = {"segment_lengths": (8, 64), "dilation_rates": (1, 4)}
    return LongNetConfig(**{**sizes, **pattern, "position_embedding": "none", "max_position_embeddings": 64, **fields})


def test_every_question_has_one_answer_before_it():
    batch = RecallData(TASK, seed=3).batch(5, 6, 8)
    for row in range(6):
        assert len({*batch.told[row].tolist(), *batch.asked[row].tolist()}) == 16
        for told, asked, answer in zip(batch.told[row], batch.asked[row], batch.answer[row], strict=True):
            assert 2 <= asked - told < 62
            assert batch.key[row, told] == batch.key[row, asked] >= 0
            assert (batch.key[row] == batch.key[row, told]).sum() == 2
            assert batch.value[row, told] == answer
            assert batch.value[row, asked] == -1
    assert ((batch.key >= 0).sum(1) == 16).all()


def test_batches_are_a_function_of_seed_and_step_and_the_evaluation_is_none_of_them():
    first, again = (RecallData(TASK, seed=3).batch(5, 2, 8) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    others = [
        RecallData(TASK, seed=3).batch(6, 2, 8),
        RecallData(TASK, seed=4).batch(5, 2, 8),
        RecallData(TASK, seed=3, is_evaluation=True).batch(5, 2, 8),
    ]
    assert all(not torch.equal(first.key, other.key) for other in others)


def test_buckets_are_asked_for_as_often():
    data = RecallData(TASK, seed=0)
    distances = torch.cat([(batch.asked - batch.told).flatten() for batch in (data.batch(i, 64, 4) for i in range(8))])
    shares = [((distances >= low) & (distances < high)).double().mean().item() for low, high in TASK.buckets]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)  # 1,024 drawn places


def test_questions_begin_as_a_match_on_the_key():
    torch.manual_seed(0)
    task = RecallTask(tokens=64, distances=(2, 62), keys=16, pairs=(8,), scored=(8,))
    model = RecallModel(task, config(hidden_size=256, num_attention_heads=2, num_key_value_heads=1))
    batch = RecallData(task, seed=0).batch(0, 1, 8)
    rows = model.embed(batch)[0]
    attention = model.decoder.layers[0].self_attn
    query, key = attention.q_proj(rows[batch.asked[0]]), attention.k_proj(rows[batch.told[0]])
    for head in query.unflatten(1, (2, -1)).unbind(1):
        assert ((head @ key.T).argmax(1) == torch.arange(8)).all()
    filler = attention.q_proj(rows[batch.key[0] < 0])
    assert filler.abs().max() > 0  # fillers lie in all parts


@pytest.mark.parametrize("pattern", ["8:1,64:4", "8:1,32:8,64:3", "8:1,64:4;all", "16:1,64:8;all"])
def test_rows_meet_where_the_oracle_joins_them(pattern):
    pattern = DilationPattern.parse(pattern)
    own = config(
        segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates, queries=pattern.queries
    )
    places = torch.arange(64)[None]
    wanted = multiplicity(places, torch.zeros_like(places), pattern, num_kv_heads=4, is_causal=True)[0].sum(0) > 0
    query, key = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    assert np.array_equal(joins(own, query, key) & (query >= key), wanted.numpy())


def test_rows_of_a_sparse_transformer_and_of_dense_attention_meet():
    sparse = config(attn_implementation="sparse_fixed", sparse_block=16, sparse_summary=2)
    query, key = np.array([5, 20, 20, 20]), np.array([1, 15, 3, 17])
    assert joins(sparse, query, key).tolist() == [True, True, False, True]
    assert joins(config(attn_implementation="sdpa"), query, key).all()


def test_answers_are_counted_by_distance():
    result = RecallResult(4, asked=[0, 0, 4, 2, 2], right=[0, 0, 2, 0, 1], joined_asked=[0, 0, 2, 0, 2],
                          joined_right=[0, 0, 2, 0, 1])  # fmt: skip
    assert result.accuracy(2, 5) == 3 / 8
    assert result.accuracy(2, 5, modulus=2) == 3 / 6
    assert result.accuracy(2, 5, modulus=2, rest=1) == 0
    assert result.accuracy(0, 2) is None
    assert result.reached(2, 5, is_joined=True) == 3 / 4
    assert result.reached(2, 5, is_joined=False) == 0
    assert (result + result).asked == [0, 0, 8, 4, 4]


def test_an_evaluation_asks_the_same_of_every_model():
    torch.manual_seed(0)
    model = RecallModel(TASK, config()).train()
    one = evaluate_recall(model, TASK, pairs=8, batch_sequences=4)
    assert model.training
    assert sum(one.asked) == 8 * 8
    assert one.asked == evaluate_recall(RecallModel(TASK, config()), TASK, pairs=8, batch_sequences=4).asked
    assert sum(evaluate_recall(model, TASK, pairs=1, batch_sequences=8).asked) == 8 * 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distances": (8,)}, "two edges or more that rise"),
        ({"distances": (8, 4)}, "two edges or more that rise"),
        ({"distances": (2, 64)}, "must lie below task.tokens = 64"),
        ({"pairs": (32,)}, "32 pairs need as many task.keys"),
        ({"keys": 0}, "task.keys must be at least 1"),
        ({"scored": ()}, "task.scored must be numbers of at least 1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**{"tokens": 64, "distances": (2, 62), "pairs": (8,), "scored": (8,), "keys": 16, **values})
