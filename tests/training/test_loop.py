"""The loop: what a step computes, what it refuses to learn, and what a run folder holds afterwards."""

import os
import shutil
import signal
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from cases import DEVICES
from longnet import LongNetForCausalLM
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.training import beginning, loop
from longnet.training import checkpoint as checkpoint_module
from longnet.training.checkpoint import lock_run, model_folder
from longnet.training.gradients import accumulate_gradients
from longnet.training.loop import train
from longnet.training.optim import learning_rate
from training.conftest import write_data
from training.runs import checkpoints, lines, tensors

NO_DROPOUT = {"hidden_dropout": 0.0}


def losses(run):
    return [line["loss"] for line in lines(run) if line["kind"] == "train"]


def at(run, step):
    return tensors(run / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_plain_pytorch(make_recipe, data, tmp_path, device):
    settings = {"optim": {"weight_decay": 0.1, "clip": 0.5}, "train": {"steps": 6, "device": device}}
    recipe = make_recipe(model=NO_DROPOUT, **settings)
    train(recipe, tmp_path / "RUN", progress=False)
    torch.manual_seed(0)
    opened = TokenData.open(data)
    model = LongNetForCausalLM(recipe.model_config(opened)).train().to(device)
    windows = Windows(opened.train, 32, seed=0)
    matrices, others = ([w for w in model.parameters() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False, fused=False)
    for step, told in enumerate(losses(tmp_path / "RUN")):
        ids, targets = (x.to(device) for x in windows.batch(step, 4))
        hidden = model.model(ids).last_hidden_state
        loss = functional.cross_entropy((hidden @ model.model.embed_tokens.weight.T).flatten(0, 1), targets.flatten())
        assert told == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optim, step, 6)
        optimizer.step()
    trained = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "RUN"))
    for name, weight in trained.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name).cpu(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns(make_recipe, tmp_path, device):
    recipe = make_recipe(train={"steps": 120, "log_every": 120, "device": device}, checkpoint={"every": 0})
    summary = train(recipe, tmp_path / "RUN", progress=False)
    # Three next tokens are equally likely; one who knows the alphabet alone pays log 26 = 3.26.
    assert summary.loss < 2.3
    assert (summary.step, summary.tokens, summary.stopped_by) == (120, 120 * 4 * 32, None)
    evaluated = lines(tmp_path / "RUN")[-1]
    assert evaluated["kind"] == "evaluate"
    assert [result["context"] for result in evaluated["contexts"]] == [8, 32]
    assert evaluated["contexts"][1]["perplexity"] < 10
    assert checkpoints(tmp_path / "RUN") == ["step-00000120"]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_whole_batch(make_recipe, data, parts):
    model = LongNetForCausalLM(make_recipe(model=NO_DROPOUT).model_config(TokenData.open(data))).double()
    ids, targets = Windows(TokenData.open(data).train, 32, seed=3).batch(0, 4)
    found = []
    for count in (1, parts):
        model.zero_grad()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
        loss = accumulate_gradients(model, ids, targets, parts=count, autocast=autocast)
        found.append([loss.double(), *(weight.grad for weight in model.parameters())])
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-7 if whole.ndim == 0 else 1e-13, rtol=1e-11)


def test_the_order_of_tokens_does_not_depend_on_the_parts(make_recipe, tmp_path, monkeypatch):
    seen = {1: [], 4: []}
    real = loop.accumulate_gradients

    def note(model, input_ids, targets, *, parts, **keywords):
        seen[parts].append((input_ids, targets))
        return real(model, input_ids, targets, parts=parts, **keywords)

    monkeypatch.setattr(loop, "accumulate_gradients", note)
    for parts in seen:
        recipe = make_recipe(model=NO_DROPOUT, train={"accumulate": parts, "steps": 5})
        train(recipe, tmp_path / str(parts), progress=False)
    for whole, divided in zip(seen[1], seen[4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(whole, divided, strict=True))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def spoil(monkeypatch, steps, *, loss=None, gradient=None):
    """Make the loss, or a gradient, of some steps (1, …) another value."""
    real = loop.accumulate_gradients
    calls = iter(range(1, 1000))

    def spoilt(model, *arguments, **keywords):
        found = real(model, *arguments, **keywords)
        if next(calls) in steps:
            if gradient is not None:
                next(iter(model.parameters())).grad[0, 0] = gradient
            return found if loss is None else torch.full_like(found, loss)
        return found

    monkeypatch.setattr(loop, "accumulate_gradients", spoilt)


@pytest.mark.parametrize("found", [{"loss": float("nan")}, {"gradient": float("inf")}, {"gradient": float("nan")}])
def test_a_step_that_is_not_finite_changes_nothing(make_recipe, tmp_path, monkeypatch, capsys, found):
    spoil(monkeypatch, {1, 4}, **found)
    recipe = make_recipe(train={"steps": 6, "log_every": 3}, checkpoint={"every": 1, "keep": 0})
    train(recipe, tmp_path / "RUN", progress=False)
    weights = [at(tmp_path / "RUN", step) for step in range(1, 7)]
    assert weights[3] == weights[2]
    assert len({str(sorted(each.items())) for each in weights}) == 5
    assert not any("moment" in key for key in weights[0])  # the first step began no moments
    skipped = [line for line in lines(tmp_path / "RUN") if line["kind"] == "skipped"]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(1, 1), (4, 2)]
    assert [line["skipped"] for line in lines(tmp_path / "RUN") if line["kind"] == "train"] == [1, 2]
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "RUN"))
    warned = " ".join(capsys.readouterr().err.split())
    assert "longnet: warning: step 4 is skipped, the weights stay as they are: loss" in warned


