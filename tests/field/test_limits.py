"""Errors of other kinds: one line, status 2, what to do.

| source | instance | right value |
|---|---|---|
| huggingface/evaluate#532 | positions beyond a GPT-2's table: IndexError | one line that names the table |
| tried here | all of validation is `<unk>`: ZeroDivisionError | one line before the training |
| tried here | `stream` of one token: IndexError | one line |
| tried here | an id in a shard that the vocabulary does not have: IndexError | one line that names the shard |
| tried here | `info` of a configuration nested 100,000 deep: RecursionError | one line |
| tried here | a LongNet's configuration that says llama: a traceback of huggingface_hub | one line |
| tried here | more memory than there is: a traceback | one line |
| tried here | generate() of a prompt of 4.8 MB: 10.6 GB, in one piece | in parts of 8,192: tests/model/test_cache.py |
| tried here | a LongNet beyond max_position_embeddings: a "friendly reminder", or no text by default | neither |
| tried here | workers, ranks, layers, widths, batches beyond any memory: killed | one line, before the work |
| tried here | learned positions, xPos of one centre: an error after the text had begun | before it |
"""

import json
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.cli.model import load_model
from longnet.data.tokenizer import load_tokenizer
from longnet.model.budget import count_parameters


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("longnet: "), error
    assert error.count("\n") == 1, error
    return error


def test_positions_beyond_a_table(call, words, tmp_path, capsys):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_head=2, n_layer=1, n_positions=64, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer("bytes").save_pretrained(tmp_path / "gpt2")
    said = "GPT2LMHeadModel knows 64 positions, those of its table transformer.wpe, and not {}: give fewer tokens"
    assert call("evaluate", tmp_path / "gpt2", words, "--contexts", "64", "--tokens", "64") == 0
    capsys.readouterr()
    assert call("evaluate", tmp_path / "gpt2", words, "--contexts", "64,128") == 2
    assert said.format(128) in one_line(capsys)
    assert call("evaluate", tmp_path / "gpt2", words, "--contexts", "64", "--passkey", "--distances", "100") == 2
    assert "knows 64 positions" in one_line(capsys)
    assert call("generate", tmp_path / "gpt2", "--prompt", "a" * 60, "-n", "5") == 0
    capsys.readouterr()
    assert call("generate", tmp_path / "gpt2", "--prompt", "a" * 60, "-n", "6") == 2
    assert said.format(65) in one_line(capsys)


@pytest.mark.parametrize("position_embedding", ["rope", "none", "sinusoidal", "xpos", "learned"])
@pytest.mark.parametrize("attention", ["dilated", "sdpa"])
def test_a_longnet_beyond_max_position_embeddings(call, tmp_path, capsys, monkeypatch, position_embedding, attention):
    """Nothing limits but a table, and xPos of one centre; transformers' reminder says otherwise."""
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, segment_lengths=(8, 16),
        dilation_rates=(1, 2), position_embedding=position_embedding, max_position_embeddings=16, xpos_scale_base=4.0,
    )  # fmt: skip
    model = LongNetForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    reminded, logger = [], logging.getLogger("transformers.generation.stopping_criteria")
    monkeypatch.setattr(logger, "warning_once", reminded.append, raising=False)
    call_of = ("generate", tmp_path / "model", "-n", "3", "--attention", attention, "--prompt")
    limited = position_embedding == "learned" or (position_embedding == "xpos" and attention == "sdpa")
    assert call(*call_of, "a" * 200) == (2 if limited else 0)
    if limited:
        said = {"learned": "LongNetForCausalLM knows 16 positions", "xpos": "xPos with xpos_scale_base=4.0 overflows"}
        assert said[position_embedding] in one_line(capsys)
    elif attention == "dilated":
        model.generation_config.eos_token_id = None
        with pytest.warns(UserWarning, match="model-agnostic default"):
            assert model.generate(torch.ones(1, 60, dtype=torch.long)).shape == (1, 80)  # 20 more by default
    assert not reminded


