"""A step in chunks against one pass over the whole sequence: loss, gradients, what is saved, and what is refused."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import longnet
from cases import patterns
from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.model.versions import checkpoint_layers
from longnet.training import chunked
from longnet.training.chunked import ChunkedStep, chunk_costs, chunked_gradients
from longnet.training.loop import train
from training.runs import lines, tensors

PATTERN = DilationPattern((8, 20, 64), (1, 3, 8))


def longnet_model(pattern=PATTERN, *, layers=2, position="rope", **fields):
    torch.manual_seed(0)
    config = LongNetConfig(
        attn_implementation="dilated", vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        head_offsets=pattern.head_offsets, queries=pattern.queries, position_embedding=position, **fields,
    )  # fmt: skip
    return LongNetForCausalLM(config).double().train()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().train()
    longnet.use_dilated_attention(model, PATTERN)
    return model


def tokens_of(rows, tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, 50, (rows, tokens), generator=generator) for _ in "it")
    targets[:, 3::7] = -100
    return ids, targets


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def whole(model, ids, targets, **inputs):
    """One pass: a loss and gradients by PyTorch's own cross entropy."""
    logits = model.eval()(input_ids=ids, use_cache=False, **inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    model.train()
    return loss.item(), gradients(model)


def assert_same(model, found, expected, *, limit=1e-10):
    loss, wanted = expected
    assert found == pytest.approx(loss, rel=limit)
    got = gradients(model)
    assert got.keys() == wanted.keys()
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (got[name] - gradient).norm()
        assert error <= limit * max(gradient.norm(), 1e-3 * scale), (name, (error / gradient.norm()).item())


@settings(max_examples=25)
@given(
    patterns(),
    st.integers(1, 90),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*no head keeps", "ignore:.*no branch of dilation rate 1")
def test_gradients_are_those_of_the_whole(pattern, tokens, chunk_tokens, rows, layers, rotates, ties):
    model = longnet_model(pattern, layers=layers, rotate_offsets=rotates, tie_word_embeddings=ties)
    ids, targets = tokens_of(rows, tokens)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=chunk_tokens), expected)


@pytest.mark.parametrize("make", [longnet_model, llama])
def test_packed_documents_and_padding(make):
    model = make()
    ids, targets = tokens_of(1, 101)
    edges = torch.tensor([0, 5, 5, 60, 101], dtype=torch.int32)
    positions = torch.cat([torch.arange(size) for size in edges.diff().tolist()])[None]
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "position_ids": positions}
    expected = whole(model, ids, targets, **packed)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=17, cu_seqlens=edges), expected)

    ids, targets = tokens_of(3, 50)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[0, :23], mask[2, 20:] = False, False
    targets[~mask] = -100
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # the same on both ways: Llama turns in float32
    expected = whole(model, ids, targets, attention_mask=mask.long(), position_ids=positions)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=9, padding_mask=mask), expected)


def test_a_chunk_that_gives_no_row_is_not_the_end_of_a_segment():
    model = longnet_model(DilationPattern.geometric(4, 512))
    ids, targets = tokens_of(1, 512)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=8), expected)


def test_xpos_counts_from_the_sequences_start():
    model = longnet_model(DilationPattern((8, 64), (1, 4)), position="xpos")
    ids, targets = tokens_of(1, 150)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=24), expected)