def test_too_many_such_steps_in_a_row_end_the_run(make_recipe, tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 6, 7, 8}, loss=float("inf"))
    recipe = make_recipe(train={"max_skipped": 3}, checkpoint={"every": 4})
    with pytest.raises(ValueError, match=r"3 steps in a row without a finite loss and gradient, up to step 8: lower"):
        train(recipe, tmp_path / "RUN", progress=False)
    assert checkpoints(tmp_path / "RUN") == ["step-00000004"]


@pytest.fixture(scope="module")
def whole(make_recipe, tmp_path_factory):
    """A run that went through, and its recipe."""
    recipe = make_recipe(evaluate={"every": 6}, sample={"every": 4, "tokens": 3})
    run = tmp_path_factory.mktemp("whole") / "RUN"
    train(recipe, run, progress=False)
    return recipe, run


def cut_short(recipe, run, monkeypatch, *, step):
    """Leave a run as SIGINT at a step leaves it."""
    real = Windows.batch

    def interrupt(windows, number, sequences, **keywords):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(windows, number, sequences, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", interrupt)
        return train(recipe, run, progress=False)


@pytest.mark.parametrize("step", [1, 6, 7, 8])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(whole, tmp_path, monkeypatch, step):
    recipe, expected = whole
    before = signal.getsignal(signal.SIGINT)
    summary = cut_short(recipe, tmp_path / "RUN", monkeypatch, step=step)
    assert (summary.step, summary.stopped_by) == (step, signal.SIGINT)
    assert summary.model_folder.name == f"step-{step:08d}"
    assert signal.getsignal(signal.SIGINT) is before
    summary = train(recipe, tmp_path / "RUN", resume=True, progress=False)
    assert (summary.step, summary.stopped_by) == (12, None)
    assert lines(tmp_path / "RUN") == lines(expected)
    assert at(tmp_path / "RUN", 12) == at(expected, 12)


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(whole, tmp_path, monkeypatch, capsys):
    recipe, expected = whole
    cut_short(recipe, tmp_path / "RUN", monkeypatch, step=9)
    newest = tmp_path / "RUN" / "checkpoints" / "step-00000009"
    [moments] = (newest / "optimizer").iterdir()
    content = bytearray(moments.read_bytes())
    content[-5] ^= 1
    moments.write_bytes(content)
    train(recipe, tmp_path / "RUN", resume=True, progress=False)
    warned = " ".join(capsys.readouterr().err.split())
    assert f"damaged: step-00000009: optimizer/{moments.name} is damaged" in warned
    assert "step-00000008 is used instead" in warned
    assert lines(tmp_path / "RUN") == lines(expected)
    assert at(tmp_path / "RUN", 12) == at(expected, 12)


def test_nothing_whole_is_no_new_beginning(whole, tmp_path, monkeypatch):
    recipe, _ = whole
    cut_short(recipe, tmp_path / "RUN", monkeypatch, step=2)
    (tmp_path / "RUN" / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole \(step-00000002: state.json has 2 bytes"):
        train(recipe, tmp_path / "RUN", resume=True, progress=False)
    assert checkpoints(tmp_path / "RUN") == ["step-00000002"]


def test_a_full_disk_costs_the_checkpoint_alone(whole, tmp_path, monkeypatch):
    recipe, expected = whole
    real = checkpoint_module.sync

    def full(path):
        if "step-00000008" in str(path) and path.parent.name == "optimizer":
            raise OSError(28, "No space left on device")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "sync", full)
        with pytest.raises(
            OSError, match=r"checkpoint of step 8 .*: the disk is full; the previous one, .*4, is whole"
        ):
            train(recipe, tmp_path / "RUN", progress=False)
    assert checkpoints(tmp_path / "RUN") == ["step-00000004"]
    train(recipe, tmp_path / "RUN", resume=True, progress=False)
    assert lines(tmp_path / "RUN") == lines(expected)
    assert at(tmp_path / "RUN", 12) == at(expected, 12)


def test_training_goes_on_while_a_checkpoint_is_written(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(train={"steps": 6}, checkpoint={"every": 3, "keep": 0})
    train(recipe, tmp_path / "at once", progress=False)
    later, waited = threading.Event(), []
    real_write, real_batch = loop.write_snapshot, Windows.batch

    def write(*arguments, **keywords):
        waited.append(later.wait(60))
        real_write(*arguments, **keywords)

    def batch(windows, step, *arguments, **keywords):
        if step == 5:  # two steps after the first checkpoint was begun
            later.set()
        return real_batch(windows, step, *arguments, **keywords)

    monkeypatch.setattr(loop, "write_snapshot", write)
    monkeypatch.setattr(Windows, "batch", batch)
    train(recipe, tmp_path / "later", progress=False)
    assert waited == [True, True]
    for step in (3, 6):
        assert at(tmp_path / "later", step) == at(tmp_path / "at once", step)


def test_a_finished_run_stays_as_it_is(whole):
    recipe, run = whole
    before = lines(run)
    summary = train(recipe, run, resume=True, progress=False)
    assert (summary.step, summary.model_folder) == (12, model_folder(run))
    assert lines(run) == before
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "lock", "metrics.jsonl", "recipe.toml"]
    with pytest.raises(ValueError, match="holds the checkpoints of a run: continue it with --resume, or choose"):
        train(recipe, run, progress=False)


def test_what_a_kill_after_the_last_checkpoint_leaves_goes_when_the_run_is_resumed(make_recipe, tmp_path):
    recipe = make_recipe(train={"steps": 3}, checkpoint={"every": 1, "keep": 2})
    train(recipe, tmp_path / "RUN", progress=False)
    whole = checkpoints(tmp_path / "RUN")
    assert whole == ["step-00000002", "step-00000003"]
    shutil.copytree(tmp_path / "RUN/checkpoints/step-00000002", tmp_path / "RUN/checkpoints/step-00000001")
    (tmp_path / "RUN/checkpoints/step-00000000.superseded").mkdir()
    train(recipe, tmp_path / "RUN", resume=True, progress=False)
    assert checkpoints(tmp_path / "RUN") == whole


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"train": {"seed": 1}}, r"train.seed \(0 → 1\)"),
        ({"train": {"batch_sequences": 8}, "optim": {"lr": 1.0}}, r"optim.lr \(0.01 → 1.0\), train.batch_sequences"),
        ({"model": {"hidden_size": 32}}, r"model.head_dim \(8 → 16\), model.hidden_size \(16 → 32\), model.interm"),
        ({"model": {"attention": "sdpa"}}, r"model.attention \(dilated → sdpa\)"),
        ({"train": {"steps": 20}}, r"train.steps \(12 → 20\)"),
        ({"train": {"dtype": "bfloat16"}}, r"train.dtype \(float32 → bfloat16\)"),
    ],
)
def test_another_recipe_cannot_resume(whole, make_recipe, replaced, named):
    _, run = whole
    before = lines(run)
    with pytest.raises(ValueError, match=f"cannot be resumed with another recipe: {named}"):
        train(make_recipe(**replaced), run, resume=True, progress=False)
    assert lines(run) == before


