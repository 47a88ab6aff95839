"""Parameters, FLOPs and memory against what torch counts and what a process holds."""

import json
import os
import subprocess
import sys

import pytest
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.budget import cache_bytes, count_parameters, training_memory

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
from longnet.model.modeling import checkpoint_layers

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
    train({}, 256, {})  # libraries load their parts
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
