"""The parts of the benchmarks' scripts that need no download."""

import functools
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longnet import DilationPattern, dilated_attention

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    names = ("smollm2", "smollm2_report", "smollm2_masks")
    modules = [importlib.import_module(name) for name in names]
    monkeypatch.setattr(modules[0], "DEVICE", torch.device("cpu"))
    yield modules
    for name in names:
        del sys.modules[name]


def test_a_healing_that_was_stopped_goes_on_to_the_same_weights(scripts, tmp_path):
    """Its systems begin with the same adapters, and learn in turn from the same sequences."""
    smollm2, *_ = scripts
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=3,
        )
    )  # fmt: skip
    for folder in folders:
        model.save_pretrained(folder / "base")
        np.save(folder / "train.npy", np.random.default_rng(0).integers(0, 64, (3, 8193)))
    smollm2.heal(folders[0], "all", 6144)
    smollm2.heal(folders[1], "all", 2048)
    smollm2.heal(folders[1], "all", 6144)
    whole, stopped = (torch.load(folder / "heal-all.pt", weights_only=True) for folder in folders)
    assert [step["loss"] for step in whole["steps"]] == [step["loss"] for step in stopped["steps"]]
    assert [step["length"] for step in whole["steps"]] == [2048, 4096]
    assert all(torch.equal(value, stopped["adapter"][name]) for name, value in whole["adapter"].items())
    assert any(value.any() for name, value in whole["adapter"].items() if "lora_B" in name)  # they begin as zeros
    assert list(smollm2.systems(folders[0])) == [*((name, 0) for name in smollm2.PATTERNS), ("all", 6144)]
    ids = torch.arange(64)[None]
    healed = smollm2.load_healed(folders[0], "all", 6144)(ids).logits
    assert not torch.equal(healed, smollm2.load_healed(folders[0], "all", 0)(ids).logits)


def test_questions_are_answered_once_by_each_system(scripts, monkeypatch, tmp_path):
    """An answer goes on from its question, whatever the batch beside it."""
    smollm2, *_ = scripts
    monkeypatch.setattr(smollm2, "PATTERNS", {"dense": None, "kept": "2:1,8:2", "all": "2:1,8:2;all;global=1"})
    monkeypatch.setattr(smollm2, "load", functools.partial(smollm2.load, dtype=torch.float32))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate("zabcdefg")}, unk_token="z"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="z").save_pretrained(tmp_path / "base")
    questions = ["a b c d e f g a b", "e f"]
    row = {"task": "t", "length": 4, "questions": questions}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    for _ in range(2):
        smollm2.answer(tmp_path, [*smollm2.PATTERNS])
    rows = smollm2.rows_of(tmp_path / "answers.jsonl")
    assert [(row["system"], row["healed"], row["task"], row["length"]) for row in rows] == [
        (name, 0, "t", 4) for name in smollm2.PATTERNS
    ]
    for row in rows:
        model = smollm2.load(tmp_path, row["system"])
        for question, answer in zip(questions, row["answers"], strict=True):
            ids = torch.tensor([words.encode(question).ids])
            made = model.generate(ids, max_new_tokens=smollm2.ANSWER_TOKENS, do_sample=False)
            told = [words.id_to_token(number) for number in made[0, ids.shape[1] :].tolist() if number]
            assert answer.split() == told


def test_answers_to_ruler_are_scored_by_what_was_asked(scripts, monkeypatch, tmp_path):
    """A share of the words that are wanted; rows of earlier answers stay where there are none now."""
    smollm2, *_ = scripts
    ruler = importlib.import_module("smollm2_ruler")
    monkeypatch.delitem(sys.modules, "smollm2_ruler")
    asked = [
        {"task": task, "length": length, "digests": ["3f", "a1"],
         "docs": [{"max_length": length, "outputs": wanted} for wanted in (["4711"], ["ABC", "DEF"])]}
        for task, length in (("niah_single_1", 2048), ("niah_single_1", 4096), ("ruler_vt", 2048))
    ]  # fmt: skip
    ruler.write_rows(tmp_path / "questions.jsonl", asked)
    told = {
        ("niah_single_1", 2048, "dense", 0): ([" It is 4711.", " abc, and def"], [1.0, 1.0]),
        ("niah_single_1", 4096, "dense", 0): ([" 471", " DEF"], [0.0, 0.5]),
        ("ruler_vt", 2048, "all", 3): ([" 4711"], [1.0]),  # stopped before the second
    }
    for (task, length, system, healed), (answers, _) in told.items():
        row = {"task": task, "length": length, "system": system, "healed": healed, "answers": answers}
        smollm2.add_row(tmp_path / "answers.jsonl", {**row, "questions": len(answers)})
    for _ in range(2):
        ruler.score(tmp_path)
        rows = smollm2.rows_of(tmp_path / "ruler.jsonl")
        assert [(row["task"], row["length"], row["system"], row["healed"]) for row in rows] == [*told]
        for row, (answers, scores) in zip(rows, told.values(), strict=True):
            assert row["scores"] == scores
            assert row["questions"] == ["3f", "a1"][: len(answers)]
            assert row["first_answer"] == answers[0]
            assert "answers" not in row
        (tmp_path / "answers.jsonl").unlink(missing_ok=True)


def test_held_out_files_are_a_tenth_and_rows_that_were_cut_off_are_dropped(scripts, tmp_path):
    smollm2, *_ = scripts
    assert 0.08 < np.mean([smollm2.is_held_out(f"{number}.py") for number in range(2000)]) < 0.12
    file = tmp_path / "rows.jsonl"
    assert smollm2.rows_of(file) == []
    file.write_text('{"a": 1}\n{"a": 2')
    smollm2.add_row(file, {"a": 3})
    assert [row["a"] for row in smollm2.rows_of(file)] == [1, 3]
    assert "torch" in json.loads(file.read_text().splitlines()[1])  # where it was measured