def test_another_format_cannot_resume(whole, monkeypatch):
    recipe, run = whole
    monkeypatch.setattr(beginning, "FORMAT", 1)
    with pytest.raises(ValueError, match=r"step-00000012 has format 2, and this version of longnet continues format 1"):
        train(recipe, run, resume=True, progress=False)


def test_other_data_cannot_resume_but_may_lie_elsewhere(whole, make_recipe, tmp_path):
    _, run = whole
    keep = {"evaluate": {"every": 6}, "sample": {"every": 4, "tokens": 3}}
    with pytest.raises(ValueError, match="was trained on other data than"):
        train(make_recipe(write_data(tmp_path / "other", seed=1), **keep), run, resume=True, progress=False)
    moved = make_recipe(write_data(tmp_path / "moved", seed=0), **keep, train={"log_every": 5}, checkpoint={"keep": 1})
    assert train(moved, run, resume=True, progress=False).step == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_rate_lets_a_run_grow(make_recipe, tmp_path, device, dtype):
    def recipe(steps):
        settings = {"steps": steps, "device": device, "dtype": dtype}
        return make_recipe(optim={"schedule": "constant"}, train=settings, sample={"every": 4, "tokens": 3})

    train(recipe(9), tmp_path / "grown", progress=False)
    train(recipe(12), tmp_path / "grown", resume=True, progress=False)
    train(recipe(12), tmp_path / "whole", progress=False)
    assert at(tmp_path / "grown", 12) == at(tmp_path / "whole", 12)
    with pytest.raises(ValueError, match=r"has finished 12 steps already: raise train\.steps"):
        train(recipe(9), tmp_path / "grown", resume=True, progress=False)


