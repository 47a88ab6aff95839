"""Lines of metrics, TensorBoard, the screen, the figures of the machine."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longnet.training import metrics as module
from longnet.training.loop import train
from longnet.training.metrics import Metrics, Screen, describe, peak_flops

ROW = {"loss": 1.25, "lr": 3e-4, "gradient_norm": 0.5, "tokens_per_s": 12345.0, "mfu": 0.251, "memory": 2**30}


def written(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_past_the_step_and_halves_are_cut_away(tmp_path):
    first = Metrics(tmp_path, step=0, tensorboard=False)
    for step in (1, 2, 3):
        first.write("train", step, loss=0.1)
    first.write("evaluate", 2, contexts=[])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')  # as a kill leaves it
    again = Metrics(tmp_path, step=2, tensorboard=False)
    assert [row["step"] for row in written(tmp_path)] == [1, 2]
    assert again.has("train", 2)
    assert not again.has("evaluate", 2)
    again.write("train", 3, loss=0.2)
    assert [row["step"] for row in written(tmp_path)] == [1, 2, 3]
    again.close()
    Metrics(tmp_path, step=0, tensorboard=False).close()
    assert written(tmp_path) == []


def test_a_full_disk_is_told_once(tmp_path):
    metrics = Metrics(tmp_path, step=0, tensorboard=False)
    metrics.close()
    told = r"cannot write .*metrics.jsonl: No space left on device; make room and resume"
    with Path("/dev/full").open("ab", buffering=0) as metrics._file, pytest.raises(OSError, match=told):
        metrics.write("train", 1, loss=1.0)


def test_what_is_no_number_is_no_metric(tmp_path):
    metrics = Metrics(tmp_path, step=0, tensorboard=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.write("train", 1, loss=float("nan"))
    metrics.close()
    assert written(tmp_path) == []


def test_tensorboard_has_the_same_values(make_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # slow

    recipe = make_recipe(train={"tensorboard": True, "steps": 4}, sample={"every": 4, "tokens": 2})
    train(recipe, tmp_path / "RUN", progress=False)
    events = EventAccumulator(str(tmp_path / "RUN" / "tensorboard")).Reload()
    told = [row["loss"] for row in written(tmp_path / "RUN") if row["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(told)
    assert [event.step for event in events.Scalars("evaluate/perplexity/32")] == [4]


def test_lines_where_there_is_no_terminal(make_recipe, tmp_path, capsys):
    train(make_recipe(train={"steps": 4, "log_every": 2}, sample={"every": 4, "tokens": 2}), tmp_path / "RUN")
    shown = capsys.readouterr().out.splitlines()
    assert "parameters, attention dilated, 4 steps of 4 × 32 tokens, float32 on cpu" in shown[0]
    assert re.match(r"step 2/4  \d+:\d\d left  loss ", shown[1])
    for words in ("tokens/s", "MFU", "GiB", "left"):
        assert words in shown[1]
    assert shown[3].startswith("step 4  perplexity by context  8: ")
    assert shown[4].startswith("step 4  sample  '' → ")
    train(make_recipe(), tmp_path / "quiet", progress=False)
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(module, "Console", functools.partial(Console, force_terminal=True, width=120))
    with Screen(steps=10, step=2, wanted=True) as screen:
        screen.show(5, describe(ROW, 3725))
        screen.advance(6)
        screen.warn("something")
    shown = capsys.readouterr().out
    assert "6/10" in shown
    assert "1:02:05 left  loss 1.2500  lr 3.00e-04  gradient 0.50  12,345 tokens/s  MFU 25.1%  1.00 GiB" in shown
    assert "longnet: warning: something" in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_keeps_step_and_time_left(width, monkeypatch, capsys):
    monkeypatch.setattr(module, "Console", functools.partial(Console, force_terminal=True, width=width))
    with Screen(steps=100_000, step=2, wanted=True) as screen:
        screen.show(12_345, describe(ROW, 3725))
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line).strip("\r") for line in capsys.readouterr().out.splitlines()]
    (last,) = [line for line in lines if "12345/100000" in line][-1:]
    assert "1:02:05 left" in last
    assert len(last) <= width


def test_figures_that_there_are_not():
    assert "loss none" in describe({**ROW, "loss": None}, 1)
    assert "MFU n/a" in describe({**ROW, "mfu": None}, 1)
    assert "gradient none" in describe({**ROW, "gradient_norm": None}, 1)


def test_the_machine_has_a_speed():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert peak_flops(torch.device("cpu"), torch.bool) is None
