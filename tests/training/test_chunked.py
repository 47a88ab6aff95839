"""A step in chunks against one pass over the whole sequence: loss, gradients, what is saved, and what is refused."""

import dataclasses
import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import longnet
from cases import DEVICES, ON_CUDA, patterns
from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from longnet.data.shards import TokenData
from longnet.model.versions import checkpoint_layers
from longnet.training.chunk_schedule import chunk_costs
from longnet.training.chunked import ChunkedStep, chunked_gradients
from longnet.training.loop import train
from longnet.training.parallel import compile_layers
from training.runs import lines
from training.steps import (
    PATTERN,
    assert_same,
    assert_same_gradients,
    gradients,
    llama,
    longnet_model,
    reader_of,
    tokens_of,
    whole,
)

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def model_with_sinks(pattern=PATTERN):
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=8, layer_types=["full_attention"] * 2)).train()
    longnet.use_dilated_attention(model, pattern)
    return model  # in float32: its experts know no float64


def adapted_llama(pattern=PATTERN, *, device="cpu"):
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(pattern, device=device), adapters)


@pytest.mark.parametrize("device", DEVICES)
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
@pytest.mark.filterwarnings("ignore:.*no branch of dilation rate 1")
def test_gradients_are_those_of_the_whole(device, pattern, tokens, chunk_tokens, rows, layers, rotates, ties):
    model = longnet_model(pattern, layers=layers, rotate_offsets=rotates, tie_word_embeddings=ties, device=device)
    ids, targets = tokens_of(rows, tokens, device=device)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=chunk_tokens), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [longnet_model, llama])
def test_packed_documents_and_padding(make, device):
    model = make(device=device)
    ids, targets = tokens_of(1, 101, device=device)
    edges = torch.tensor([0, 5, 5, 60, 101], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(size, device=device) for size in edges.diff().tolist()])[None]
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "position_ids": positions}
    expected = whole(model, ids, targets, **packed)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=17, cu_seqlens=edges), expected)

    ids, targets = tokens_of(3, 50, device=device)
    mask = torch.ones(3, 50, dtype=torch.bool, device=device)
    mask[0, :23], mask[2, 20:] = False, False
    targets[~mask] = -100
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # the same on both ways: Llama turns in float32
    expected = whole(model, ids, targets, attention_mask=mask.long(), position_ids=positions)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=9, padding_mask=mask), expected)


def test_accumulated_parts_are_one_batch():
    model = longnet_model()
    ids, targets = tokens_of(4, 50)
    expected = whole(model, ids, targets)
    with ChunkedStep(
        model, reader_of(ids, targets), sequences=4, tokens=50, chunk_tokens=12, items=int((targets != -100).sum()),
        parts=2,
    ) as learning:  # fmt: skip
        for _ in learning:
            pass
    assert_same(model, learning.loss, expected)


@pytest.mark.parametrize(
    ("make", "limit"), [(longnet_model, 1e-10), (llama, 1e-10), (adapted_llama, 1e-10), (model_with_sinks, 1e-5)]
)
@settings(max_examples=12)
@given(patterns(), st.integers(2, 70), st.integers(1, 40), st.booleans(), st.data())
@pytest.mark.filterwarnings("ignore:.*no branch of dilation rate 1")
@pytest.mark.filterwarnings("ignore:.*no head keeps")
def test_padding_packing_and_parts_of_any_shape(make, limit, pattern, tokens, chunk_tokens, is_checkpointed, data):
    """Documents or padding anywhere, in a batch of one or more parts: decoders, adapters, sinks."""
    model = make(dataclasses.replace(pattern, offset_shift=0))
    if is_checkpointed:
        checkpoint_layers(model)
    parts, is_packed = data.draw(st.integers(1, 3), label="parts"), data.draw(st.booleans(), label="packed")
    rows = parts * (1 if is_packed else data.draw(st.integers(1, 2), label="rows of a part"))
    ids, targets = tokens_of(rows, tokens)
    edges = [sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=3), label="edges")) for _ in range(rows)]
    if is_packed:
        bounds = [(row, start, stop) for row in range(rows) for start, stop in pairwise([0, *edges[row], tokens])]
    else:
        # Odd rows are padded behind, even ones before.
        bounds = [
            (row, 0, (edges[row] or [tokens])[0]) if row % 2 else (row, (edges[row] or [0])[0], tokens)
            for row in range(rows)
        ]
    numbers = torch.zeros(rows, tokens, dtype=torch.long)
    positions = torch.zeros_like(numbers)
    for number, (row, start, stop) in enumerate(bounds, 1):
        numbers[row, start:stop], positions[row, start:stop] = number, torch.arange(stop - start)
    targets[numbers == 0] = -100
    items = int((targets != -100).sum())
    expected = whole(model, ids, targets, attention_mask=numbers, position_ids=positions)
    with ChunkedStep(
        model, reader_of(ids, targets), sequences=rows, tokens=tokens, chunk_tokens=chunk_tokens, items=items,
        parts=parts, bounds=torch.tensor(bounds),
    ) as learning:  # fmt: skip
        for _ in learning:
            pass
    assert_same(model, learning.loss, expected, limit=limit)


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


