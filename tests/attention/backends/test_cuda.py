"""The CUDA kernels without a GPU: by shape on meta tensors, and by what they hand to a simulation of ATen."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import simulated
from cases import cases
from longnet import DilationPattern, dilated_attention
from longnet.attention import chunks, combined, dilated, registration, sparse_fixed
from longnet.attention.backends import cuda, dispatch
from longnet.attention.backends.triton import launch, parts
from longnet.attention.tiles import is_aligned, rows_dense
from longnet.bench import cost_model
from tolerances import FLOAT64

KERNELS = [cuda.CuDNN(), cuda.FlashCUDA(), cuda.Efficient()]
BY_NAME = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
PATTERN = DilationPattern((16, 32), (1, 2))


@pytest.fixture
def aten(monkeypatch):
    """Put a simulation of ATen's CUDA operators under the kernels."""
    operators = simulated.Aten()
    monkeypatch.setattr(cuda, "_aten", operators)
    return operators


def use(monkeypatch, kernel, general=None):
    kernels = dispatch.Kernels(general or kernel, kernel)
    monkeypatch.setattr(dispatch, "choose", lambda *_: kernels)


def gradients(q, k, v, dout, pattern, **keywords):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, **keywords)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@BY_NAME
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_kernels_by_shape(kernel, rows):
    q, k, v, dout = (torch.empty(3, rows, 4, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "qkvo")
    out, lse = kernel.attend(q, k, v, is_causal=True, scale=0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    merged = torch.empty(4, 3, rows, device="meta").transpose(0, 1)
    grads = kernel.attend_backward(dout, q, k, v, out, merged, is_causal=True, scale=0.1)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]


@BY_NAME
@pytest.mark.parametrize("queries", ["kept", "all"])
def test_the_whole_op_by_shape(kernel, queries, monkeypatch):
    use(monkeypatch, kernel)
    q = torch.empty(2, 300, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k, v = (torch.empty(2, 300, 2, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "kv")
    arguments = ([64, 128, 96], [1, 2, 5], "mod", queries, 0, [], 2, True, 0.1, "auto")
    forward, backward = registration.implement(dilated._lay_out)
    out, lse = forward(q, k, v, None, None, *arguments)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, q.shape[:3])
    grads = backward(torch.empty_like(out), q, k, v, out, lse, None, *arguments)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


@BY_NAME
@settings(max_examples=60)
@given(case=cases(head_dims=(8, 16), max_tokens=60))
def test_the_whole_op_over_simulated_operators(kernel, case):
    """Any pattern, layout, mask and grouping of heads: right where the operators do what the sources say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_aten", simulated.Aten())
        first = dispatch.Planned(kernel, cuda.FlashCUDA()) if kernel.name == "cuDNN" else kernel
        use(patch, first, cuda.FlashCUDA() if kernel.name == "cuDNN" else kernel)
        got = case.run("sdpa", torch.float64)
    for name, want in case.run("reference", torch.float64).items():
        torch.testing.assert_close(got[name], want, atol=FLOAT64, rtol=FLOAT64)


def test_efficient_gets_an_output_whose_rows_are_all_heads_apart(aten, monkeypatch):
    use(monkeypatch, cuda.Efficient())
    q, k, v, dout = torch.randn(4, 1, 4, 64, 8, dtype=torch.float64)  # (B, H, T, D) in memory
    got = gradients(q, k, v, dout, PATTERN)
    monkeypatch.undo()
    for a, b in zip(got, gradients(q, k, v, dout, PATTERN), strict=True):
        torch.testing.assert_close(a, b, atol=FLOAT64, rtol=0)
    assert "efficient backward" in aten.calls


def test_efficient_on_rocm_has_no_padding(aten, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    use(monkeypatch, cuda.Efficient())
    q, k, v, dout = torch.randn(4, 1, 2, 40, 8, dtype=torch.float64)
    got = gradients(q, k, v, dout, PATTERN)
    monkeypatch.undo()
    for a, b in zip(got, gradients(q, k, v, dout, PATTERN), strict=True):
        torch.testing.assert_close(a, b, atol=FLOAT64, rtol=0)


def test_cudnns_plans_are_found_again_whatever_the_layout_of_the_gradient(aten, monkeypatch):
    use(monkeypatch, cuda.CuDNN())
    q, k, v = torch.randn(3, 1, 64, 2, 8, dtype=torch.float64).transpose(2, 3)
    dense = torch.randn(1, 2, 64, 8, dtype=torch.float64)
    douts = dense, dense.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([dense, dense], 4)[..., 0]
    results = [gradients(q, k, v, dout, PATTERN) for dout in douts]
    plans = len(aten.plans)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=FLOAT64, rtol=0)
    gradients(q, k, v, dense, PATTERN)
    assert len(aten.plans) == plans


def test_a_shape_that_cudnn_refused_is_not_offered_again(aten, caplog):
    kernel = dispatch.Planned(cuda.CuDNN(), cuda.FlashCUDA())
    aten.refuses.add((1, 2, 16, 8))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    for _ in range(3):
        out, _ = kernel.attend(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, cuda.FlashCUDA().attend(q, k, v, is_causal=True, scale=0.3)[0])
    assert aten.calls.count("cuDNN") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No valid execution plans" in caplog.text
    assert "flash (CUDA) takes it" in caplog.text
    kernel.attend(q[:, :, :8], k, v, is_causal=False, scale=0.3)
    assert aten.calls.count("cuDNN") == 2


def test_running_out_of_memory_is_no_refusal(aten, monkeypatch):
    kernel = dispatch.Planned(cuda.CuDNN(), cuda.FlashCUDA())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    q = torch.randn(1, 2, 16, 8)
    with monkeypatch.context() as patch:
        patch.setattr(aten, "_scaled_dot_product_cudnn_attention", full)
        with pytest.raises(torch.OutOfMemoryError):
            kernel.attend(q, q, q, is_causal=True, scale=0.3)
    kernel.attend(q, q, q, is_causal=True, scale=0.3)
    assert aten.calls == ["cuDNN"]


@pytest.mark.parametrize("layout", ["BTHD", "BHTD"])
def test_cudnn_gets_whole_segments_only(layout, aten, monkeypatch):
    use(monkeypatch, dispatch.Planned(cuda.CuDNN(), cuda.FlashCUDA()), cuda.FlashCUDA())

    def names(tokens, queries=None, **masks):
        aten.calls.clear()
        shape = (1, tokens, 2, 8) if layout == "BTHD" else (1, 2, tokens, 8)
        q, k, v = (x.transpose(1, 2) if layout == "BTHD" else x for x in torch.randn(3, *shape))
        dilated_attention(q[:, :, -(queries or tokens) :], k, v, PATTERN, is_causal=True, **masks)
        return set(aten.calls)

    assert names(64) == {"cuDNN"}
    assert names(40) == {"cuDNN", "flash"}  # the tails of both branches
    assert names(64, queries=1) == {"flash"}
    assert names(64, queries=20) == {"flash"}
    assert names(64, cu_seqlens=torch.tensor([0, 32, 64])) == {"flash"}
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[:, :32] = False
    assert names(64, padding_mask=mask) == {"flash"}


def test_shared_heads_go_to_cudnn_as_they_are_grouped(aten, monkeypatch):
    use(monkeypatch, dispatch.Planned(cuda.CuDNN(), cuda.FlashCUDA()), cuda.FlashCUDA())
    q, k, v = torch.randn(1, 64, 8, 8).transpose(1, 2), *torch.randn(2, 1, 64, 2, 8).transpose(2, 3)
    dilated_attention(q, k, v, DilationPattern((16,), (1,)), is_causal=True)
    assert aten.calls == ["cuDNN"]  # one call, where as many as share a head would loop


def test_a_view_that_32_bits_cannot_address_goes_where_64_do(monkeypatch):
    taken = []
    for kernel in (cuda.CuDNN, cuda.FlashCUDA):
        monkeypatch.setattr(kernel, "attend", lambda self, *_, **__: taken.append(self.name))
    storage = torch.empty(2**33, dtype=torch.bfloat16, device="meta")
    kernel = dispatch.Planned(cuda.CuDNN(), cuda.FlashCUDA())
    for far, name in ((2**20, "cuDNN"), (2**32, "flash (CUDA)")):
        x = storage.as_strided((2, 4, 64, 8), (far, 8, 32, 1))
        kernel.attend(x, x, x, is_causal=True, scale=1.0)
        assert taken.pop() == name


def test_efficient_walks_heads_where_32_bits_cannot_address_them(monkeypatch):
    called = []
    monkeypatch.setattr(
        cuda.Efficient, "_attend", lambda self, q, k, v, **_: called.append(q) or (torch.empty_like(q), q[..., 0])
    )
    storage = torch.empty(2**33, dtype=torch.bfloat16, device="meta")
    cuda.Efficient().attend(*[storage.as_strided((2, 4, 64, 8), (2**32, 8, 32, 1))] * 3, is_causal=True, scale=1.0)
    assert [x.shape for x in called] == [(2, 4, 64, 8)]  # batch entries may lie anywhere
    called.clear()
    cuda.Efficient().attend(*[storage.as_strided((1, 4, 64, 8), (0, 2**30, 8, 1))] * 3, is_causal=True, scale=1.0)
    assert [(x.shape, x.stride(2)) for x in called] == [((1, 1, 64, 8), 8)] * 4  # views, nothing copied
    called.clear()
    cuda.Efficient().attend(*[storage.as_strided((1, 2, 64, 8), (0, 8, 2**26, 1))] * 3, is_causal=True, scale=1.0)
    assert [(x.shape, x.is_contiguous()) for x in called] == [((1, 1, 64, 8), True)] * 2


def test_flash_copies_nothing(monkeypatch):
    storage = torch.empty(2**33, dtype=torch.bfloat16, device="meta")
    x = storage.as_strided((2, 4, 64, 64), (2**32, 64, 256, 1))
    seen = []

    class Spy:
        def _scaled_dot_product_flash_attention(self, q, k, v, *_, **__):
            seen.extend((q, k, v))
            return q, q[..., 0]

    monkeypatch.setattr(cuda, "_aten", Spy())
    cuda.FlashCUDA().attend(x, x, x, is_causal=True, scale=1.0)
    assert all(y is x for y in seen)


@pytest.mark.parametrize(("offset", "step", "aligned"), [(0, 16, True), (8, 16, True), (1, 16, False), (0, 20, False)])
def test_rows_that_16_bytes_do_not_divide_are_copied(offset, step, aligned, monkeypatch):
    buffer = torch.randn(offset + 64 * step).bfloat16()
    x = buffer.as_strided((1, 4, 16, 8), (0, 16 * step, step, 1), offset)
    assert is_aligned(x) is aligned
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))  # rows_dense reads no more of it than the type
    dense = rows_dense(x)
    monkeypatch.undo()
    assert (dense is x) is aligned
    assert torch.equal(dense, x)
    assert is_aligned(dense)
    assert torch.empty_like(dense).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("shape", "strides"), [((2, 3, 1, 8), (24, 8, 1, 1)), ((1, 1, 5, 8), (1, 3, 8, 1))])
def test_an_axis_of_one_entry_has_a_stride_that_kernels_take(shape, strides, monkeypatch):
    """One row of (B, H, D, 1) transposed is 1 apart from a next one that there is not, and kernels refuse that."""
    x = torch.randn(48).as_strided(shape, strides)
    assert is_aligned(x), "nothing to copy for"
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    dense = rows_dense(x)
    monkeypatch.undo()
    assert dense.data_ptr() == x.data_ptr()
    assert torch.equal(dense, x)
    assert all(stride % 4 == 0 for stride in dense.stride()[:3])


def test_what_a_user_gives_is_made_dense_before_a_kernel_reads_it(monkeypatch):
    """The gradient of the output too, which comes as autograd has it."""
    given = []
    monkeypatch.setattr(registration, "rows_dense", lambda x: given.append(x.data_ptr()) or rows_dense(x))
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    out, lse = dilated_attention(q, k, v, PATTERN, return_lse=True)
    dout = torch.randn(1, 2, 40, 16)[..., ::2]
    del given[:]
    _, backward = registration.implement(dilated._lay_out, dilated._as_one)
    backward(dout, q, k, v, out, lse, None, *PATTERN.arguments, False, 0.3, "auto")
    assert {x.data_ptr() for x in (dout, q, k, v)} <= set(given)


def test_an_axis_of_one_entry_has_a_stride_of_its_tensors(aten, monkeypatch):
    use(monkeypatch, cuda.FlashCUDA())
    strides = []
    attend = cuda.FlashCUDA.attend
    monkeypatch.setattr(
        cuda.FlashCUDA, "attend", lambda self, *x, **kw: strides.extend(y.stride() for y in x) or attend(self, *x, **kw)
    )
    dilated_attention(*torch.randn(3, 1, 2, 40, 8), PATTERN, is_causal=True)
    assert strides
    assert all(min(stride) > 0 for stride in strides)


class Launches(TorchDispatchMode):
    """Counts operators that compute; those that only look at tensors, or make room, launch nothing."""

    NONE = ("as_strided", "empty_like", "new_empty", "view", "select", "slice", "unsqueeze", "transpose", "expand")
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if (
            devices <= {"cpu"} and torch.device((kwargs or {}).get("device") or "cpu").type == "cpu"
        ):  # the host's tables
            return function(*args, **(kwargs or {}))
        assert name not in self.WAITS
        if name not in self.NONE and "promote_types" not in name:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_launches_of_the_papers_pattern_at_32k(monkeypatch):
    """Without masks nothing waits for the device either. Merging is one launch where Triton is at hand."""
    use(monkeypatch, cuda.CuDNN(), cuda.FlashCUDA())
    monkeypatch.setattr(dispatch, "merge_on", lambda *_: lambda out, *_: out.neg_())
    q, k, v = torch.empty(3, 1, 32768, 32, 64, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    arguments = (*DilationPattern.paper().arguments, True, 0.1, "auto")
    forward, backward = registration.implement(dilated._lay_out)
    with Launches() as there:
        out, lse = forward(q, k, v, None, None, *arguments)
    with Launches() as back:
        backward(out, q, k, v, out, lse, None, *arguments)
    assert there.counts.total() <= 60, there.counts
    assert back.counts.total() <= 120, back.counts


@pytest.fixture
def put_together(monkeypatch):
    """Parts put together by one launch: give a list to which each adds the tensors that it reads and writes."""
    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    calls, combine = [], launch.combine
    monkeypatch.setattr(launch, "_launch", lambda *_, **__: None)
    monkeypatch.setattr(combined, "_combines_on", lambda _: True)

    def count(parts, out, lse, *rest, **more):
        given = [x for part in parts for x in (part.out, part.lse) if x is not None]
        calls.append([*given, out, *([] if lse is None else [lse])])
        combine(parts, out, lse, *rest, **more)

    monkeypatch.setattr(launch, "combine", count)
    return calls


@pytest.mark.parametrize(
    ("queries", "gigabytes", "launches"), [("kept", (1.61, 4.83), (19, 72)), ("all", (3.22, 7.52), (81, 336))]
)
def test_parts_are_put_together_in_one_launch_and_one_pass(queries, gigabytes, launches, put_together, monkeypatch):
    """The paper's pattern at 64K × 32 × 128, bytes and launches as the model of costs has them."""
    use(monkeypatch, cuda.CuDNN(), cuda.FlashCUDA())
    q, k, v = torch.empty(3, 1, 65536, 32, 128, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    paper = DilationPattern.paper()
    pattern = DilationPattern(paper.segment_lengths, paper.dilation_rates, queries=queries)
    arguments = (*pattern.arguments, True, 0.1, "auto")
    forward, backward = registration.implement(dilated._lay_out, dilated._as_one)
    out, lse = forward(q, k, v, None, None, *arguments)  # and once more, since the first call sends tables
    backward(out, q, k, v, out, lse, None, *arguments)
    put_together.clear()
    with Launches() as there:
        out, lse = forward(q, k, v, None, None, *arguments)
    moved = [sum(x.nbytes for x in tensors if x.ndim == 4) for tensors in put_together]
    put_together.clear()
    with Launches() as back:
        backward(out, q, k, v, out, lse, None, *arguments)
    moved_back = [sum(x.nbytes for x in tensors if x.ndim == 4) for tensors in put_together]
    if queries == "kept":
        # What a launch reads of addresses is sent before it.
        assert there.counts == {"_scaled_dot_product_cudnn_attention": 17, "_to_copy": 1}
        assert back.counts == {
            "_scaled_dot_product_cudnn_attention_backward": 17, "_to_copy": 3,
            "clone": 17, "copy_": 32,  # what cuDNN reads in a layout of its own: log-sum-exps, rows of thinned branches
        }  # fmt: skip
    assert (len(moved), len(moved_back)) == (1, 3)
    assert (sum(moved), sum(moved_back)) == pytest.approx([1e9 * bytes_ for bytes_ in gigabytes], rel=0.01)
    rows = cost_model.costs(cost_model.DEVICES["h100"], 65536, pattern)
    modelled = {row["way"]: row["launches"] for row in rows if row["path"] == "tiles"}
    assert modelled == {"forward": there.counts.total() + 1, "backward": back.counts.total() + 3}
    assert tuple(modelled.values()) == launches
    (part,) = dilated._lay_out(q, k, None, *arguments[:-2]).parts
    for way, bytes_ in (("forward", sum(moved)), ("backward", sum(moved_back))):
        assert bytes_ == 128 * cost_model.combined_bytes(way, part.tiles, 65536 * 32)


@pytest.mark.parametrize("found", [0.0, 1e-3, RuntimeError("no compiler")], ids=["agrees", "differs", "fails"])
def test_putting_parts_together_has_to_prove_itself(found, monkeypatch, caplog):
    def disagreement(_):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(launch, "is_installed", lambda: True)
    monkeypatch.setattr(combined, "_disagreement", disagreement)
    assert combined._combines_on.__wrapped__(torch.device("cuda")) is (found == 0.0)
    assert caplog.text.count("they are merged one by one on cuda") == (found != 0.0)


def test_under_capture_parts_are_merged_one_by_one(put_together, monkeypatch):
    """A graph outlives the addresses of a call's parts."""
    q = torch.randn(1, 2, 32, 16)
    assert combined.combines(q)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not combined.combines(q)


def test_tables_of_a_long_sequence_are_those_of_few_chunks(put_together):
    """What a table says depends on which segments begin with a chunk, not on where the chunk lies: among 1,024 chunks
    there are 11 kinds. Each was laid out anew, 0.2 s of a CPU for one of a million tokens.
    """
    pattern = DilationPattern.geometric(segment_length=16, max_length=65536)
    tape = chunks.Tape([pattern], tokens=65536, chunk_tokens=64, bounds=torch.tensor([[0, 0, 65536]]))
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    parts._table_of.cache_clear()
    for index in range(512, 576):
        query = q.clone().requires_grad_()
        chunk = chunks.Chunk(tape, index, is_learning=True)
        chunk.attend(0, query, k, v, pattern, scale=0.25).sum().backward()
    assert parts._table_of.cache_info().misses <= 3 * 7  # of the output, of dq, of dk and dv
    assert len(put_together) == 4 * 64


def packed_documents(tokens=32768):
    """32 documents of their own lengths, as bounds."""
    edges = torch.arange(33) * (tokens // 32) + torch.arange(33) * (torch.arange(33) - 32)
    assert len(set(edges.diff().tolist())) == 32
    return dilated.document_bounds(edges, tokens)


@pytest.mark.parametrize(("queries", "bars"), [("kept", (354, 710, 5)), ("all", (1398, 2798, 9))])
def test_launches_of_packed_documents_put_together(queries, bars, put_together, monkeypatch):
    """Kernel calls and no merges; and few layers of entries, of which the launch that reads them walks all."""
    use(monkeypatch, cuda.FlashCUDA())
    layers, table_of = [], launch.table_of
    monkeypatch.setattr(launch, "table_of", lambda *x: layers.append(table_of(*x)) or layers[-1])
    q, k, v = torch.empty(3, 1, 32768, 32, 64, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    paper, bounds = DilationPattern.paper(), packed_documents()
    pattern = DilationPattern(paper.segment_lengths, paper.dilation_rates, queries=queries)
    arguments = (*pattern.arguments, True, 0.1, "auto")
    forward, backward = registration.implement(dilated._lay_out, dilated._as_one)
    out, lse = forward(q, k, v, bounds, None, *arguments)  # and once more, since the first call sends tables
    backward(out, q, k, v, out, lse, bounds, *arguments)
    with Launches() as there:
        out, lse = forward(q, k, v, bounds, None, *arguments)
    with Launches() as back:
        backward(out, q, k, v, out, lse, bounds, *arguments)
    assert there.counts.total() + 1 <= bars[0], there.counts
    assert back.counts.total() + 3 <= bars[1], back.counts
    assert max(len(table.layers) for table in layers) <= bars[2]


def test_launches_of_packed_documents(monkeypatch):
    """A tile is of one length: 32 documents of their own lengths are 20 times the launches; fused, they are one."""
    use(monkeypatch, cuda.FlashCUDA())
    monkeypatch.setattr(dispatch, "merge_on", lambda *_: lambda out, *_: out.neg_())
    bounds = packed_documents()
    q, k, v = torch.empty(3, 1, 32768, 32, 64, dtype=torch.bfloat16, device="meta").transpose(2, 3)
    arguments = (*DilationPattern.paper().arguments, True, 0.1)
    forward, backward = registration.implement(dilated._lay_out, dilated._as_one)
    with Launches() as there:
        out, lse = forward(q, k, v, bounds, None, *arguments, "auto")
    with Launches() as back:
        backward(out, q, k, v, out, lse, bounds, *arguments, "auto")
    assert there.counts.total() <= 740, there.counts
    assert back.counts.total() <= 1770, back.counts

    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    launched = []
    monkeypatch.setattr(launch, "refusal", lambda *_: None)
    monkeypatch.setattr(launch, "_launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    out, lse = forward(q, k, v, bounds, None, *arguments, "triton")
    backward(out, q, k, v, out, lse, bounds, *arguments, "triton")
    assert launched == ["attend", "backward_queries", "backward_keys"]


def test_sparse_fixed_waits_for_nothing(monkeypatch):
    use(monkeypatch, cuda.FlashCUDA())
    q = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="meta")
    forward, _ = registration.implement(sparse_fixed._lay_out)
    with Launches() as there:
        forward(q, q, q, None, None, 64, 64, 8, 0.1, "auto")
    assert there.counts["_scaled_dot_product_flash_attention"] > 1
