"""The backend of a model's attention: its names, and what is said where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import longnet
from longnet import DilationPattern
from longnet.cli.main import main
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.patterns import backend_of, kind_of
from training.conftest import write_data

CONFIG = LongNetConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, segment_lengths=(8,), dilation_rates=(1,)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "DATA", seed=0)


def test_interpreted():
    """What interpreted.py tests, since the interpreter is chosen once a process."""
    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    file = Path(__file__).with_name("interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file],
        check=False, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_a_backend_is_chosen_at_loading_and_not_saved(tmp_path):
    LongNetForCausalLM(CONFIG).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated_triton")
    assert (kind_of(model.config), backend_of(model.config)) == ("dilated", "triton")
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (kind_of(model.config), backend_of(model.config)) == ("dilated", "auto")


def test_where_it_cannot_run_the_first_pass_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = LongNetForCausalLM(CONFIG)
    model.set_attn_implementation("dilated_triton")
    for options in ({"use_cache": False}, {"use_cache": True}):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r'cannot run on torch.float32.*Take "auto" \(models: "dil'),
        ):
            model.eval()(torch.ones(1, 4, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("backend", "reason"), [("tritton", "which is none"), ("reference", "which serves no models")], ids=str
)
def test_a_backend_that_models_do_not_have(backend, reason):
    with pytest.raises(
        ValueError, match=f'^backend must be "auto" or "triton" for a model, got \'{backend}\', {reason}'
    ):
        longnet.use_dilated_attention(LongNetForCausalLM(CONFIG), DilationPattern((8,), (1,)), backend=backend)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.backend", "triton"], "runs on CUDA, not on cpu"),
        (["--train.backend", "tritton"], "tritton"),
        (["--train.backend", "triton", "--model.attention", "sdpa"], "is one of model.attention = 'dilated'"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_have_it_is_one_line(flags, said, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        sys, "argv",
        ["longnet", "train", "demo", "--data.path", str(folder), "-o", str(tmp_path / "run"),
         "--train.device", "cpu", *flags],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()
