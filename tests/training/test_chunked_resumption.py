"""A step in chunks that is killed, stopped or out of disk goes on where it was, to the same bits."""

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from cases import DEVICES
from longnet import DilationPattern
from longnet.data.loader import Windows
from longnet.training import chunked, row_log
from longnet.training.chunked import ChunkedStep
from longnet.training.loop import train
from training.runs import lines, tensors
from training.steps import assert_same, gradients, learn_to_the_end, longnet_model, reader_of, tokens_of, whole


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.steps"])
    return context


def learn(context, folder, *, device="cpu", kill_after=None, delay=0.0):
    """Return whether the step came to its end, and whether the kill met it learning."""
    folder.mkdir(exist_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=learn_to_the_end, args=(folder, sender, device))
    process.start()
    sender.close()
    is_learning, count = None, 0
    try:
        while count != kill_after:
            is_learning, count = receiver.recv(), count + 1
        time.sleep(delay)
        process.kill()
    except EOFError:  # it has ended
        pass
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0, is_learning


RANDOM = random.Random(0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kills", [(10, 25), pytest.param([RANDOM.randint(1, 12) for _ in range(20)], marks=pytest.mark.deep)]
)
def test_a_step_killed_at_any_instant_goes_on_to_the_same_bits(processes, kills, tmp_path, device):
    assert learn(processes, tmp_path / "through", device=device)[0]
    expected = torch.load(tmp_path / "through" / "result.pt", map_location="cpu")
    killed, passes, kills = tmp_path / "killed", set(), list(kills)

    def compare():
        found = torch.load(killed / "result.pt", map_location="cpu")
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys()
        assert all(torch.equal(gradient, found[1][name]) for name, gradient in expected[1].items())
        shutil.rmtree(killed)

    while kills:
        is_done, is_learning = learn(processes, killed, device=device, kill_after=kills[0], delay=RANDOM.random() / 20)
        if is_done:
            compare()
        else:
            kills.pop(0)
            passes.add(is_learning)
    assert learn(processes, killed, device=device)[0]
    compare()
    assert passes == {False, True}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("longest", [96, 512])  # of the segments: spans of 4 chunks, and of all