def test_a_validation_split_of_unknown_words(call, tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("strange words " * 50)
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    options = ("--tokenizer", tmp_path / "tokenizer.json", "--validation", "0.5")
    assert call("prepare", *files, "-o", tmp_path / "data", *options) == 0
    (tmp_path / "recipe.toml").write_text(f"[data]\npath = '{tmp_path / 'data'}'\n[train]\nsteps = 1\ntokens = 16\n")
    capsys.readouterr()
    assert call("train", tmp_path / "recipe.toml", "-o", tmp_path / "run", "--model.preset", "tiny") == 2
    assert "stand for no text" in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory(call, run_folder, words, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(load_model(run_folder, torch.device("cpu")).model), "forward", fail)
    monkeypatch.setattr("longnet.evaluation.scoring.refuse_sight_of_later_tokens", lambda _: None)
    assert call("evaluate", run_folder, words, "--contexts", "16") == 2
    assert "out of memory: give fewer tokens at a time" in one_line(capsys)


def test_two_tokens(call, run_folder, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a")  # and the end of a document
    assert call("stream", run_folder, tmp_path / "one.txt", "-o", tmp_path / "out") == 0
    assert "loss" in capsys.readouterr().out


def test_an_id_that_the_vocabulary_does_not_have(call, run_folder, words, tmp_path, capsys):
    shutil.copytree(words, tmp_path / "data")
    shard = tmp_path / "data" / "validation-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-200:] = b"\xff" * 200
    shard.write_bytes(content)
    assert call("evaluate", run_folder, tmp_path / "data", "--contexts", "64") == 2
    said = f"{shard} is damaged: it holds id 65,535 in a vocabulary of 257 tokens"
    assert said in one_line(capsys)


@pytest.mark.parametrize("key", ["tokens", "bytes", "documents"])
@pytest.mark.parametrize("value", ["x", 1.5, -3, None, True])
def test_an_index_with_something_else_for_a_number(call, words, tmp_path, capsys, key, value):
    shutil.copytree(words, tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    index["splits"]["validation"][key] = value
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    assert call("info", tmp_path / "data") == 2
    assert "index.json is damaged" in one_line(capsys)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"model_type": "llama", "initializer_range": null}'])
def test_a_configuration_that_a_library_stumbles_over(call, tmp_path, capsys, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    assert call("info", tmp_path / "model") == 2
    assert f"the model in {tmp_path / 'model'} cannot be loaded" in one_line(capsys)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("prepare x.txt -o out --workers 1000000000", "--workers 1,000,000,000 needs at least"),
        ("bench distributed -o out --ranks 1000000000", "--ranks 1,000,000,000 needs at least"),
        ("train RECIPE -o out --model.num_hidden_layers 1000000000", "the model, which begins on the CPU, needs at"),
        ("train RECIPE -o out --model.intermediate_size 100000000000", "the model, which begins on the CPU, needs at"),
        ("train RECIPE -o out --train.batch_sequences 10000000000", "training (weights, gradients, Adam, the layers'"),
    ],
)
def test_what_no_memory_holds_is_refused_before_the_work(call, run_folder, tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text")
    places = {"RECIPE": run_folder / "recipe.toml"}
    assert call(*(places.get(word, word) for word in typed.split())) == 2
    assert one_line(capsys).startswith(f"longnet: {said}")
    assert not (tmp_path / "out").exists()


def test_the_count_of_layers_that_are_not_built():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50, "segment_lengths": (8,),
             "dilation_rates": (1,), "position_embedding": "none"}  # fmt: skip
    for layers in (1, 2, 5):
        config = LongNetConfig(num_hidden_layers=layers, **sizes)
        built = LongNetForCausalLM(config)
        assert count_parameters(config).total == sum(weight.numel() for weight in built.parameters())
    assert count_parameters(LongNetConfig(num_hidden_layers=10**12, **sizes)).total > 10**15
