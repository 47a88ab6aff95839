"""`longnet train` across ranks: what one process computes, written once, and resumed by any number of them."""

import functools
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM

from cases import ON_CUDA
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.training import gradients
from longnet.training.checkpoint import lock_run, model_folder
from longnet.training.config import ParallelConfig
from longnet.training.parallel import Ranks, _meet
from ranks import run_ranks
from training.jobs import Job, preloaded, write_recipe
from training.runs import checkpoints, lines, tensors, values

STEPS = 20
# How the same steps are computed does not matter either.
MESHES = {
    (1, 1): [],
    (2, 1): ["--train.accumulate", 2],
    (1, 2): ["--train.checkpoint-activations"],
    (2, 2): [],
    (1, 3): [],
}
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
RANKS_OF_BOTH_AXES = [(4, "cpu"), pytest.param(1, "cuda", marks=ON_CUDA)]  # NCCL takes one rank a GPU


@pytest.fixture(scope="module")
def context():
    return preloaded()


@pytest.fixture(scope="module")
def recipe(make_recipe, tmp_path_factory):
    """Sequences, and weights, that two ranks cannot divide evenly, and segments that straddle their slices."""
    recipe = make_recipe(
        model={"hidden_dropout": 0.0, "num_hidden_layers": 2}, train={"steps": STEPS, "tokens": 61},
        evaluate={"every": 10}, sample={"every": 10, "tokens": 3}, checkpoint={"every": 8, "keep": 0},
    )  # fmt: skip
    return write_recipe(recipe, tmp_path_factory.mktemp("recipe") / "recipe.toml")


def start(context, recipe, run, mesh, *flags, size=None, prepare=None):
    dp, sp = mesh
    command = ["train", recipe, "-o", run, "--resume", "--parallel.dp", dp, "--parallel.sp", sp, *flags]
    return Job(context, command, size or dp * sp, run.with_name(run.name + "-printed"), prepare=prepare)


