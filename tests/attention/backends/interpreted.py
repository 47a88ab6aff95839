"""The fused kernels in Triton's interpreter, on the CPU: test_triton.py runs this file in a process of its own.

The interpreter is chosen as kernels are defined, and runs programs one after the other: what is missing between two of
them, or two threads of one, does not show here.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, cases, patterns
from longnet import DilationPattern, dilated_attention
from longnet.attention import combined, reference
from longnet.attention.backends import dispatch
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.blocks import Blocks
from longnet.attention.chunks import Tape
from longnet.attention.streaming import StreamState
from stretches import cut_sequences, learn, sequences, simulate, texts
from tolerances import SAME_FLOAT32, assert_as_good_as_plain, factor_of, rounding_floor


def check(case: Case, dtype: torch.dtype, backend: str = "triton") -> None:
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    exact = case.run("reference", torch.float64)
    plain = case.run("reference", dtype)
    logit, magnitudes = case.magnitudes()
    for name, got in case.run(backend, dtype).items():
        floor = rounding_floor(dtype, logit, magnitudes[name])
        assert_as_good_as_plain(name, got, plain[name], exact[name], factor_of(name), floor)


@settings(max_examples=8)
@given(case=cases(head_dims=(16, 24), max_tokens=24, max_kv_heads=2, max_batch=2, min_length=5))
def test_any_call_in_float32(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=2)
@given(case=cases(head_dims=(16,), max_tokens=24, max_kv_heads=2, max_batch=2, min_length=5))
def test_any_call_in_16_bits(case, dtype):
    check(case, dtype)


def together(patch, most=6):
    """Have the tiled path put its parts together, over the CPU's kernel."""
    patch.setattr(combined, "_combines_on", lambda _: True)
    patch.setattr(combined, "_MOST_RESULTS", most)


@settings(max_examples=10)
@given(
    case=cases(head_dims=(16, 24), max_tokens=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    most=st.sampled_from([6, 6, 0, 1]),
)
def test_parts_put_together_where_they_lie(case, dtype, most):
    """The tiled path, whose results are read in one launch, or in several where memory ends: any call, both ways."""
    with pytest.MonkeyPatch.context() as patch:
        together(patch, most)
        check(case, dtype, "sdpa")


@pytest.mark.parametrize("most", [0, 1])
def test_sinks_count_once_where_padding_is_and_memory_ends(monkeypatch, most):
    together(monkeypatch, most)
    q, k, v = torch.randn(3, 2, 2, 24, 16)
    mask = torch.arange(24) >= torch.tensor([[0], [5]])
    options = {"padding_mask": mask, "sinks": torch.randn(2), "is_causal": True, "return_lse": True}
    pattern = DilationPattern((8, 16), (1, 2))
    got = dilated_attention(q, k, v, pattern, backend="sdpa", **options)
    want = dilated_attention(q, k, v, pattern, backend="reference", **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=4)
@given(
    cut_sequences(max_tokens=30, ranks=(2, 3)),
    patterns(min_length=5),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([6, 6, 0]),
    st.integers(0, 2**31),
)
def test_parts_of_slices_put_together(sequence, pattern, kv_heads, group, is_causal, most, seed):
    """Own parts wait for those of rows that travel; the gradients of those are told before own ones are computed."""
    tokens, batch, edges, bounds = sequence
    torch.manual_seed(seed)
    q, dout = torch.randn(2, batch, kv_heads * group, tokens, 16)
    k, v = torch.randn(2, batch, kv_heads, tokens, 16)
    with pytest.MonkeyPatch.context() as patch:
        together(patch, most)
        found, _ = simulate(q, k, v, dout, pattern, edges, bounds=bounds, is_causal=is_causal, scale=0.25)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attend(*leaves, pattern, bounds=bounds, is_causal=is_causal, scale=0.25)
    grads = torch.autograd.grad(out, leaves, dout.double())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, (out, lse, *grads), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=SAME_FLOAT32, atol=SAME_FLOAT32, msg=name)