def test_any_causal_model_of_transformers():
    model = llama()
    ids, targets = tokens_of(2, 101)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected)
    checkpoint_layers(model)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected)
    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = whole(adapted, ids, targets)
    assert_same(adapted, chunked_gradients(adapted, ids, targets, chunk_tokens=16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_whole_in_the_same_dtype(dtype):
    ids, targets = tokens_of(1, 300)
    exact = longnet_model(layers=3)
    _, truth = whole(exact, ids, targets)
    model = longnet_model(layers=3).float()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)
    with autocast:
        loss = model(ids, shift_labels=targets).loss
    loss.backward()
    plain = gradients(model)
    chunked_gradients(model, ids, targets, chunk_tokens=32, autocast=autocast)
    for name, gradient in gradients(model).items():
        error, limit = ((x.double() - truth[name]).norm() for x in (gradient, plain[name]))
        assert error <= 3 * limit, name


def test_dropout_is_the_same_in_both_passes_and_leaves_the_random_state():
    model = longnet_model(hidden_dropout=0.2)
    ids, targets = tokens_of(2, 64)
    before = torch.get_rng_state()

    def step(weight=None, change=0.0):
        read = lambda start, stop: (ids[:, start:stop], targets[:, start:stop])  # noqa: E731
        if weight is not None:
            with torch.no_grad():
                weight.view(-1)[0] += change
        with ChunkedStep(model, read, sequences=2, tokens=64, chunk_tokens=16, items=100, seed=(3, 4)) as learning:
            for _ in learning:
                pass
        return learning.loss, gradients(model)

    _, found = step()
    assert torch.equal(torch.get_rng_state(), before)
    weight = model.model.layers[0].self_attn.v_proj.weight  # what it changes reaches later chunks through the state
    (above, _), (below, _) = step(weight, 1e-5), step(weight, -2e-5)
    assert (above - below) / 2e-5 == pytest.approx(
        found["model.layers.0.self_attn.v_proj.weight"][0, 0].item(), rel=1e-5
    )


def test_spans_that_end_together_need_no_log_beyond_their_own(tmp_path):
    pattern = DilationPattern((8, 16), (1, 2))
    model = longnet_model(pattern)
    ids, targets = tokens_of(1, 100)
    expected = whole(model, ids, targets)
    read = lambda start, stop: (ids[:, start:stop], targets[:, start:stop])  # noqa: E731
    items = int((targets != -100).sum())
    with ChunkedStep(
        model, read, sequences=1, tokens=100, chunk_tokens=16, items=items, folder=tmp_path / "step"
    ) as step:
        passes = [progress.is_learning for progress in step]
    assert passes == [True] * 7
    assert_same(model, step.loss, expected)
    assert chunk_costs(model.config, tokens=100, chunk_tokens=16) == (0, 0, 0)


def test_the_log_takes_what_the_formula_says(tmp_path):
    pattern = DilationPattern.geometric(8, 2**14)
    model = longnet_model(pattern).float()
    ids, targets = tokens_of(1, 2**13)
    read = lambda start, stop: (ids[:, start:stop], targets[:, start:stop])  # noqa: E731
    with ChunkedStep(
        model, read, sequences=1, tokens=2**13, chunk_tokens=32, items=2**13, folder=tmp_path / "step"
    ) as step:
        for progress in step:
            if progress.is_learning:
                break
    (log,) = (tmp_path / "step").glob("rows-*.log")
    costs = chunk_costs(model.config, tokens=2**13, chunk_tokens=32)
    assert log.stat().st_size == costs.log
    closed = 2 * 2 * 8 * 2 * 4 * 8 * 2 / 3 * 2**13 / 32  # 2 · G · D · layers · bytes · w₀ · 2/3, a chunk
    assert costs.log == pytest.approx(closed, rel=0.05)
    assert costs.state == step.tapes[0].states.nbytes


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
import test_chunked as tests
from longnet.training.chunked import ChunkedStep
folder, die_after = sys.argv[2], int(sys.argv[3])
model = tests.longnet_model(tests.DilationPattern((8, 64, 256), (1, 4, 16)), hidden_dropout=0.1).float()
ids, targets = tests.tokens_of(2, 200)
read = lambda start, stop: (ids[:, start:stop], targets[:, start:stop])
from pathlib import Path
from types import SimpleNamespace
with ChunkedStep(
    model, read, sequences=2, tokens=200, chunk_tokens=24, items=300, parts=2, seed=(1, 2), folder=Path(folder)
) as step:
    for count, progress in enumerate(step):
        if progress.chunk % 2:
            step.save()
        if count == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save([step.loss, tests.gradients(model)], folder + "/result.pt")
"""


def run_killed(folder, die_after):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), str(die_after)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


@pytest.mark.parametrize("deaths", [(3, 40), pytest.param(tuple(range(20)), marks=pytest.mark.deep)])
def test_a_killed_step_goes_on_to_the_same_bits(deaths, tmp_path):
    assert run_killed(tmp_path / "through", -1) == 0
    for die_after in deaths:
        assert run_killed(tmp_path / "killed", die_after) in (-signal.SIGKILL, 0)
    assert run_killed(tmp_path / "killed", -1) == 0
    expected, found = (torch.load(tmp_path / name / "result.pt") for name in ("through", "killed"))
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in expected[1].items())


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    model = longnet_model()
    ids, targets = tokens_of(1, 101)
    expected = whole(model, ids, targets)
    items = int((targets != -100).sum())

    def step():
        return ChunkedStep(
            model, lambda start, stop: (ids[:, start:stop], targets[:, start:stop]), sequences=1, tokens=101,
            chunk_tokens=10, items=items, folder=tmp_path / "step",
        )  # fmt: skip

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with step() as first:
        progress = iter(first)
        for _ in range(4):
            next(progress)
        first.save()
        monkeypatch.setattr(chunked.os, "pwrite", full)
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


def test_a_step_of_other_weights_begins_anew(tmp_path):
    model = longnet_model()
    ids, targets = tokens_of(1, 101)

    def step():
        return ChunkedStep(
            model, lambda start, stop: (ids[:, start:stop], targets[:, start:stop]), sequences=1, tokens=101,
            chunk_tokens=10, items=101, folder=tmp_path / "step",
        )  # fmt: skip

    with step() as first:
        for _ in first:
            first.save()
    with step() as same:
        assert same.done == len(same.schedule)
        assert same.loss == first.loss
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with step() as other:
        assert other.done == 0
    assert not list((tmp_path / "step").glob("step.*"))


def test_what_cannot_learn_in_chunks_is_refused():
    ids, targets = tokens_of(1, 20)
    dense = LongNetForCausalLM(LongNetConfig.preset("tiny", attn_implementation="sdpa"))
    with pytest.raises(ValueError, match=r'attention is "dilated".* got LongNetForCausalLM'):
        chunked_gradients(dense, ids, targets, chunk_tokens=8)
    with pytest.raises(ValueError, match="numbers of at least 1"):
        chunked_gradients(longnet_model(), ids, targets, chunk_tokens=0)
    with (
        ChunkedStep(
            longnet_model(), lambda *_: (ids, targets), sequences=1, tokens=20, chunk_tokens=20, items=1
        ) as step,
        pytest.raises(ValueError, match="a folder of its own cannot be saved"),
    ):
        step.save()


def test_a_run_in_chunks_learns_what_one_at_once_does(make_recipe, tmp_path):
    plain = {"hidden_dropout": 0.0}
    found = []
    for name, chunks in (("whole", None), ("chunks", 7)):
        recipe = make_recipe(model=plain, train={"steps": 3, "chunk_tokens": chunks, "accumulate": 2, "log_every": 1})
        train(recipe, tmp_path / name, progress=False)
        found.append([row["loss"] for row in lines(tmp_path / name) if row["kind"] == "train"])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert not (tmp_path / "chunks" / "step").exists()


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_signal_stops_a_run_within_a_step_and_it_goes_on_to_the_same_bits(
    make_recipe, tmp_path, monkeypatch, at_step, capsys
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
    before = len(calls)
    monkeypatch.setattr(Windows, "batch", interrupt)
    summary = train(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert (summary.step, summary.stopped_by) == (4, None)
    again = [step for step, _ in calls[before:]]
    assert again.count(at_step) == again.count(3) - 9  # the chunks before are not computed again
    assert lines(tmp_path / "stopped") == lines(tmp_path / "through")
    assert tensors(summary.model_folder) == tensors(tmp_path / "through/checkpoints/step-00000004")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train": {"chunk_tokens": 0}}, r"train.chunk_tokens must be at least 1"),
        ({"train": {"chunk_tokens": 8, "compile": True}}, r"goes without train.compile"),
        ({"train": {"chunk_tokens": 8}, "parallel": {"sp": 2}}, r"needs one process .* parallel.sp = 2"),
        ({"train": {"chunk_tokens": 8}, "model": {"attention": "sdpa"}}, r"model.attention = 'dilated', got .*'sdpa'"),
    ],
)
def test_recipes_that_cannot_learn_in_chunks_are_refused(make_recipe, data, replaced, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**replaced).resolve(TokenData.open(data))