@pytest.fixture(scope="module")
def runs(context, recipe, tmp_path_factory):
    """A run on each mesh, with what its ranks printed."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for mesh, flags in MESHES.items():
        run = folder / f"{mesh[0]}x{mesh[1]}"
        job = start(context, recipe, run, mesh, *flags)
        assert job.wait() == [0] * (mesh[0] * mesh[1]), job.printed()
        found[mesh] = run, job.printed()
    return found


def losses(run):
    found = [line["loss"] for line in lines(run) if line["kind"] == "train"]
    assert len(found) == STEPS
    return found


def last(run):
    return run / "checkpoints" / f"step-{STEPS:08d}"


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != (1, 1)])
def test_the_same_recipe_gives_the_same_losses(runs, mesh):
    (alone, _), (run, _) = runs[1, 1], runs[mesh]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5, abs=0)
    expected, found = values(last(alone)), values(last(run))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("ranks", "device"), RANKS_OF_BOTH_AXES)
def test_gradients_added_up_over_both_axes_are_those_of_one_device(tmp_path, ranks, device):
    for errors in run_ranks("parallel_checks:shared_out", ranks, tmp_path, device, backend=BACKENDS[device]):
        assert len(errors) > 20
        for name, error in errors.items():
            assert error <= 1e-12, name


@pytest.mark.parametrize(
    ("ranks", "device", "loser", "save", "reread"),
    [(2, "cpu", None, 16, 0), (2, "cpu", 1, 13, 6), pytest.param(1, "cuda", None, 21, 0, marks=ON_CUDA)],
)
def test_a_step_in_chunks_on_ranks_goes_on_from_a_save_that_all_have(tmp_path, ranks, device, loser, save, reread):
    check, backend = "parallel_checks:chunked_shared_out", BACKENDS[device]
    for found, errors in run_ranks(check, ranks, tmp_path, str(tmp_path), loser, device, backend=backend):
        assert found == [21, True, save, reread]
        assert len(errors) > 20
        for name, error in errors.items():
            assert error <= 1e-12, name


@pytest.mark.parametrize("mesh", MESHES)
def test_metrics_and_words_come_once(runs, mesh):
    (alone, _), (run, printed) = runs[1, 1], runs[mesh]
    expected, found = lines(alone), lines(run)
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        if line["kind"] == "evaluate":
            for a, b in zip(line["contexts"], other["contexts"], strict=True):
                assert a == pytest.approx(b, rel=1e-5)
        if line["kind"] == "sample":
            assert line["text"] == other["text"]
    assert "finished: step 20" in printed[0]
    assert printed[1:] == [""] * (len(printed) - 1)
    assert checkpoints(run) == ["step-00000008", "step-00000016", "step-00000020"]


def test_a_checkpoint_of_many_ranks_is_one_hugging_face_folder(runs):
    (alone, _), (run, _) = runs[1, 1], runs[2, 2]
    folder = model_folder(run)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in last(alone).iterdir())
    assert len(list((folder / "optimizer").iterdir())) == 4
    model, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, last(alone)))
    assert model.config.to_diff_dict() | {"_name_or_path": ""} == expected.config.to_diff_dict() | {"_name_or_path": ""}
    ids = torch.arange(97, 120)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mesh", [(2, 2), (1, 1), (2, 1), (1, 3)])
def test_a_run_goes_on_with_other_ranks(context, recipe, runs, tmp_path, mesh):
    undisturbed, _ = runs[2, 2]
    run = tmp_path / "RUN"
    shutil.copytree(undisturbed, run)
    for step in (16, 20):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    job = start(context, recipe, run, mesh)
    assert job.wait() == [0] * (mesh[0] * mesh[1]), job.printed()
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-6, abs=0)
    told = f"ranks 2 × 2 → {mesh[0]} × {mesh[1]}): rounding may differ"
    assert (told in " ".join(job.printed()[0].split())) == (mesh != (2, 2))
    if mesh == (2, 2):
        assert lines(run) == lines(undisturbed)
        assert tensors(last(run)) == tensors(last(undisturbed))


@pytest.mark.parametrize("mesh", [(1, 1), (3, 1), (1, 4), (2, 3), (1, 61)])
def test_the_parts_of_a_batch_are_the_batch(data, mesh):
    windows = Windows(TokenData.open(data).train, 61, seed=1)
    dp, sp = mesh
    config, device = ParallelConfig(dp=dp, sp=sp), torch.device("cpu")
    for step in (0, 7, 100):
        whole = windows.batch(step, 6)
        parts = [Ranks(config=config, device=device, rank=r).batch(windows, step, 6) for r in range(dp * sp)]
        lengths = [ids.shape[1] for ids, _ in parts]
        assert max(lengths) - min(lengths) <= 1
        for index in (0, 1):
            rows = [torch.cat([parts[r * sp + c][index] for c in range(sp)], 1) for r in range(dp)]
            assert torch.equal(torch.cat(rows), whole[index])


def test_ranks_meet_whatever_earlier_attempts_have_left():
    store, met = HashStore(), set()
    for attempt in range(3):
        for rank in (1, 2):  # said by ranks that died before they were answered
            store.set(f"hello/{rank}", f"stale {attempt} {rank}")
        with ThreadPoolExecutor(3) as threads:
            prefixed = list(threads.map(functools.partial(_meet, store, size=3), range(3)))
        prefixed[0].set("attempt", str(attempt))
        assert {each.get("attempt") for each in prefixed} == {str(attempt).encode()}
        assert not any(each.check([f"seen {attempt - 1}"]) for each in prefixed)
        prefixed[1].set(f"seen {attempt}", "")
        met.add(prefixed[0])
    assert len(met) == 3


def compile_without_compiler(rank):
    """Trace and cut graphs as ever, and let torch run them: inductor takes a minute."""
    torch.compile = functools.partial(torch.compile, backend="eager")


@pytest.mark.parametrize("mesh", [(1, 2), pytest.param((2, 1), marks=pytest.mark.deep)])
def test_compiled_layers_give_the_same_losses(context, recipe, runs, tmp_path, mesh):
    (alone, _), run = runs[1, 1], tmp_path / "RUN"
    job = start(
        context, recipe, run, mesh, "--train.compile", "--train.steps", 4,
        prepare="training.test_parallel:compile_without_compiler",
    )  # fmt: skip
    assert job.wait() == [0, 0], job.printed()
    found = [line["loss"] for line in lines(run) if line["kind"] == "train"]
    assert found == pytest.approx(losses(alone)[:4], rel=1e-5)  # the warm-up is that of the longer run


def die_in_a_step(rank):
    """Save after every chunk, and kill the second rank at the 12th chunk of the third step."""
    gradients._SAVE_SECONDS = 0.0
    real, calls = Windows.batch, []

    def batch(windows, step, *arguments, **keywords):
        calls.append(step)
        if rank == 1 and calls.count(2) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(windows, step, *arguments, **keywords)

    Windows.batch = batch


def test_ranks_learn_in_chunks_and_go_on_within_a_step_after_a_crash(context, recipe, runs, tmp_path):
    (alone, _), flags = runs[1, 1], ["--train.steps", 4, "--train.chunk-tokens", 16, "--train.accumulate", 2]
    job = start(context, recipe, tmp_path / "through", (2, 1), *flags)
    assert job.wait() == [0, 0], job.printed()
    found = [line["loss"] for line in lines(tmp_path / "through") if line["kind"] == "train"]
    assert found == pytest.approx(losses(alone)[:4], rel=1e-5)
    run = tmp_path / "killed"
    job = start(context, recipe, run, (2, 1), *flags, prepare="training.test_parallel:die_in_a_step")
    assert job.wait()[1] == -signal.SIGKILL
    assert checkpoints(run)[-1] == "step-00000002"
    assert len(list((run / "step").glob("rank-*/step-*.safetensors"))) >= 2
    shutil.rmtree(tmp_path / "killed-printed")
    job = start(context, recipe, run, (2, 1), *flags)
    assert job.wait() == [0, 0], job.printed()
    assert not (run / "step").exists()
    assert lines(run) == lines(tmp_path / "through")
    last_step = "checkpoints/step-00000004"
    assert tensors(run / last_step) == tensors(tmp_path / "through" / last_step)


def told(job):
    return [line for text in job.printed() for line in text.splitlines() if line.startswith("longnet: ")]


@pytest.mark.parametrize(
    ("mesh", "size", "flags", "message"),
    [
        ((3, 1), 2, [], "parallel.dp × parallel.sp = 3 × 1 = 3, but this is one of 2 processes: start "
         "torchrun --nproc-per-node 3 -m longnet train …, or choose dp and sp whose product is 2"),
        ((1, 2), 1, [], "but this is the only process: start torchrun --nproc-per-node 2 -m longnet"),
        ((2, 1), 2, ["--train.batch-sequences", 3], "parallel.dp × train.accumulate must divide train.batch_seq"),
        ((1, 2), 2, ["--model.attention", "sdpa"], "parallel.sp = 2 needs model.attention = 'dilated', got 'sdpa'"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused_in_one_line(context, recipe, tmp_path, mesh, size, flags, message):
    job = start(context, recipe, tmp_path / "RUN", mesh, *flags, size=size)
    assert job.wait() == [2] * size
    [line] = told(job)
    assert message in line


def test_a_run_in_use_is_refused_on_all_ranks(context, recipe, tmp_path):
    with lock_run(tmp_path / "RUN"):
        job = start(context, recipe, tmp_path / "RUN", (2, 1))
        assert job.wait() == [2, 2]
    [line] = told(job)
    assert "is in use by process" in line
    assert not (tmp_path / "RUN" / "checkpoints").exists()
