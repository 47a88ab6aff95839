"""What only a CUDA device can show: `make test-gpu`, which runs every test of a `device`, too.

Without one, backends/test_cuda.py checks shapes, and what the kernels hand to a simulation of ATen.
"""

import pytest
import torch
from hypothesis import given, settings

from cases import ON_CUDA, cases
from longnet import DilationPattern, dilated_attention
from longnet.attention import combined, fused, reference
from longnet.attention.backends import dispatch
from longnet.attention.chunks import Tape
from longnet.attention.streaming import StreamState
from stretches import learn, simulate
from tolerances import assert_as_good_as_plain, factor_of, rounding_floor

pytestmark = ON_CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=100)
@given(case=cases(head_dims=(8, 16, 64), max_tokens=200))
def test_the_fused_kernels_err_no_more_than_plain_pytorch(case, dtype):
    """Head dims of multiples of 8, which they need; test_dilated.py's others run in plain PyTorch on CUDA."""
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    exact = case.run("reference", torch.float64)
    plain = case.run("reference", dtype)
    logit, magnitudes = case.magnitudes()
    for name, got in case.run("sdpa", dtype, device="cuda").items():
        floor = rounding_floor(dtype, logit, magnitudes[name])
        assert_as_good_as_plain(
            name, got, plain[name], exact[name], factor_of(name, in_tf32=dtype == torch.float32), floor
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=100)
@given(case=cases(head_dims=(16, 24, 64, 128), max_tokens=300))
def test_the_fused_kernel_errs_no_more_than_plain_pytorch(case, dtype):
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    exact, plain = case.run("reference", torch.float64), case.run("reference", dtype)
    logit, magnitudes = case.magnitudes()
    for name, got in case.run("triton", dtype, device="cuda").items():
        assert_as_good_as_plain(
            name,
            got,
            plain[name],
            exact[name],
            factor_of(name),
            rounding_floor(dtype, logit, magnitudes[name]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoded_token_is_one_launch_that_a_graph_replays(dtype):
    pattern, tokens = DilationPattern((64, 512), (1, 3), queries="all"), 700
    q, k, v = (torch.randn(2, heads, tokens, 64, device="cuda", dtype=dtype) for heads in (8, 4, 4))
    plain, fused = (
        StreamState(pattern, batch_size=2, num_kv_heads=4, head_dim=64, dtype=dtype, device=q.device, backend=backend)
        for backend in ("auto", "triton")
    )
    for state in (plain, fused):
        state.attend(q[:, :, :300], k[:, :, :300], v[:, :, :300], scale=None)
    room = [x[:, :, :1].clone() for x in (q, k, v)]

    def bring(index):
        for x, of_all in zip(room, (q, k, v), strict=True):
            x.copy_(of_all[:, :, index : index + 1])
        return plain.attend(*room, scale=None)

    want = bring(300)
    torch.testing.assert_close(fused.attend(*room, scale=None), want, atol=2e-2, rtol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which runs nothing
        got = fused.attend(*room, scale=None)
    for index in range(301, tokens):
        want = bring(index)
        graph.replay()
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    fused.replayed(tokens - 301)
    assert fused.next == plain.next


def test_slices_and_chunks_on_the_fused_kernel():
    torch.manual_seed(0)
    pattern, tokens = DilationPattern((64, 400), (1, 3)), 1000
    q, dout = torch.randn(2, 1, 8, tokens, 64, device="cuda")
    k, v = torch.randn(2, 1, 4, tokens, 64, device="cuda")
    for is_causal in (True, False):
        found, want = (
            simulate(
                q, k, v, dout, pattern, (0, 300, 650, tokens), bounds=None, is_causal=is_causal, scale=0.125,
                backend=backend,
            )[0]
            for backend in ("triton", "auto")
        )  # fmt: skip
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    bounds = torch.tensor([[0, 0, tokens]])
    (found,), (want,) = (
        learn([(q, k, v, dout, None)], Tape([pattern], tokens=tokens, chunk_tokens=300, bounds=bounds, backend=backend))
        for backend in ("triton", "auto")
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_fused_kernel_has_no_races():
    """250 runs, the same bits: what the interpreter, which runs one program after the other, cannot show."""
    q, k, v = (torch.randn(2, 8, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    pattern = DilationPattern((512, 1024, 4096), (1, 3, 8))

    def run():
        out = dilated_attention(q, k, v, pattern, is_causal=True, backend="triton")
        return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))

    first = run()
    want = dilated_attention(q, k, v, pattern, is_causal=True, backend="sdpa")
    torch.testing.assert_close(first[0], want, atol=2e-2, rtol=2e-2)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_merging_in_one_launch_proves_itself():
    assert dispatch.merge_on(torch.device("cuda"), torch.float32) is dispatch.launch.merge_


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_as_one_proves_itself(dtype, head_dim):
    assert fused._proves_itself(torch.device("cuda"), dtype, head_dim)


def test_putting_parts_together_in_one_launch_proves_itself():
    assert combined._combines_on(torch.device("cuda"))


LAYOUTS = {
    "BHTD": lambda x: x.contiguous(),
    "BTHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x.transpose(1, 2)] * 3, 3)[:, :, :, 1].transpose(1, 2),
    "misaligned": lambda x: torch.nn.functional.pad(x, (1, 4))[..., 1:-4],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", dispatch.KERNELS[1:], ids=lambda kernel: kernel.name)
def test_every_kernel_dtype_and_layout_forward_and_backward(
    kernel, dtype, head_dim, heads, layout, is_causal, monkeypatch
):
    """The whole op, whose tiles are strided and share heads, with one kernel doing all that it is given."""
    reason = kernel.refusal(torch.device("cuda"), dtype, head_dim)
    if reason is not None:
        pytest.skip(f"{kernel.name} {reason}")
    check_kernel(kernel, dtype, head_dim, heads, LAYOUTS[layout], is_causal, monkeypatch, "cuda")


def check_kernel(kernel, dtype, head_dim, heads, lay_out, is_causal, monkeypatch, device):
    """Check the op over a kernel on two documents' worth of tokens, whole segments and tails among them."""
    general = next(
        other
        for other in (dispatch.KERNELS[2:] if kernel.name == "cuDNN" else [kernel])
        if other.refusal(torch.device(device), dtype, head_dim) is None
    )
    first = dispatch.Planned(kernel, general) if kernel.name == "cuDNN" else kernel
    monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.Kernels(general, first))
    pattern, tokens = DilationPattern((64, 128, 256), (1, 2, 3)), 300
    shapes = [(2, count, tokens, head_dim) for count in (heads[0], heads[1], heads[1], heads[0])]
    exact = [lay_out(torch.randn(shape).to(dtype).double()) for shape in shapes]
    q, k, v, dout = (lay_out(x.to(device, dtype)) for x in exact)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, pattern, is_causal=is_causal, return_lse=True)
    got = out.detach(), lse, *torch.autograd.grad(out, leaves, dout)

    def run(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in exact[:3]]
        out, lse = reference.attend(*leaves, pattern, bounds=None, is_causal=is_causal, scale=head_dim**-0.5)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, exact[3].to(dtype))

    in_tf32 = device == "cuda" and kernel.name == "memory-efficient (CUDA)" and dtype == torch.float32
    for name, mine, plain, want in zip(
        ("out", "lse", "dq", "dk", "dv"), got, run(dtype), run(torch.float64), strict=True
    ):
        assert_as_good_as_plain(name, mine.cpu(), plain, want, factor_of(name, in_tf32=in_tf32))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("tokens", [64, 192, 320, 1000, 4096])
def test_gradients_are_finite_where_cudnn_gave_nan(tokens, backend):
    pattern = DilationPattern((64, 192, 4096), (1, 3, 4))
    q, k, v = (torch.randn(1, 8, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    out = dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_more_segments_than_a_grid_dimension():
    q, k, v = torch.randn(3, 1, 2, 4 * 70_000, 64, device="cuda", dtype=torch.bfloat16)
    out = dilated_attention(q, k, v, DilationPattern((4,), (1,)), is_causal=True)
    tail = dilated_attention(*(x[:, :, -400:] for x in (q, k, v)), DilationPattern((4,), (1,)), is_causal=True)
    torch.testing.assert_close(out[:, :, -400:], tail)


def test_offsets_beyond_two_to_the_31():
    q = torch.randn(1, 4, 64, 128, device="cuda", dtype=torch.bfloat16).repeat(1, 1, 2**16 + 8, 1)
    out = dilated_attention(q, q, q, DilationPattern((64,), (1,)), is_causal=True)
    assert out.numel() > 2**31
    torch.testing.assert_close(out[:, :, -64:], out[:, :, :64])


def test_compile_and_autocast():
    pattern = DilationPattern((64, 128), (1, 2))
    q, k, v = (torch.randn(2, 4, 200, 64, device="cuda", requires_grad=True) for _ in "qkv")

    def loss(q, k, v):
        return dilated_attention(q, k, v, pattern, is_causal=True).float().square().sum()

    with torch.autocast("cuda", torch.bfloat16):
        want = torch.autograd.grad(loss(q, k, v), (q, k, v))
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