@settings(max_examples=3)
@given(sequences(max_tokens=30), patterns(min_length=5), st.integers(1, 2), st.integers(0, 2**31))
def test_parts_of_chunks_put_together(sequence, pattern, group, seed):
    tokens, batch, bounds, chunk_tokens = sequence
    torch.manual_seed(seed)
    q, dout = torch.randn(2, batch, 2 * group, tokens, 16)
    k, v = torch.randn(2, batch, 2, tokens, 16)
    sinks = torch.ones(2 * group)
    with pytest.MonkeyPatch.context() as patch:
        together(patch)
        tape = Tape([pattern], tokens=tokens, chunk_tokens=max(7, chunk_tokens), bounds=bounds)
        (found,) = learn([(q, k, v, dout, sinks)], tape)
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    out, _ = reference.attend(*leaves[:3], pattern, bounds=bounds, is_causal=True, scale=0.4, sinks=leaves[3])
    grads = torch.autograd.grad(out, leaves, dout.double())
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, (out, *grads), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2 * SAME_FLOAT32, atol=2 * SAME_FLOAT32, msg=name)


@settings(max_examples=4)
@given(texts(max_tokens=20, head_dims=(16,), starts=st.sampled_from([0, 7, 100, 2**40])))
def test_parts_of_streams_put_together(text):
    with pytest.MonkeyPatch.context() as patch:
        together(patch)
        out, _ = text.run(torch.float32)
    torch.testing.assert_close(out, text.oracle().float(), rtol=SAME_FLOAT32, atol=SAME_FLOAT32)


@pytest.mark.parametrize("queries", ["kept", "all"])
def test_parts_of_segments_beyond_32_bits(queries, monkeypatch):
    together(monkeypatch)
    q, k, v = torch.randn(3, 1, 2, 40, 16, dtype=torch.float64)
    check(Case(q, k, v, DilationPattern((8, 2**40), (1, 3), queries=queries), True), torch.float32, "sdpa")


@pytest.mark.parametrize("queries", ["kept", "all"])
@pytest.mark.parametrize("layout", ["BTHD", "BHTD"])
def test_parts_of_documents_in_one_launch_each(layout, queries, monkeypatch):
    """Three documents, and heads that share keys: out, and each gradient, is one launch."""
    launched, launch_once = [], launch._launch
    monkeypatch.setattr(combined, "_combines_on", lambda _: True)
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda kernel, *rest, **more: launched.append(kernel.__name__) or launch_once(kernel, *rest, **more),
    )
    q, k, v = (torch.randn(1, heads, 70, 16, dtype=torch.float64) for heads in (4, 2, 2))
    if layout == "BTHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    pattern = DilationPattern((8, 20, 24), (1, 3, 2), queries=queries)
    case = Case(q, k, v, pattern, True, {"cu_seqlens": torch.tensor([0, 30, 31, 70])})
    check(case, torch.float32, "sdpa")
    assert launched == ["combine"] * 4


