import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longnet.data.tokenizer import load_tokenizer
from longnet.evaluation.record import Evaluation


def test_evaluation_of_a_run(call, run_folder, words, tmp_path, capsys):
    report = tmp_path / "report.html"
    status = call(
        "evaluate", run_folder, words, "--contexts", "16,64,128", "--tokens", "1024", "--passkey",
        "--distances", "48,128", "--trials", "3", "-o", tmp_path / "out", "--report", report,
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    evaluation = Evaluation.from_json((tmp_path / "out" / "evaluation.json").read_text())
    assert [result.context for result in evaluation.contexts] == [16, 64, 128]
    assert evaluation.training_length == 64
    assert evaluation.attention == "dilated"
    assert [result.distance for result in evaluation.passkey] == [48, 128]
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [part["beyond_training"] for part in row["contexts"]] == [False, False, True]
    for part in row["contexts"]:
        assert f"{part['perplexity']:.3f}" in printed
        assert f"{part['bits_per_byte']:.4f}" in printed
    assert "Contexts of 128 are longer than the training sequences of 64" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json", "perplexity.svg", "difference.svg", "position.svg", "passkey.svg", "gain.svg",
    }  # fmt: skip

    page = report.read_text()
    assert not re.search(r"<script|<link|https?:|src=\"(?!data:)|href=(?!\"#)", page)
    assert page.count("data:image/png;base64,") == 1  # the pattern
    assert page.count("<svg ") == 6  # perplexity, difference, by position, pass keys, their gain, training
    assert '<p class="headline">With 64 of context in place of 16, perplexity on the same tokens is' in page
    for word in (
        f"{row['contexts'][2]['perplexity']:.3f}",
        "A sample",
        "Recipe",
        "3 steps, 384 tokens",
        "has seen 384 tokens",
    ):
        assert word in page


def test_a_checkpoint_and_another_attention(call, run_folder, words, tmp_path, capsys):
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    same, dense = tmp_path / "same", tmp_path / "dense"
    arguments = (checkpoint, words, "--contexts", "64", "--tokens", "512", "-o")
    assert call("evaluate", *arguments, same) == 0
    assert call("evaluate", *arguments, dense, "--attention", "sdpa") == 0
    rows = [Evaluation.from_json((folder / "evaluation.json").read_text()) for folder in (same, dense)]
    assert [row.attention for row in rows] == ["dilated", "sdpa"]
    assert rows[0].contexts[0].loss != rows[1].contexts[0].loss
    assert rows[0].training_length == 64


def test_contexts_come_from_the_training_length(call, run_folder, words, capsys):
    assert call("evaluate", run_folder, words, "--tokens", "128") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if re.match(r" +\d", line)] == ["8", "32", "64"]


@pytest.fixture
def llama(tmp_path):
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_any_causal_model_of_hugging_face(call, llama, words, tmp_path, capsys):
    assert (
        call("evaluate", llama, words, "--contexts", "32,64", "--tokens", "256", "--report", tmp_path / "r.html") == 0
    )
    assert "unknown" in capsys.readouterr().out  # how long its training sequences were
    load_tokenizer("bytes").save_pretrained(llama)
    assert call("evaluate", llama, words, "--contexts", "32", "--tokens", "64") == 0


def test_mistakes_are_one_line(call, run_folder, words, llama, tmp_path, capsys):
    larger = tmp_path / "larger"
    shutil.copytree(llama, larger)
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(["token"])
    tokenizer.save_pretrained(larger)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(258)
    model.save_pretrained(larger)
    small = tmp_path / "small"
    model.resize_token_embeddings(100)
    model.save_pretrained(small)
    model.resize_token_embeddings(1000)
    model.save_pretrained(tmp_path / "huge")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "longnet"}')
    cases = [
        ((tmp_path / "nowhere", words), "there is no folder"),
        ((tmp_path / "empty", words), "holds no model: give the folder of a run that has written a checkpoint"),
        ((tmp_path / "broken", words), "cannot be loaded: "),
        ((run_folder, tmp_path / "empty"), "holds no index.json"),
        ((larger, words, "--contexts", "8"), "differ: prepare the data with the model's tokenizer"),
        (
            (small, words, "--contexts", "8"),
            "has a vocabulary of 257 tokens, the model one of 100: prepare the data with",
        ),
        ((tmp_path / "huge", words, "--contexts", "8"), "holds no tokenizer that would show that they belong together"),
        ((run_folder, words, "--contexts", "64,1024K"), "needs 1,048,577 validation tokens, and there are"),
        ((run_folder, words, "--contexts", "48,64"), "each context must divide the longest, 64"),
        (
            (run_folder, words, "--contexts", "long"),
            "--contexts must be a list of integers, like 512,2048,8K, got long",
        ),
        ((run_folder, words, "--contexts", "0,64"), "--contexts must be at least 1, got 0"),
        ((run_folder, words, "--passkey", "--distances", "5"), "a passkey distance must be at least"),
        ((run_folder, words, "--tokens", "0"), "--tokens must be at least 1"),
        ((run_folder, words, "--device", "cuda"), "torch finds no GPU"),
        ((run_folder, words, "--device", "tpu"), "--device must be auto, cpu or cuda"),
        ((run_folder, words, "--attention", "sparse_fixed"), 'attn_implementation="sparse_fixed" needs a pattern'),
        ((run_folder, words, "--attention", "nonsense"), "there is no attention 'nonsense': choose one of dilated, "),
        ((llama, words), "give --contexts"),
        ((llama, words, "--contexts", "8", "--attention", "dilated"), 'attn_implementation="dilated" needs a pattern'),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert call("evaluate", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert error.startswith("longnet: ")
        assert error.count("\n") == 1, error