def test_the_report_pairs_files_and_counts_flops(scripts):
    smollm2, report, _ = scripts
    shares = [report.share_of_dense(pattern, 8192) for pattern in smollm2.PATTERNS.values()]
    assert shares == pytest.approx([1, 0.235, 0.25, 0.25, 0.25], abs=1e-3)
    rows = [
        {
            "system": system,
            "healed": 0,
            "file": file,
            "by_context": {**dict.fromkeys(("1024", "4096", "8192"), 9.0), "256": loss},
        }
        for system, file, loss in (("dense", "a", 1.0), ("dense", "b", 3.0), ("all", "a", 1.5), ("all", "b", 3.7))
    ]
    assert "| 2.600 (+0.600 ± 0.100) |" in report.loss_table(rows, "by_context", "context")
    steps = {
        name: [{"tokens": 10 * step + 10, "loss": loss + step} for step in range(count)]
        for name, loss, count in (("dense", 1.0, 7), ("all", 1.5, 6))
    }
    assert report.healing_table(steps).splitlines()[2:] == [
        "| 50 | 3.000 (+0.000) | 3.500 (+0.500) |",
        "| 60 | 6.000 (+0.000) | 6.500 (+0.500) |",
    ]
    asked = [{"system": "all", "healed": 9, "task": "t", "length": 1024, "scores": [0.0, 1.0, 1.0, 0.0]}]
    assert "| t | 1024 | 0.50 ± 0.29 (4) |" in report.ruler_table(asked)
    healed = [
        {**row, "healed": healed, "by_position": {"0-9": row["by_context"]["256"] / (1 + healed)}}
        for row in rows
        for healed in (0, 1)
    ]
    assert report.headline(healed)[0] == (
        "- `all` at positions 0-9: +0.600 nats from dense attention as converted, +0.300 when both have healed on 1 "
        "tokens. Of its contexts 256 is best: 2.600, 9.000 with 8192."
    )
    assert "sdpa" in report.page(steps, {"loss": healed, "decode": [], "masks": [], "ruler": asked})
    masks = [
        {"system": system, "file": file, "flops": 0.25, "loss": loss}
        for system, file, loss in (("dense", "a", 1.0), ("dense", "b", 3.0), ("window", "a", 1.5), ("window", "b", 3.7))
    ]
    assert "| window | 0.250 | 2 | +0.600 ± 0.100 | – |" in report.masks_table(masks)


@pytest.mark.parametrize("system", ["window", "kept", "all"])
def test_masks_of_systems_that_the_operator_has_are_the_operators(scripts, system):
    *_, masks = scripts
    pattern = DilationPattern.parse(masks.OPERATORS[system])
    query = torch.randn(1, 6, masks.TOKENS, 8)
    key, value = torch.randn(2, 1, masks.KV_HEADS, masks.TOKENS, 8)
    layer = SimpleNamespace(config=SimpleNamespace(masks=system), layer_idx=3)
    found, _ = masks.attend(layer, query, key, value, None)
    expected = dilated_attention(query, key, value, pattern.shifted(3 * masks.KV_HEADS), is_causal=True)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
    counted = pattern.flops(tokens=masks.TOKENS, num_heads=6, head_dim=8, is_causal=True, num_kv_heads=3)
    dense = DilationPattern((masks.TOKENS,), (1,)).flops(tokens=masks.TOKENS, num_heads=6, head_dim=8, is_causal=True)
    assert masks.share_of_dense(system) == pytest.approx(counted / dense, rel=2e-3)  # of a layer, and of all of them


def test_a_table_of_counts_knows_what_was_counted(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    markov = importlib.import_module("markov")
    tokens = np.array([0, 1, 0, 1, 0, 2, 0, 1, 0, 2])  # the last four are scored
    # After 2 nothing has been seen; after 0 came 1, 1, 2: with one added each of the three 3, 2 and 1 of 6; after 1
    # came 0 twice: 3 of 5.
    assert markov.losses(tokens, 6, 1, 3) == pytest.approx(-np.log([1 / 3, 3 / 6, 3 / 5, 2 / 6]))
    # After 0, 2 and 2, 0 nothing; after 0, 1 came 0 twice; after 1, 0 came 1 and 2.
    assert markov.losses(tokens, 6, 2, 3) == pytest.approx(-np.log([1 / 3, 1 / 3, 3 / 5, 2 / 5]))


def test_a_copier_knows_what_followed_the_last_time(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    markov = importlib.import_module("markov")
    random = np.random.default_rng(0)
    tokens, known, length, symbols = random.integers(0, 3, size=400), 250, 3, 3
    tokens[300:330] = tokens[100:130]
    chain = random.random(150)
    rows = list(markov.copies(tokens, known, length, symbols, [0, 20, 400], chain))
    for row in rows:
        seen = {False: [], True: []}
        gains = []
        for at in range(length, 400):
            before = [x for x in range(length, at) if (tokens[x - length : x] == tokens[at - length : at]).all()]
            if before and row["further_than"] < at - before[-1] <= row["up_to"]:
                seen[at >= known].append(tokens[at] == tokens[before[-1]])
                gains += [at] if at >= known else []
        chance = (sum(seen[False]) + 1) / (len(seen[False]) + symbols)
        copied = [-np.log(chance if right else (1 - chance) / 2) for right in seen[True]]
        assert row["share"] == pytest.approx(len(gains) / 150)
        assert row["right"] == pytest.approx(np.mean(seen[True]))
        assert row["gain"] == pytest.approx((chain[np.array(gains) - known] - copied).sum() / 150)
    assert sum(row["share"] for row in rows) > 0.9