@pytest.mark.parametrize("queries", ["kept", "all"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_segments_of_many_blocks(is_causal, queries, monkeypatch):
    """Several blocks of rows and of keys a segment, whole and ragged ones, and several programs' blocks a segment."""
    monkeypatch.setattr(launch, "forward_blocks", lambda *_, **__: Blocks(16, 16, 4, 1))
    monkeypatch.setattr(launch, "query_blocks", lambda *_, **__: Blocks(16, 16, 4, 1))
    monkeypatch.setattr(launch, "key_blocks", lambda *_, **__: Blocks(16, 16, 4, 1))
    pattern = DilationPattern((40, 70), (1, 3), queries=queries)
    q, k, v = (torch.randn(1, heads, 90, 16, dtype=torch.float64) for heads in (2, 1, 1))
    check(Case(q, k, v, pattern, is_causal), torch.float32)


@settings(max_examples=3)
@given(
    cut_sequences(max_tokens=24, ranks=(2, 3)),
    patterns(min_length=5),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_slices_of_ranks(sequence, pattern, kv_heads, group, is_causal, seed):
    tokens, batch, edges, bounds = sequence
    torch.manual_seed(seed)
    q, dout = torch.randn(2, batch, kv_heads * group, tokens, 16)
    k, v = torch.randn(2, batch, kv_heads, tokens, 16)
    given_ = q, k, v, dout, pattern, edges
    (found, _), (expected, _) = (
        simulate(*given_, bounds=bounds, is_causal=is_causal, scale=0.25, backend=backend)
        for backend in ("triton", "auto")
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME_FLOAT32, atol=SAME_FLOAT32, msg=name)


@settings(max_examples=2)
@given(sequences(max_tokens=24), patterns(min_length=5), st.integers(1, 2), st.integers(0, 2**31))
def test_chunks(sequence, pattern, group, seed):
    tokens, batch, bounds, chunk_tokens = sequence
    torch.manual_seed(seed)
    q, dout = torch.randn(2, batch, 2 * group, tokens, 16)
    k, v = torch.randn(2, batch, 2, tokens, 16)
    tape = {"tokens": tokens, "chunk_tokens": max(7, chunk_tokens), "bounds": bounds}
    (found,), (expected,) = (
        learn([(q, k, v, dout, torch.ones(2 * group))], Tape([pattern], **tape, backend=backend))
        for backend in ("triton", "auto")
    )
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * SAME_FLOAT32, atol=2 * SAME_FLOAT32, msg=name)


@settings(max_examples=3)
@given(texts(max_tokens=20, head_dims=(16,), starts=st.sampled_from([0, 7, 100])))
def test_streams(text):
    text.backend = "triton"
    out, state = text.run(torch.float32)
    torch.testing.assert_close(out, text.oracle().float(), rtol=SAME_FLOAT32, atol=SAME_FLOAT32)
    assert state.next == [text.start + text.q.shape[2] - begin for begin in text.begins]


def test_a_step_is_one_launch_that_can_be_replayed(monkeypatch):
    """A graph's replay is the same launch once more, with the same memory: positions move on by themselves."""
    pattern, tokens = DilationPattern((5, 18), (1, 3), queries="all"), 24
    q, k, v = (torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2))
    sinks = torch.tensor([0.5, -torch.inf, 1.0, 0.0])
    states = [
        StreamState(
            pattern, batch_size=1, num_kv_heads=2, head_dim=16, dtype=torch.float32, device=q.device, start=2**40,
            backend=backend,
        )
        for backend in ("auto", "triton")
    ]  # fmt: skip
    monkeypatch.setattr(launch, "_ROWS_A_SPLIT", 6)  # several programs to a head
    launched, launch_once = [], launch._launch
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda kernel, *rest, **more: launched.append((kernel, rest, more)) or launch_once(kernel, *rest, **more),
    )
    room = [torch.empty_like(x[:, :, :1]) for x in (q, k, v)]
    for index in range(tokens):
        token = [x[:, :, index : index + 1] for x in (q, k, v)]
        for x, new in zip(room, token, strict=True):
            x.copy_(new)
        want = states[0].attend(*token, scale=None, sinks=sinks)
        if index < 8:
            got = states[1].attend(*room, scale=None, sinks=sinks)
            assert len(launched) == index + 1
        else:
            kernel, rest, more = launched[-1]
            got.fill_(torch.nan)
            launch_once(kernel, *rest, **more)
        torch.testing.assert_close(got, want, rtol=SAME_FLOAT32, atol=SAME_FLOAT32)
    assert len(launched) == 8
    states[1].replayed(tokens - 8)
    assert states[1].next == states[0].next
    assert torch.equal(states[1].keys, states[0].keys)
    token = [x[:, :, :1] for x in (q, k, v)]
    torch.testing.assert_close(*(state.attend(*token, scale=None) for state in states), rtol=1e-6, atol=1e-6)


def test_what_a_graph_cannot_replay_is_said():
    state = StreamState(
        DilationPattern((32,), (1,)), batch_size=1, num_kv_heads=1, head_dim=16, dtype=torch.float32,
        device=torch.device("cpu"), max_tokens=8, backend="triton",
    )  # fmt: skip
    token = torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="capture one, then replay it"):
        state.replayed(1)
    state.attend(token, token, token, scale=None)
    state.replayed(7)
    with pytest.raises(ValueError, match="9 tokens need more rows than max_tokens=8"):
        state.replayed(1)


def test_a_replay_where_the_device_was_not_told_is_found_out():
    state = StreamState(
        DilationPattern((32,), (1,)), batch_size=2, num_kv_heads=1, head_dim=16, dtype=torch.float32,
        device=torch.device("cpu"), backend="triton",
    )  # fmt: skip
    token, prompt = torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 3, 16)
    elsewhere = (
        lambda: state.crop(1), state.restart, lambda: state.attend(prompt, prompt, prompt, scale=None),
        lambda: setattr(state, "backend", "auto") or state.attend(token, token, token, scale=None),
    )  # fmt: skip
    for move in elsewhere:
        state.backend = "triton"
        state.attend(token, token, token, scale=None)
        state.replayed(1)
        move()
        with pytest.raises(ValueError, match="replayed at another position than the state's"):
            state.replayed(1)