@pytest.mark.parametrize("device", DEVICES)
def test_any_causal_model_of_transformers(device):
    model = llama(device=device)
    ids, targets = tokens_of(2, 101, device=device)
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected)
    checkpoint_layers(model)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected)
    adapted = adapted_llama(device=device)
    expected = whole(adapted, ids, targets)
    assert_same(adapted, chunked_gradients(adapted, ids, targets, chunk_tokens=16), expected)


def test_a_model_with_sinks():
    model = model_with_sinks()
    ids, targets = tokens_of(1, 101)
    expected = whole(model, ids, targets)
    assert any("sinks" in name and gradient.any() for name, gradient in expected[1].items())
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected, limit=1e-5)


def test_experts_learn_without_the_routers_auxiliary_loss_which_is_refused():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, output_router_logits=True)).train()
    longnet.use_dilated_attention(model, PATTERN)
    ids, targets = tokens_of(1, 101)
    with pytest.raises(ValueError, match=r"auxiliary loss of routers .* set config.output_router_logits = False"):
        chunked_gradients(model, ids, targets, chunk_tokens=16)
    model.config.output_router_logits = False
    expected = whole(model, ids, targets)
    assert_same(model, chunked_gradients(model, ids, targets, chunk_tokens=16), expected, limit=1e-5)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "auto"), *(pytest.param("cuda", backend, marks=ON_CUDA) for backend in ("auto", "triton"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=6)
@given(patterns(), st.integers(2, 120), st.integers(1, 50), st.booleans())
@pytest.mark.filterwarnings("ignore:.*no branch of dilation rate 1")
def test_errors_are_those_of_the_whole_in_the_same_dtype(
    dtype, device, backend, pattern, tokens, chunk_tokens, is_checkpointed
):
    ids, targets = tokens_of(1, tokens, device=device)
    wide = {"hidden_size": 64} if device == "cuda" else {}  # heads of 16, as the fused kernels take them
    _, truth = whole(longnet_model(pattern, device=device, **wide), ids, targets)
    model = longnet_model(pattern, device=device, **wide).float()
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16)
    with autocast:
        loss = model(ids, shift_labels=targets).loss
    loss.backward()
    plain = gradients(model)
    if backend == "triton":
        model.set_attn_implementation("dilated_triton")
    if is_checkpointed:
        checkpoint_layers(model)
    chunked_gradients(model, ids, targets, chunk_tokens=chunk_tokens, autocast=autocast)
    error, limit = (
        sum((found[name].double() - exact).square().sum() for name, exact in truth.items()) ** 0.5
        for found in (gradients(model), plain)
    )
    assert error <= 3 * limit


