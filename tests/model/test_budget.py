"""Parameters, FLOPs and memory against what torch counts and what a process holds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.budget import cache_bytes, count_parameters, longest_sequence, training_memory
from ranks import run_ranks

_WIDE = {"hidden_size": 128, "num_hidden_layers": 4}
_CASES = [
    (_WIDE, 1024, {}),
    (_WIDE, 512, {"bfloat16": True}),
    (_WIDE, 1024, {"checkpoint_activations": True}),
    ({"hidden_size": 384, "num_hidden_layers": 6, "num_key_value_heads": 2}, 256, {}),  # mostly weights
]
_MEASURE = """
import json, sys, torch
from longnet.measurement import peak_bytes
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.versions import checkpoint_layers

def train(fields, tokens, options):
    model = LongNetForCausalLM(LongNetConfig.preset("tiny", **fields)).train()
    if options.get("checkpoint_activations"):
        checkpoint_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, (2, tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("bfloat16", False)):
            loss = model(ids, shift_labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

for case in json.loads(sys.argv[1]):
    train({}, 256, case[2])  # libraries load their parts
    before = peak_bytes(torch.device("cpu"), reset=True)
    train(*case)
    print(peak_bytes(torch.device("cpu")) - before)
"""


def test_training_holds_what_was_estimated():
    # With glibc's default the process may keep a third more than it asked for.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps(_CASES)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for (fields, tokens, options), measured in zip(_CASES, run.stdout.split(), strict=True):
        estimate = training_memory(LongNetConfig.preset("tiny", **fields), tokens=tokens, sequences=2, **options)
        assert estimate.total == pytest.approx(int(measured), rel=0.25), (fields, options)


# Slices of 1023 tokens cut every branch after nearly all of a segment: the halo is as large as it gets.
_CUT = {"segment_lengths": (64, 256, 2048), "dilation_rates": (1, 4, 8), "position_embedding": "rope"}
_KEPT = [
    ({}, {}),
    ({}, {"bfloat16": True}),
    ({"num_key_value_heads": 2, "sub_layernorm": False}, {}),
    ({}, {"checkpoint_activations": True}),
]
_HELD = [
    ({"hidden_size": 128, "num_hidden_layers": 4}, {}),
    ({"hidden_size": 128, "num_hidden_layers": 4}, {"checkpoint_activations": True}),
    ({"hidden_size": 256, "num_hidden_layers": 4}, {}),  # a third of it weights
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_keep_for_backward_what_was_estimated(ranks, tmp_path):
    """Bytes of the tensors that autograd saves in two layers: those of four less those of two."""
    kept = run_ranks("parallel_checks:saved_bytes", ranks, tmp_path, _CUT, _KEPT)[-1]
    for (fields, options), measured in zip(_KEPT, kept, strict=True):
        two, four = (
            training_memory(
                LongNetConfig.preset("tiny", num_hidden_layers=layers, **_CUT, **fields),
                tokens=1023 * ranks, sequences=2, sp=ranks, **options,
            )
            for layers in (2, 4)
        )  # fmt: skip
        estimate = four.activations - two.activations + four.halo - two.halo
        assert (four.halo > two.halo) == (ranks > 1 and not options.get("checkpoint_activations"))
        assert estimate == pytest.approx(measured, rel=0.02), (fields, options)


def test_a_rank_holds_what_was_estimated(tmp_path, monkeypatch):
    """Peak memory of two ranks with FSDP2 and half of each sequence."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    for held in run_ranks("parallel_checks:held_bytes", 2, tmp_path, _CUT, _HELD):
        for (fields, options), measured in zip(_HELD, held, strict=True):
            config = LongNetConfig.preset("tiny", **_CUT, **fields)
            estimate = training_memory(config, tokens=1022, sequences=2, sp=2, **options)
            assert estimate.total == pytest.approx(measured, rel=0.25), (fields, options)


def test_shares_and_slices():
    """What a rank holds by arithmetic: shares of dp × sp ranks, slices of sp, a halo that ceases to grow."""
    config = LongNetConfig.preset("tiny", **_CUT)
    total = 4 * count_parameters(config).total
    one = training_memory(config, tokens=8192, sequences=1)
    assert (one.weights, one.gradients, one.optimizer, one.gathered, one.halo) == (total, total, 2 * total, 0, 0)
    four = training_memory(config, tokens=8192, sequences=1, dp=2, sp=2)
    assert (four.weights, four.gradients, four.optimizer) == (total // 4, total // 4, total // 2)
    assert four.activations == one.activations // 2
    assert four.gathered == training_memory(config, tokens=8192, sequences=1, dp=4).gathered > 0
    assert four.halo == training_memory(config, tokens=8 * 8192, sequences=1, sp=16).halo > 0
    # A halo of 64 + 64 + 256 rows in 4 heads of 16 channels: in two layers keys and values, in one their gradients,
    # and both as they travel, float32.
    assert four.halo == (64 + 64 + 256) * (2 + 3) * 2 * 4 * 16 * 4
    dense = LongNetConfig.preset("tiny", attn_implementation="sdpa", max_position_embeddings=2048)
    with pytest.raises(ValueError, match='not "sdpa": set sp to 1'):
        training_memory(dense, tokens=64, sequences=1, sp=2)


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    config = LongNetConfig.preset("tiny", **_CUT)
    for options in ({}, {"sp": 8}, {"dp": 2, "sp": 3, "bfloat16": True, "checkpoint_activations": True}):
        tokens = longest_sequence(config, memory=10**9, sequences=2, **options)
        assert training_memory(config, tokens=tokens, sequences=2, **options).total <= 10**9
        assert training_memory(config, tokens=tokens + 1, sequences=2, **options).total > 10**9
    assert longest_sequence(config, memory=10**6, sequences=1) == 0


@pytest.mark.parametrize(("preset", "column"), [("125m", 1), ("2.7b", 2)])
def test_the_lengths_of_the_documentation_are_the_function_s(preset, column):
    text = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    rows = re.findall(r"^\| (1|8|64) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 8, 64]
    config = LongNetConfig.preset(preset)
    for row in rows:
        tokens = longest_sequence(
            config, memory=80 * 2**30, sequences=1, bfloat16=True, checkpoint_activations=True, sp=int(row[0])
        )
        assert f"{tokens:,}" == row[column]


def test_parameters_are_those_of_the_model():
    for fields in ({}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2, "attention_bias": False}):
        config = LongNetConfig.preset("tiny", **fields)
        model = LongNetForCausalLM(config)
        counted = count_parameters(config)
        assert counted.total == model.num_parameters()
        assert counted.total - counted.embedding == sum(
            weight.numel() for name, weight in model.named_parameters() if "embed" not in name and "lm_head" not in name
        )
    llama = LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    assert count_parameters(llama).total == LlamaForCausalLM(llama).num_parameters()
    assert count_parameters(GPT2Config(n_layer=1)).embedding == 50257 * 768


def test_the_papers_sizes_have_the_papers_parameters():
    # Their names count a vocabulary half as large.
    for name, parameters in (("125m", 125e6), ("350m", 350e6), ("760m", 760e6), ("2.7b", 2.7e9)):
        config = LongNetConfig.preset(name, vocab_size=50_304)
        assert count_parameters(config).total == pytest.approx(parameters, rel=0.04)


def test_caches():
    config = LongNetConfig.preset("tiny", segment_lengths=(16, 64), dilation_rates=(1, 4))
    # Keys and values, 2 layers, 4 heads of 16, 4 bytes; the state keeps 16 + 16 rows.
    row = 2 * 2 * 4 * 16 * 4
    assert cache_bytes(config, tokens=1000) == {"dense": row * 1000, "dilated": row * 32}
    assert cache_bytes(config, tokens=1000, bytes_per_value=2)["dense"] == row * 500