def test_a_capture_where_the_device_was_not_told_is_refused(monkeypatch):
    """A step under capture would record where the sequences stand, and each replay would go back there."""
    state = StreamState(
        DilationPattern((32,), (1,)), batch_size=1, num_kv_heads=1, head_dim=16, dtype=torch.float32,
        device=torch.device("cpu"), backend="triton",
    )  # fmt: skip
    token = torch.zeros(1, 1, 1, 16)
    state.attend(token, token, token, scale=None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        state.attend(token, token, token, scale=None)
        assert state.next == [1]
        state.crop(1)
        with pytest.raises(ValueError, match="attend with one token first"):
            state.attend(token, token, token, scale=None)
    state.restart()
    state.attend(token, token, token, scale=None)
    state.replayed(1)
    state.select([0])
    state.attend(token, token, token, scale=None)
    with pytest.raises(ValueError, match="keys that lie elsewhere since select"):
        state.replayed(1)


def test_positions_beyond_32_bits_are_refused_where_several_tokens_come():
    state = StreamState(
        DilationPattern((32,), (1,)), batch_size=1, num_kv_heads=1, head_dim=16, dtype=torch.float32,
        device=torch.device("cpu"), start=2**40, backend="triton",
    )  # fmt: skip
    tokens = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="1,099,511,627,776, beyond 2"):
        state.attend(tokens, tokens, tokens, scale=None)


def test_global_tokens_that_never_existed_are_not_seen_however_far_the_stream_is():
    """Of n = 4 the first is at position 2, and the token's own position takes more than 32 bits."""
    k = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    outs = []
    for backend in ("sdpa", "triton"):
        state = StreamState(
            DilationPattern((4,), (1,), global_tokens=4), batch_size=1, num_kv_heads=2, head_dim=16,
            dtype=torch.float32, device=k.device, start=2, backend=backend,
        )  # fmt: skip
        for token in range(2):
            state.attend(*[k[:, :, token : token + 1]] * 3, scale=None)
        state.next = [2**31 + 20]
        outs.append(state.attend(*[k[:, :, 2:]] * 3, scale=None))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=1e-5)


def test_merging_in_one_launch():
    assert dispatch._disagreement(torch.device("cpu")) < 1e-6


def test_putting_parts_together_proves_itself():
    assert combined._disagreement(torch.device("cpu")) < 1e-6


def test_the_same_bits_at_every_run():
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in "qkv")

    def run():
        out = dilated_attention(q, k, v, DilationPattern((16, 48), (1, 3)), is_causal=True, backend="triton")
        return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_memory_that_nobody_wrote_is_not_read():
    """Padding and what lies behind the tensors is NaN, and conftest fills new memory with NaN."""
    q, k, v = (torch.full((1, 2, 60, 32), torch.nan)[:, :, 10:50, :16] for _ in "qkv")
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 7:29] = True
    for x in (q, k, v):
        x[:, :, 7:29] = torch.randn(1, 2, 22, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, DilationPattern((8, 16), (1, 3)), padding_mask=mask, backend="triton")
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out[:, :, 7:29].sum(), leaves):
        assert torch.isfinite(grad).all()
        assert (grad[:, :, :7] == 0).all()


def test_layouts_of_the_results_are_those_that_were_promised():
    q = torch.randn(1, 40, 2, 16).transpose(1, 2)
    arguments = (None, None, *DilationPattern((16, 32), (1, 2)).arguments, True, 0.25, "triton")
    torch.library.opcheck(torch.ops.longnet.dilated_attention, (q, q, q, *arguments), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(torch.float64, 16, "has no torch.float64"), (torch.float32, 20, "multiple of 8 from 16 to 256, got 20")],
)
def test_what_it_cannot_run_is_refused(dtype, head_dim, message):
    q = torch.zeros(1, 1, 8, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        dilated_attention(q, q, q, DilationPattern((4,), (1,)), backend="triton")
