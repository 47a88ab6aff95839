import io
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM

from longnet.data.tokenizer import load_tokenizer
from longnet.evaluation.generation import Sampling, generate_text


@pytest.fixture
def expected(run_folder):
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return lambda prompt, **options: generate_text(model, load_tokenizer("bytes"), prompt, Sampling(**options))


def test_text_is_continued(call, run_folder, expected, capsys):
    assert call("generate", run_folder, "--prompt", "segment ", "--tokens", "30", "--seed", "5", "--top-k", "40") == 0
    assert capsys.readouterr().out == f"segment {expected('segment ', tokens=30, seed=5, top_k=40)}\n"


def test_prompts_come_from_files_too(call, run_folder, expected, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("schlüssel → ")
    arguments = ("--tokens", "8", "--temperature", "0")
    text = f"schlüssel → {expected('schlüssel → ', tokens=8, temperature=0)}\n"
    assert call("generate", run_folder, "--file", tmp_path / "prompt.txt", *arguments) == 0
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("schlüssel → ".encode())))
    assert call("generate", run_folder, "--file", "-", *arguments) == 0
    assert capsys.readouterr().out == text


def test_mistakes_are_one_line(call, run_folder, tmp_path, capsys):
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    for path in [*bare.glob("tokenizer*"), bare / "manifest.json", bare / "state.json"]:
        path.unlink()
    cases = [
        ((run_folder,), "give --prompt TEXT or --file FILE"),
        ((run_folder, "--prompt", "a", "--file", "b"), "give --prompt TEXT or --file FILE"),
        ((run_folder, "--file", tmp_path / "none"), "there is no file"),
        ((run_folder, "--prompt", "a", "--tokens", "0"), "tokens must be at least 1"),
        ((run_folder, "--prompt", "a", "--top-p", "2"), "top_p must be above 0"),
        ((tmp_path / "none", "--prompt", "a"), "there is no folder"),
        ((bare, "--prompt", "a"), "holds no Hugging Face tokenizer"),
    ]
    for arguments, message in cases:
        assert call("generate", *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, (arguments, error)
        assert error.count("\n") == 1, error
