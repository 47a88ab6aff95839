"""The kernels that need no CUDA, against plain softmax."""

import pytest
import torch

from longnet.attention.backends import dispatch, sdpa
from tolerances import FLOAT64

ON_CPU = [kernel for kernel in dispatch.KERNELS if kernel.refusal(torch.device("cpu"), torch.float64, 8) is None]


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


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("most", [1, 40, 300, 1500])
def test_plain_pytorch_never_forms_more_scores_than_it_may(most, is_causal, monkeypatch):
    q, k, v, dout = torch.randn(4, 3, 2, 20, 8, dtype=torch.float64)
    want = sdpa.Math().attend(q, k, v, is_causal=is_causal, scale=0.3)
    grads = sdpa.Math().attend_backward(dout, q, k, v, *want, is_causal=is_causal, scale=0.3)
    monkeypatch.setattr(sdpa, "_MAX_SCORES", most)
    formed = []
    scores = sdpa._scores
    monkeypatch.setattr(sdpa, "_scores", lambda *args, **kw: formed.append(scores(*args, **kw)) or formed[-1])
    got = sdpa.Math().attend(q, k, v, is_causal=is_causal, scale=0.3)
    got_grads = sdpa.Math().attend_backward(dout, q, k, v, *got, is_causal=is_causal, scale=0.3)
    for a, b in zip((*got, *got_grads), (*want, *grads), strict=True):
        torch.testing.assert_close(a, b, atol=FLOAT64, rtol=0)
    assert max(x.numel() for x in formed) <= max(most, 20)  # a row is never cut
    assert len(formed) > 2
