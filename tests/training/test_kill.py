"""Killed at any instant and resumed, a run gives the bits of one that never was."""

import multiprocessing
import random
import signal
import subprocess
import sys
import time

import pytest

from longnet.data.shards import TokenData
from longnet.training.config import to_toml
from longnet.training.loop import train
from training.runs import checkpoints, lines, tensors

STEPS = 40


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported; torch has computed nothing in their parent, which is no run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longnet.training.loop", "transformers.models.auto.tokenization_auto"])
    return context


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(
        train={"steps": STEPS, "log_every": 2}, checkpoint={"every": 3, "keep": 2},
        evaluate={"every": 8}, sample={"every": 16, "tokens": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(processes, recipe, tmp_path_factory):
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "RUN"
    process = start(processes, recipe, run)
    process.join()
    assert process.exitcode == 0
    return run


def start(context, recipe, run):
    process = context.Process(target=train, args=(recipe, run), kwargs={"resume": True, "progress": False})
    process.start()
    return process


def kill_often(context, recipe, run, kills, seed):
    """Kill and resume; return how often the kill met a checkpoint half-written."""
    draw = random.Random(seed)
    half_written = done = 0
    while done < kills:
        process = start(context, recipe, run)
        before = time.monotonic()
        if done % 2:  # inside a checkpoint: a moment after its folder has appeared
            wanted = draw.randint(1, 3)
            seen = set()
            while process.is_alive() and len(seen) < wanted:
                seen |= {path.name for path in run.glob("checkpoints/*.partial")}
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.02))
        else:
            while process.is_alive() and not (run / "lock").exists():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.6))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break  # it came to its end first
        assert process.exitcode == -signal.SIGKILL
        assert time.monotonic() - before < 60
        half_written += any(run.glob("checkpoints/*.partial"))
        done += 1
    process = start(context, recipe, run)
    process.join()
    assert process.exitcode == 0
    return done, half_written


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.deep)])
def test_killed_and_resumed_is_bit_identical(processes, recipe, whole, tmp_path, kills):
    expected, weights = lines(whole), tensors(whole / "checkpoints" / f"step-{STEPS:08d}")
    assert sum(line["kind"] == "train" for line in expected) == STEPS // 2
    done = half_written = 0
    for seed in range(kills):
        run = tmp_path / f"killed-{seed}"
        killed, hit = kill_often(processes, recipe, run, min(10, kills - done), seed)
        done, half_written = done + killed, half_written + hit
        assert lines(run) == expected
        assert tensors(run / "checkpoints" / f"step-{STEPS:08d}") == weights
        assert checkpoints(run) == checkpoints(whole)
        if done >= kills:
            break
    assert done >= kills
    assert half_written


def test_the_command_stops_on_a_signal_and_resumes(processes, recipe, whole, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        "from longnet.cli.main import main; main()",
        "train",
        whole / "recipe.toml",
        "-o",
        run,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(run.glob("checkpoints/step-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after step " in printed
    stopped_at = int(printed.rpartition("after step ")[2].partition(",")[0])
    assert 3 <= stopped_at < STEPS
    assert f"step-{stopped_at:08d}" in checkpoints(run)
    process = start(processes, recipe, run)
    process.join()
    assert process.exitcode == 0
    assert lines(run) == lines(whole)


# A checkpoint whose writing takes tensors and frees them, for so long, as that of a large model does.
SLOWLY = """
import sys, time, torch
from pathlib import Path
from longnet.training import checkpoint, loop

def save(seconds):
    print("saving", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held = [torch.ones(200_000) for _ in range(8)]
        del held
    print("saved", flush=True)
    return Path("x")
"""


def test_a_process_that_ends_while_it_saves_does_not_abort():
    """It did, with status -6: the thread outlived Python."""
    script = SLOWLY + "checkpoint.Saving().start(lambda: save(0.5))\ntime.sleep(0.05)\nraise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "saving\nsaved\n"), done.stderr


def test_a_wait_for_a_checkpoint_that_is_interrupted_does_not_abort_the_process():
    """It did, with status -6, or never ended: Python 3.11 took the thread for one that had ended."""
    script = SLOWLY + "import os, signal, threading\nsaving = checkpoint.Saving()\nsaving.start(lambda: save(3))\n"
    script += "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    script += "try:\n    saving.wait()\nexcept KeyboardInterrupt:\n    raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "saving\nsaved\n"), done.stderr


@pytest.fixture
def saving(recipe, tmp_path):
    """Starts a run whose first checkpoint takes so many seconds, and waits until it is being written."""
    begun: list[subprocess.Popen[str]] = []

    def begin(seconds):
        (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolve(TokenData.open(recipe.data.path))))
        script = f"{SLOWLY}loop.save_checkpoint = lambda *_, **__: save({seconds})\n"
        script += "from longnet.cli.main import main\nmain()"
        command = [sys.executable, "-c", script, "train", tmp_path / "recipe.toml", "-o", tmp_path / "run"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "saving\n":
            assert line
        return process

    yield begin
    for process in begun:  # of a test that failed
        process.kill()
        process.communicate()


def test_one_request_to_stop_that_comes_in_two_ways_waits_for_the_checkpoint(saving):
    """A scheduler tells every process of a job, and torchrun, which it told, tells its workers."""
    process = saving(2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "saved" in printed
    assert "stopped by SIGTERM after step " in printed


def test_a_second_signal_while_saving_ends_the_command_at_once(saving):
    process = saving(60)
    process.send_signal(signal.SIGINT)
    for _ in range(40):  # on a busy machine two that come together may be taken for one
        time.sleep(0.7)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "stopped at once" in printed or "stopped by Ctrl-C" in errors  # a third may come before that is said
    assert "saved" not in printed
