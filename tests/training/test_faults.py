"""A rank that is killed, hangs or finds its disk full: the others end, the run folder is whole, the run goes on."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from longnet.training.checkpoint import has_checkpoints, newest_whole
from training.jobs import preloaded, run_agent, write_recipe
from training.runs import checkpoints, lines, tensors
from training.test_parallel import start, told

STEPS = 24
LIMIT = 15  # seconds until a rank counts as hanging; on a slow machine no step may take so long


@pytest.fixture(scope="module")
def context():
    return preloaded()


@pytest.fixture(scope="module")
def recipe(make_recipe, tmp_path_factory):
    """With dropout, so that the random numbers of each rank matter."""
    recipe = make_recipe(
        train={"steps": STEPS}, checkpoint={"every": 3, "keep": 2}, evaluate={"every": 8},
        parallel={"dp": 2, "timeout_seconds": 60},
    )  # fmt: skip
    return write_recipe(recipe, tmp_path_factory.mktemp("recipe") / "recipe.toml")


@pytest.fixture(scope="module")
def whole(context, recipe, tmp_path_factory):
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "RUN"
    job = start(context, recipe, run, (2, 1))
    assert job.wait() == [0, 0], job.printed()
    return run


def same(run, whole):
    assert lines(run) == lines(whole)
    assert checkpoints(run) == checkpoints(whole)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    assert tensors(run / last) == tensors(whole / last)


def until(condition, seconds=300):
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(f"waited {seconds} s in vain")


def kill_ranks(run, printed, kills, seed):
    """Kill a rank, now at any moment and now while a checkpoint is written, wait for its successor, and so on."""
    draw = random.Random(seed)
    dead = set()
    for kill in range(kills):
        seen = {path.name for path in run.glob("checkpoints/*")}
        rank = draw.randrange(2)
        pid = until(functools.partial(pid_of, printed, rank, dead))
        if kill % 2:
            until(lambda seen=seen: {path.name for path in run.glob("checkpoints/*.partial")} - seen)
            time.sleep(draw.uniform(0, 0.02))
        else:
            until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
            time.sleep(draw.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        dead |= {int(path.read_text()) for path in printed.glob("pid-*")}  # its sibling ends, too
    return dead


def pid_of(printed, rank, dead):
    path = printed / f"pid-{rank}"
    text = path.read_text() if path.exists() else ""
    return int(text) if text and int(text) not in dead else None


def test_a_killed_rank_comes_back_with_the_job(context, recipe, whole, tmp_path):
    run, printed = tmp_path / "RUN", tmp_path / "printed"
    printed.mkdir()
    agent = context.Process(target=run_agent, args=(["train", recipe, "-o", run, "--resume"], 2, 2, printed))
    agent.start()
    dead = kill_ranks(run, printed, 2, seed=0)
    agent.join(300)
    assert agent.exitcode == 0, [path.read_text() for path in printed.glob("rank-*")]
    assert len(dead) == 4
    same(run, whole)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_rank_comes_back_with_torchrun(recipe, whole, tmp_path, seed):
    run, printed = tmp_path / "RUN", tmp_path / "printed"
    printed.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        f"Path({str(printed)!r}, 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "from longnet.cli.main import main\nmain()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", script]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    job = subprocess.Popen([*command, "train", recipe, "-o", run, "--resume"], env=environment)
    kill_ranks(run, printed, 1, seed)
    assert job.wait(300) == 0
    same(run, whole)


def test_the_others_end_when_a_rank_is_killed(context, recipe, tmp_path):
    run = tmp_path / "RUN"
    job = start(context, recipe, run, (2, 1))
    until(functools.partial(has_checkpoints, run))
    os.kill(job.processes[1].pid, signal.SIGKILL)
    started = time.monotonic()
    assert job.wait() == [2, -signal.SIGKILL]
    assert time.monotonic() - started < 30  # it need not wait for the watch
    [line] = told(job)
    assert "rank 0 has lost another rank, which torchrun names" in line


def test_a_rank_that_is_stopped_is_named_by_the_others(context, recipe, tmp_path):
    run = tmp_path / "RUN"
    job = start(context, recipe, run, (2, 1), "--parallel.timeout-seconds", LIMIT, "--train.steps", 100_000)
    until(functools.partial(has_checkpoints, run))
    os.kill(job.processes[0].pid, signal.SIGSTOP)
    started = time.monotonic()
    job.processes[1].join(60)
    spent = time.monotonic() - started
    job.end()
    assert job.processes[1].exitcode == 1
    assert spent < 1.5 * LIMIT
    [line] = told(job)
    assert line.startswith(f"longnet: rank 1 stops: rank 0 has not answered for {LIMIT / 2:g} s or more: stopped, or")


def hang(rank):
    """Make a rank wait for a file for ever, in its main thread alone."""
    from longnet.data.loader import Windows  # noqa: PLC0415  # in the rank's process

    real = Windows.batch

    def batch(windows, step, sequences, **keywords):
        if rank == 1 and step == 5:
            time.sleep(1000)
        return real(windows, step, sequences, **keywords)

    Windows.batch = batch


def test_a_rank_that_hangs_in_one_thread_is_told_where(context, recipe, tmp_path):
    job = start(
        context, recipe, tmp_path / "RUN", (2, 1), "--parallel.timeout-seconds", LIMIT,
        prepare="training.test_faults:hang",
    )  # fmt: skip
    assert set(job.wait()) <= {1, 2}  # 2 where the other one's end came first
    found = told(job)
    assert found
    for line in found:
        assert f"no rank has gone on for {LIMIT} s: rank 0 at " in line
        assert "rank 1 at test_faults.py:" in line


def fill_disk(rank):
    """Let the second rank's share of the third checkpoint go to a full disk."""
    real = HuggingFaceStorageWriter.write_data

    def write_data(writer, plan, planner):
        if rank == 1 and "step-00000009" in str(writer.path):
            (Path(writer.path) / "shard-00002-model-00001-of-00001.safetensors").symlink_to("/dev/full")
        return real(writer, plan, planner)

    HuggingFaceStorageWriter.write_data = write_data


def test_a_full_disk_of_one_rank_costs_the_checkpoint_alone(context, recipe, whole, tmp_path):
    run = tmp_path / "RUN"
    job = start(context, recipe, run, (2, 1), prepare="training.test_faults:fill_disk")
    assert job.wait() == [2, 2]
    [line] = told(job)
    assert "cannot write the checkpoint of step 9 into" in line
    assert line.endswith("the disk is full; the previous one, " + str(newest_whole(run).whole) + ", is whole")
    assert checkpoints(run) == ["step-00000003", "step-00000006"]
    job = start(context, recipe, run.rename(tmp_path / "again"), (2, 1))
    assert job.wait() == [0, 0], job.printed()
    same(tmp_path / "again", whole)


def test_a_signal_ends_all_ranks_after_the_same_step(context, recipe, whole, tmp_path):
    run = tmp_path / "RUN"
    job = start(context, recipe, run, (2, 1))
    until(functools.partial(has_checkpoints, run))
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.wait() == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step " in job.printed()[0]
    job = start(context, recipe, run.rename(tmp_path / "again"), (2, 1))
    assert job.wait() == [0, 0], job.printed()
    same(tmp_path / "again", whole)
