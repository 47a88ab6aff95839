"""Each kernel against plain softmax; those for CUDA by shape, on meta tensors, where no GPU is at hand."""

import logging

import pytest
import torch

from longnet import DilationPattern, dilated_attention
from longnet.attention import dilated, registration
from longnet.attention.backends import dispatch, sdpa

ON_CPU = [kernel for kernel in sdpa.KERNELS if kernel.refusal(torch.device("cpu"), torch.float64, 8) is None]
ON_CUDA = [sdpa.CuDNN(), sdpa.FlashCUDA(), sdpa.Efficient()]


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_kernels_backward_takes_the_merged_output(kernel, is_causal):
    """Two tiles, each with half the keys, give the gradients of the softmax over all."""
    q = torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, 34, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    hidden = torch.ones(17, 17, dtype=torch.bool).triu(1).repeat(1, 2) if is_causal else torch.tensor(False)
    scores = (0.3 * q @ k.mT).masked_fill(hidden, -torch.inf)
    out, lse, dout = scores.softmax(-1) @ v, scores.logsumexp(-1), torch.randn(2, 3, 17, 8, dtype=torch.float64)
    want = torch.autograd.grad(out, (q, k, v), dout)
    halves = [slice(0, 17), slice(17, 34)]
    parts = [kernel.attend(q, k[:, :, half], v[:, :, half], is_causal=is_causal, scale=0.3) for half in halves]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse)
    grads = [
        kernel.attend_backward(
            dout, q.detach(), k.detach()[:, :, half], v.detach()[:, :, half], out.detach(), lse.detach(),
            is_causal=is_causal, scale=0.3,
        )
        for half in halves
    ]  # fmt: skip
    torch.testing.assert_close(grads[0][0] + grads[1][0], want[0])
    torch.testing.assert_close(torch.cat([grads[0][1], grads[1][1]], 2), want[1])
    torch.testing.assert_close(torch.cat([grads[0][2], grads[1][2]], 2), want[2])


@pytest.mark.parametrize("kernel", ON_CUDA, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_cuda_kernels_by_shape(kernel, rows):
    q, k, v, dout = (torch.empty(3, rows, 4, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "qkvo")
    out, lse = kernel.attend(q, k, v, is_causal=True, scale=0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    merged = torch.empty(4, 3, rows, device="meta").transpose(0, 1)
    grads = kernel.attend_backward(dout, q, k, v, out, merged, is_causal=True, scale=0.1)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]


@pytest.fixture
def hopper(monkeypatch):
    """Let the dispatcher believe in an H100 with everything switched on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for kernel in (sdpa.CuDNN, sdpa.FlashCUDA, sdpa.Efficient):
        monkeypatch.setattr(kernel, "is_enabled", lambda self: True)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "name"),
    [
        (torch.bfloat16, 64, "cuDNN"),
        (torch.bfloat16, 192, "flash (CUDA)"),
        (torch.float32, 64, "memory-efficient (CUDA)"),
        (torch.float64, 64, "math"),
        (torch.bfloat16, 20, "math"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_the_fastest_kernel_that_can_run_is_taken(dtype, head_dim, name):
    assert dispatch.choose("auto", torch.device("cuda"), dtype, head_dim).name == name


@pytest.mark.parametrize("kernel", ON_CUDA, ids=lambda kernel: kernel.name)
def test_the_whole_op_on_cuda_by_shape(kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_: kernel)
    q = torch.empty(2, 300, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k, v = (torch.empty(2, 300, 2, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "kv")
    settings = ([64, 128, 96], [1, 2, 5], "mod", "all", 0, [], True, 0.1, "auto")
    forward, backward = registration.implement(dilated._lay_out)
    out, lse = forward(q, k, v, None, None, *settings)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, q.shape[:3])
    grads = backward(torch.empty_like(out), q, k, v, out, lse, None, *settings)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


@pytest.mark.usefixtures("hopper")
def test_why_a_kernel_is_not_taken(monkeypatch):
    refused = sdpa.refusals(torch.device("cuda"), torch.float32, 64)
    assert refused["flash (CPU)"] == "runs on the CPU, not on cuda"
    assert refused["cuDNN"] == "has no torch.float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert (
        "needs compute capability (8, 0), got (7, 5)"
        in sdpa.refusals(torch.device("cuda"), torch.float16, 64)["flash (CUDA)"]
    )
    monkeypatch.setattr(sdpa.Efficient, "is_enabled", lambda self: False)
    assert "switched off" in sdpa.refusals(torch.device("cuda"), torch.float16, 64)["memory-efficient (CUDA)"]


def test_auto_says_once_what_it_took(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        for _ in range(3):
            dilated_attention(*torch.randn(3, 1, 1, 8, 24), DilationPattern((4,), (1,)))
    messages = [record.getMessage() for record in caplog.records if "kernel" in record.getMessage()]
    assert len(messages) == 1
    assert "kernel flash (CPU)" in messages[0]
    assert "cuDNN runs on CUDA, not on cpu" in messages[0]


def test_what_nothing_can_run_is_refused_with_every_reason():
    q = torch.zeros(1, 1, 8, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"cannot run on torch.float8_e4m3fn.*CPU\) has no.*math has no.*Cast"):
        dilated_attention(q, q, q, DilationPattern((4,), (1,)))


def test_views_that_32_bits_cannot_address_are_copied():
    storage = torch.empty(2**31 + 1, dtype=torch.bfloat16, device="meta")
    near = storage.as_strided((2, 1, 1, 1), (2**31 - 1, 1, 1, 1))
    assert sdpa._int32_addressable(near) is near
    far = storage.as_strided((2, 1, 1, 1), (2**31, 1, 1, 1))
    assert sdpa._int32_addressable(far).stride() == (1, 1, 1, 1)
