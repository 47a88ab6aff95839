"""Settings that mean something else than they say, and files of the user's that a run would write over.

| source | instance | right value |
|---|---|---|
| tried here | `--contexts "512 64"` scores context 51,264 | one line, status 2 |
| tried here | `evaluate.every = -1` evaluates at every step | one line, status 2 |
| tried here | a warm-up longer than the run never reaches its peak | the last step has the peak, and a line says so |
| tried here | `generate --file` turns CRLF into LF | the bytes of the file |
| tried here | a seed of 2^64; a BOM in a recipe; an empty path | one line, one line or read, one line |
| tried here | `train exp/recipe.toml -o exp` overwrites the recipe, comments lost | one line, and it stays |
| tried here | of two options that contradict each other, or need one another, one is ignored | one line, status 2 |
| tried here | a run folder whose checkpoints were deleted loses its metrics | they are kept beside the new ones |
"""

import dataclasses
import io
import shutil
import sys
from pathlib import Path

import pytest

from longnet.cli.recipe import load_recipe
from longnet.training.config import OptimConfig, Recipe, differences
from longnet.training.loop import train
from longnet.training.optim import learning_rate


@pytest.mark.parametrize("text", ["512 64", "512;64", "64, 32 16", "1e3", "8M", "K", "16.5", "0", "-8"])
def test_lengths_are_what_they_say(call, run_folder, words, capsys, text):
    assert call("evaluate", run_folder, words, "--contexts", text) == 2
    error = capsys.readouterr().err
    assert "contexts" in error
    assert error.count("\n") == 1


FILE = """[data]
path = "{data}"
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
segment_lengths = [16, 64]
dilation_rates = [1, 4]
position_embedding = "rope"
[train]
steps = 2
tokens = 64
batch_sequences = 2
device = "cpu"
"""


@pytest.fixture
def file(words, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(FILE.format(data=words))
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate.every", "-1"], "evaluate.every must be at least 0, got -1"),
        (["--evaluate.tokens", "0"], "evaluate.tokens must be at least 1, got 0"),
        (["--evaluate.batch_tokens", "-5"], "evaluate.batch_tokens must be at least 1"),
        (["--evaluate.contexts", "0"], "evaluate.contexts must be lengths of at least 1 token"),
        (["--train.seed", str(2**64)], "train.seed must be 0 or more and below 2^63"),
        (["--data.path", ""], "--data.path is empty: an unset variable of the shell, perhaps"),
    ],
)
def test_settings_out_of_range(call, file, tmp_path, capsys, flags, message):
    assert call("train", file, "-o", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_a_mark_at_its_begin(file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_recipe(file, kind=Recipe).train.steps == 2


@pytest.mark.parametrize("schedule", ["polynomial", "linear", "cosine", "constant"])
def test_the_peak_is_reached(schedule):
    for warmup, steps in ((750, 300), (10, 10), (10, 11), (0, 1), (3, 1)):
        optim = OptimConfig(lr=1.0, warmup_steps=warmup, schedule=schedule)
        rates = [learning_rate(optim, step, steps) for step in range(steps)]
        assert max(rates) == 1.0
        assert min(rates) > 0


def test_a_warm_up_that_is_cut_short_is_told_and_binds_the_steps(call, file, tmp_path, capsys):
    assert call("train", file, "-o", tmp_path / "run") == 0
    assert "optim.warmup_steps = 750 is longer than the run: all 2 steps warm up" in capsys.readouterr().out
    old = {"train": {"steps": 2}, "optim": {"schedule": "constant", "warmup_steps": 3}}
    assert differences(old, {**old, "train": {"steps": 9}}) == ["train.steps"]
    old["optim"]["warmup_steps"] = 2
    assert differences(old, {**old, "train": {"steps": 9}}) == []


def test_a_prompt_is_what_the_file_holds(call, run_folder, tmp_path, monkeypatch, capsysbinary):
    text = "one\r\ntwo\rthree\n☃".encode()
    (tmp_path / "prompt").write_bytes(text)
    assert call("generate", run_folder, "--file", tmp_path / "prompt", "-n", "1", "--device", "cpu") == 0
    assert capsysbinary.readouterr().out.startswith(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert call("generate", run_folder, "--file", "-", "-n", "1", "--device", "cpu") == 0
    assert capsysbinary.readouterr().out.startswith(text)
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    assert call("generate", run_folder, "--file", tmp_path / "prompt") == 2
    assert b"prompt is not UTF-8 at byte 3" in capsysbinary.readouterr().err
    assert call("generate", run_folder, "--prompt", "a", "--seed", str(2**64)) == 2
    assert b"seed must be 0 or more and below 2^63" in capsysbinary.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "", "data"), ("evaluate", "run", ""), ("generate", "", "--prompt", "a"), ("info", ""),
        ("stream", "", "file"), ("train", "", "-o", "x"),
        ("prepare", "x", "-o", " "), ("generate", "run", "--file", ""), ("evaluate", "a", "b", "-o", ""),
    ],
)  # fmt: skip
def test_an_empty_path_is_not_the_current_folder(call, capsys, arguments):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert "is empty: an unset variable of the shell, perhaps" in error
    assert error.count("\n") == 1