def test_a_step_whose_log_is_lost_reads_anew_and_goes_on_to_the_same_bits(longest, device, tmp_path):
    model = longnet_model(DilationPattern((8, 32, longest), (1, 4, 16)), hidden_dropout=0.1, device=device).float()
    ids, targets = tokens_of(2, 300)

    def go_on(folder, chunks=None, *, saves=True):
        """Go on from what the folder holds, and no gradient; return the shares of the work done."""
        model.zero_grad(set_to_none=True)
        with ChunkedStep(
            model, reader_of(ids, targets), sequences=2, tokens=300, chunk_tokens=24, items=450, parts=2, seed=(1, 2),
            folder=folder,
        ) as step:  # fmt: skip
            shares = [progress.share for progress in itertools.islice(step, chunks)]
            if saves:
                step.save()
            return step, shares

    def lose(folder, share):
        for log in folder.glob("rows-*.log"):
            os.truncate(log, int(share * log.stat().st_size)) if share else log.unlink()

    through, shares = go_on(tmp_path / "through")
    expected, reread = gradients(model), set()
    for count in range(1, len(shares) + 1, 3):
        folder = tmp_path / str(count)
        go_on(folder, count)
        lose(folder, share=0.5)
        _, again = go_on(folder, 2)
        reread.add(bool(again) and again[0] <= shares[count - 1])
        lose(folder, share=0)
        go_on(folder, 3, saves=False)
        for log in folder.glob("rows-*.log"):  # no save has put these rows on the disk, which fails now
            log.write_bytes(bytes(log.stat().st_size))
        step, rest = go_on(folder)
        assert rest == sorted(rest)
        assert step.loss == through.loss
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items()), count
    assert reread == {False, True}


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    model = longnet_model()
    ids, targets = tokens_of(1, 101)
    expected = whole(model, ids, targets)
    items = int((targets != -100).sum())

    def step():
        return ChunkedStep(
            model, reader_of(ids, targets), sequences=1, tokens=101,
            chunk_tokens=10, items=items, folder=tmp_path / "step",
        )  # fmt: skip

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with step() as first:
        progress = iter(first)
        for _ in range(4):
            next(progress)
        first.save()
        monkeypatch.setattr(row_log.os, "pwrite", full)
        with pytest.raises(OSError, match=r"cannot write .*rows-0-0.log: No space left on device; make"):
            next(progress)
    monkeypatch.undo()
    with step() as second:
        assert second.done == 4
        for _ in second:
            pass
    assert_same(model, second.loss, expected)
    monkeypatch.setattr(chunked.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    second.discard()
    with pytest.raises(ValueError, match=r"takes .* GB, and .* has 1e-06 GB: make room, or take longer chunks"):
        step()
    monkeypatch.undo()
    with step() as third:
        for _ in itertools.islice(third, 15):  # 10 chunks are read, and 5 of 11 learned from
            pass
        third.save()
    (log,) = (tmp_path / "step").glob("rows-*.log")
    whole_log = log.stat().st_size
    monkeypatch.setattr(chunked.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert step().reread == 0  # all of it lies there
    log.unlink()
    with pytest.raises(ValueError, match=r"has 0 GB: make room$"):
        step()
    monkeypatch.setattr(chunked.shutil, "disk_usage", lambda _: SimpleNamespace(free=whole_log - 1))
    assert step().reread == 5


def test_a_step_of_other_weights_is_not_continued_and_deleted_only_once_it_counts(tmp_path):
    model = longnet_model()
    ids, targets = tokens_of(1, 101)

    def step(chunk_tokens=10, number=0):
        return ChunkedStep(
            model, reader_of(ids, targets), sequences=1, tokens=101, chunk_tokens=chunk_tokens, items=101,
            folder=tmp_path / "step", about={"step": number}, is_over=lambda about: about["step"] < number,
        )  # fmt: skip

    with step() as first:
        for _ in first:
            first.save()
    with step() as same:
        assert same.done == len(same.schedule)
        assert same.loss == first.loss
    with pytest.raises(ValueError, match=r"step holds part of another step, of other chunk: go on with it as it was"):
        step(chunk_tokens=20)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    held = sorted((tmp_path / "step").iterdir())
    with pytest.raises(ValueError, match=r"step holds part of another step, of other weights: go on with it"):
        step()
    assert sorted((tmp_path / "step").iterdir()) == held
    with step(number=1) as other:
        assert other.done == 0
    assert not list((tmp_path / "step").iterdir())


@pytest.mark.parametrize(("at_step", "is_lost", "chunks"), [(0, False, 0), (2, False, 0), (2, True, 3)])
def test_a_signal_stops_a_run_within_a_step_and_it_goes_on_to_the_same_bits(
    make_recipe, tmp_path, monkeypatch, at_step, is_lost, chunks, capsys
):
    recipe = make_recipe(train={"steps": 4, "chunk_tokens": 5, "accumulate": 2, "log_every": 1})
    train(recipe, tmp_path / "through", progress=False)
    real, calls = Windows.batch, []

    def interrupt(windows, number, sequences, **keywords):
        calls.append((number, keywords))
        if sum(step == at_step for step, _ in calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return real(windows, number, sequences, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", interrupt)
        summary = train(recipe, tmp_path / "stopped")
    assert (summary.step, summary.stopped_by) == (at_step, signal.SIGINT)
    assert f"step {at_step + 1}/4  " in capsys.readouterr().out
    if is_lost:
        next((tmp_path / "stopped/step").rglob("rows-*.log")).unlink()
    before = len(calls)
    monkeypatch.setattr(Windows, "batch", interrupt)
    summary = train(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert (summary.step, summary.stopped_by) == (4, None)
    again = [step for step, _ in calls[before:]]
    assert again.count(at_step) == again.count(3) - 9 + chunks  # the chunks before are not computed again
    warned = f"the log of step {at_step + 1} is missing or too short: {chunks} chunks are read anew"
    assert (warned in capsys.readouterr().err) == is_lost
    assert lines(tmp_path / "stopped") == lines(tmp_path / "through")
    assert tensors(summary.model_folder) == tensors(tmp_path / "through/checkpoints/step-00000004")