def test_a_run_in_use_is_refused(make_recipe, tmp_path):
    with lock_run(tmp_path / "RUN"), pytest.raises(ValueError, match="is in use by process"):
        train(make_recipe(), tmp_path / "RUN", progress=False)


def test_another_machine_is_told(whole, capsys, monkeypatch):
    recipe, run = whole
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train(recipe, run, resume=True, progress=False)
    assert "continues on another machine (threads " in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_recomputed_activations_give_the_same_bits(make_recipe, tmp_path, device):
    for name, wanted in (("kept", False), ("recomputed", True)):
        recipe = make_recipe(train={"steps": 4, "checkpoint_activations": wanted, "device": device})
        train(recipe, tmp_path / name, progress=False)
    assert losses(tmp_path / "recomputed") == losses(tmp_path / "kept")
    assert at(tmp_path / "recomputed", 4) == at(tmp_path / "kept", 4)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(make_recipe, tmp_path, device):
    for dtype in ("float32", "bfloat16"):
        recipe = make_recipe(model=NO_DROPOUT, train={"dtype": dtype, "device": device})
        train(recipe, tmp_path / dtype, progress=False)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=2e-2)
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "bfloat16"))
    assert model.dtype == torch.float32
    rounded = [weight.bfloat16().float().equal(weight) for weight in model.parameters() if weight.ndim > 1]
    assert not any(rounded)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_compiled_steps_give_the_same_losses(make_recipe, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for name, wanted in (("plain", False), ("compiled", True)):
        recipe = make_recipe(model=NO_DROPOUT, train={"steps": 3, "compile": wanted})
        train(recipe, tmp_path / name, progress=False)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert at(tmp_path / "compiled", 3).keys() == at(tmp_path / "plain", 3).keys()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["dilated", "sdpa", "sparse_fixed"])
def test_the_last_checkpoint_is_the_model(make_recipe, tmp_path, attention, device):
    sparse = {"sparse_block": 8, "sparse_summary": 2} if attention == "sparse_fixed" else {}
    recipe = make_recipe(model={"attention": attention, **sparse}, train={"steps": 2, "device": device})
    summary = train(recipe, tmp_path / "RUN", progress=False)
    assert summary.model_folder == model_folder(tmp_path / "RUN")
    model = AutoModelForCausalLM.from_pretrained(summary.model_folder)
    tokenizer = AutoTokenizer.from_pretrained(summary.model_folder)
    assert model.config._attn_implementation == attention
    assert model.config.vocab_size == 257
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=2, pad_token_id=256).shape[1] <= 5
    chosen = AutoModelForCausalLM.from_pretrained(summary.model_folder, attn_implementation="sdpa")
    assert chosen.config._attn_implementation == "sdpa"


def test_a_thread_may_train(make_recipe, tmp_path):
    found = []
    recipe = make_recipe(train={"steps": 2})
    thread = threading.Thread(target=lambda: found.append(train(recipe, tmp_path / "RUN", progress=False)))
    thread.start()
    thread.join()
    assert found[0].step == 2


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train": {"device": "cuda"}}, "train.device = 'cuda', but torch finds no GPU on this machine"),
        ({"train": {"tokens": 4096}}, "the train split holds 3,501 tokens, too few for sequences of 4,096"),
        ({"evaluate": {"contexts": (8, 4096)}}, "a context of 4,096 tokens needs 4,097 validation tokens"),
        ({"evaluate": {"contexts": (24, 32)}}, "each context must divide the longest, 32"),
        ({"model": {"vocab_size": 256}}, "model.vocab_size = 256 is too small for .*, whose vocabulary has 257 tokens"),
        ({"model": {"num_attention_heads": 3}}, r"\[model\]: hidden_size must be a multiple of num_attention_heads"),
        ({"model": {"preset": "25"}}, r"\[model\]: no preset is called '25': did you mean '25m'"),
        ({"model": {"attention": "sparse_fixed"}}, r"\[model\]: .*sparse_fixed.* needs a pattern"),
        ({"train": {"tensorboard": True}}, "train.tensorboard = true needs TensorBoard: pip install"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(make_recipe, tmp_path, monkeypatch, replaced, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=message):
        train(make_recipe(**replaced), tmp_path / "RUN", progress=False)
    assert not (tmp_path / "RUN" / "checkpoints").exists()