class Masks(torch.nn.Module):
    """Dropout that keeps its masks, and then drops from a whole batch what it dropped from parts and chunks."""

    def __init__(self, p, uses):
        super().__init__()
        self.p, self.uses, self.use = p, uses, 0
        self.drawn, self.at, self.is_whole = {}, None, False

    def forward(self, x):
        use, self.use = self.use, (self.use + 1) % self.uses
        if self.is_whole:
            parts = sorted({part for _, part, _ in self.drawn})
            chunks = sorted({chunk for _, _, chunk in self.drawn})
            return x * torch.cat([torch.cat([self.drawn[use, part, chunk] for chunk in chunks], 1) for part in parts])
        mask = (torch.rand_like(x) >= self.p) / (1 - self.p)
        assert torch.equal(self.drawn.setdefault((use, *self.at), mask), mask)  # reading, learning, recomputing
        return x * mask


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(patterns(), st.integers(1, 70), st.integers(1, 40), st.integers(1, 2), st.integers(1, 3), st.booleans())
@pytest.mark.filterwarnings("ignore:.*no branch of dilation rate 1")
@pytest.mark.filterwarnings("ignore:.*no head keeps")
def test_dropout_is_that_of_one_pass_with_the_same_masks(
    device, pattern, tokens, chunk_tokens, parts, layers, is_checkpointed
):
    model = longnet_model(
        dataclasses.replace(pattern, offset_shift=0), layers=layers, hidden_dropout=0.3, device=device
    )
    masks = []
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Dropout):
                masks.append(Masks(child.p, uses=1 if module is model.model else 2))  # attention's, feed-forward's
                setattr(module, name, masks[-1])
    if is_checkpointed:
        checkpoint_layers(model)
    ids, targets = tokens_of(parts, tokens, device=device)
    items = int((targets != -100).sum())
    with ChunkedStep(
        model, reader_of(ids, targets), sequences=parts, tokens=tokens, chunk_tokens=chunk_tokens, items=items,
        parts=parts, seed=(1, 2),
    ) as learning:  # fmt: skip
        schedule = iter(learning.schedule)

        def place(module, arguments):
            part, _, chunk, _ = next(schedule)
            for mask in masks:
                mask.at = part, chunk

        hook = model.register_forward_pre_hook(place)
        for _ in learning:
            pass
        hook.remove()
    found = gradients(model)
    for mask in masks:
        mask.is_whole = True
    expected = whole(model, ids, targets)
    assert_same_gradients(found, expected[1])
    assert learning.loss == pytest.approx(expected[0], rel=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drops", [{"hidden_dropout": 0.2}, {"drop_path": 0.6}])
def test_dropout_is_the_same_in_both_passes_and_leaves_the_random_state(drops, device):
    model = longnet_model(layers=3, device=device, **drops)
    ids, targets = tokens_of(2, 64, device=device)
    state_of = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = torch.get_rng_state(), state_of()

    def step(weight=None, change=0.0):
        read = reader_of(ids, targets)
        if weight is not None:
            with torch.no_grad():
                weight.view(-1)[0] += change
        with ChunkedStep(model, read, sequences=2, tokens=64, chunk_tokens=16, items=100, seed=(3, 4)) as learning:
            for _ in learning:
                pass
        return learning.loss, gradients(model)

    _, found = step()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(state_of(), before[1])
    weight = model.model.layers[0].self_attn.v_proj.weight  # what it changes reaches later chunks through the state
    (above, _), (below, _) = step(weight, 1e-5), step(weight, -2e-5)
    assert (above - below) / 2e-5 == pytest.approx(
        found["model.layers.0.self_attn.v_proj.weight"][0, 0].item(), rel=1e-5
    )


def test_what_is_dropped_depends_on_seed_step_rank_part_and_chunk(monkeypatch):
    ids, targets = tokens_of(2, 40)
    drawn = {}

    def step(*seed):
        with ChunkedStep(
            model, reader_of(ids, targets), sequences=2, tokens=40, chunk_tokens=8, items=80, parts=2, seed=seed
        ) as learning:
            at = iter(learning.schedule)

            def draw(module, arguments):
                part, _, chunk, is_learning = next(at)
                drawn.setdefault((*seed, part, chunk), []).append((is_learning, torch.rand(()).item()))

            hook = model.register_forward_pre_hook(draw)
            for _ in learning:
                pass
            hook.remove()

    model = longnet_model(DilationPattern((64,), (1,)))
    for seed in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        step(*seed)
    assert all(len({value for _, value in values}) == 1 for values in drawn.values())
    assert sum(len(values) == 2 for values in drawn.values()) == 4 * 2 * 4  # the last chunk is not read before
    assert len({values[0][1] for values in drawn.values()}) == len(drawn) == 4 * 2 * 5


def count_graphs(monkeypatch):
    graphs = []

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracer asks for it
def test_compiled_layers_learn_the_same_from_as_many_graphs_whatever_their_number(monkeypatch):
    graphs = count_graphs(monkeypatch)
    ids, targets = tokens_of(1, 40)  # the last chunk is a second shape
    counts = []
    for layers in (2, 9):
        torch.compiler.reset()
        found = []
        for is_compiled in (False, True):
            model = longnet_model(layers=layers, hidden_dropout=0.1, drop_path=0.1)
            if is_compiled:
                compile_layers(model, in_chunks=True)
            with ChunkedStep(
                model, reader_of(ids, targets), sequences=1, tokens=40, chunk_tokens=16, items=40, seed=(1, 2)
            ) as learning:
                for _ in learning:
                    pass
            found.append((learning.loss, gradients(model)))
        counts.append(len(graphs))
        graphs.clear()
        (loss, expected), (compiled_loss, compiled) = found
        assert compiled_loss == pytest.approx(loss, rel=1e-13)
        for name, gradient in expected.items():
            assert (compiled[name] - gradient).norm() <= 1e-12 * gradient.norm(), name
    assert 0 < counts[1] <= counts[0] + 8
    assert counts[1] < 30


def test_spans_that_end_together_need_no_log_beyond_their_own(tmp_path):
    pattern = DilationPattern((8, 16), (1, 2))
    model = longnet_model(pattern)
    ids, targets = tokens_of(1, 100)
    expected = whole(model, ids, targets)
    read = reader_of(ids, targets)
    items = int((targets != -100).sum())
    with ChunkedStep(
        model, read, sequences=1, tokens=100, chunk_tokens=16, items=items, folder=tmp_path / "step"
    ) as step:
        passes = [progress.is_learning for progress in step]
    assert passes == [True] * 7
    assert_same(model, step.loss, expected)
    assert chunk_costs(model.config, tokens=100, chunk_tokens=16) == (0, 0, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_log_takes_what_the_formula_says(tmp_path, device):
    pattern = DilationPattern.geometric(8, 2**14)
    model = longnet_model(pattern, device=device).float()
    ids, targets = tokens_of(1, 2**13)  # on the CPU: a chunk at a time goes to the model
    read = reader_of(ids, targets)
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


def test_what_cannot_learn_in_chunks_is_refused():
    ids, targets = tokens_of(2, 20)
    with pytest.raises(ValueError, match=r"^several documents in one sequence need parts of one .* set parts=2"):
        ChunkedStep(longnet_model(), reader_of(ids, targets), sequences=2, tokens=20, chunk_tokens=8, items=9,
                    bounds=torch.tensor([(0, 0, 9), (0, 9, 20), (1, 0, 20)]))  # fmt: skip
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


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_in_chunks_learns_what_one_at_once_does(make_recipe, tmp_path, device):
    plain = {"hidden_dropout": 0.0}
    found = []
    for name, chunks in (("whole", None), ("chunks", 7)):
        settings = {"steps": 3, "chunk_tokens": chunks, "accumulate": 2, "log_every": 1, "device": device}
        recipe = make_recipe(model=plain, train=settings)
        train(recipe, tmp_path / name, progress=False)
        found.append([row["loss"] for row in lines(tmp_path / name) if row["kind"] == "train"])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert not (tmp_path / "chunks" / "step").exists()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train": {"chunk_tokens": 0}}, r"train.chunk_tokens must be at least 1"),
        ({"train": {"chunk_tokens": 8}, "parallel": {"sp": 2}}, r"needs parallel.sp = 1 .* got parallel.sp = 2 and"),
        ({"train": {"chunk_tokens": 8}, "model": {"attention": "sdpa"}}, r"model.attention = 'dilated', got .*'sdpa'"),
    ],
)
def test_recipes_that_cannot_learn_in_chunks_are_refused(make_recipe, data, replaced, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**replaced).resolve(TokenData.open(data))