def test_a_recipe_of_the_user_stays(call, file, tmp_path, capsys):
    text = "# what we tried in March\n" + file.read_text()
    file.write_text(text)
    assert call("train", file, "-o", tmp_path) == 2
    assert "recipe.toml is yours, and the run would write its own over it" in capsys.readouterr().err
    assert file.read_text() == text
    assert call("train", file, "-o", "") == 2
    assert "-o is empty: an unset variable of the shell, perhaps" in capsys.readouterr().err
    assert call("train", file, "-o", tmp_path / "run") == 0
    ours = tmp_path / "run" / "recipe.toml"
    noted = "# noted later\n" + ours.read_text()
    ours.write_text(noted)
    assert call("train", ours, "-o", tmp_path / "run", "--resume") == 0
    assert ours.read_text() == noted
    assert call("train", ours, "-o", tmp_path / "run", "--resume", "--evaluate.every", "1") == 2
    assert ours.read_text() == noted


def test_metrics_of_a_run_without_checkpoints_are_kept(recipe, tmp_path):
    train(recipe, tmp_path / "run", progress=False)
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    for number in (1, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        again = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=number))
        train(again, tmp_path / "run", progress=False)
        assert (tmp_path / "run" / "metrics-1.jsonl").read_text() == first
    names = sorted(path.name for path in Path(tmp_path / "run").glob("metrics*"))
    assert names == ["metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl"]


CONTRADICTIONS = [
    ("prepare x.txt -o out --tokenizer bytes --train-bpe 300", "--tokenizer is contradicted by --train-bpe"),
    ("evaluate RUN DATA --contexts 64 --distances 64", "--distances goes with --passkey"),
    ("evaluate RUN DATA --contexts 64 --trials 3", "--trials goes with --passkey"),
    ("generate RUN --prompt a --temperature 0 --top-k 5", "top_k chooses among tokens, and temperature 0"),
    ("generate RUN --prompt a --temperature 0 --top-p 0.5", "top_p chooses among tokens, and temperature 0"),
    ("bench attention --model h100 --quick", "--quick is of measurements"),
    ("bench attention --model h100 -o out", "--output is of measurements"),
    ("bench decode --sizes --quick", "--quick is of measurements"),
    ("info DATA -n 64", "--tokens is of a recipe or a model"),
    ("info long-step --memory 8", "--memory asks for the longest sequence"),
    ("encode x.pth x.h5 --segment-lengths 8 --max-wsi-size 512", "--max-wsi-size makes the segment lengths"),
    ("convert x.txt out --segment-lengths 8 --max-wsi-size 512", "--max-wsi-size makes the segment lengths"),
    ("convert x.txt out --num-heads 0", "--num-heads must be at least 1, got 0"),
    ("convert x.txt out --max-wsi-size 0", "--max-wsi-size must be at least 1, got 0"),
    ("convert x.txt out --no-deepnorm", "--deepnorm is of language models"),
    ("convert x.txt out --sinusoidal", "--sinusoidal is of language models"),
    ("convert x.txt out --kind longvit --tile-size 256", "--tile-size is of other kinds than LongViT"),
    ("convert x.txt out --kind lm --classifier-layers 11", "--classifier-layers is of GigaPath's"),
    ("convert RUN out.pth --num-heads 16", "--num-heads is of torchscale's files"),
    ("convert RUN out.pth --kind lm", "--kind is of torchscale's files"),
]


@pytest.mark.parametrize(("typed", "said"), CONTRADICTIONS)
def test_no_option_wins_silently(call, run_folder, words, tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text")
    places = {"RUN": run_folder, "DATA": words}
    assert call(*(places.get(word, word) for word in typed.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longnet: {said}"), error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
