"""The loss without all logits against cross_entropy of all logits, along both of its paths, and its memory."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.model import loss as loss_module

FLOAT64 = 1e-11
BFLOAT16 = 2**-7
next_token_loss = functools.partial(loss_module.next_token_loss, vocab_size=61)
PATHS = ["linear_cross_entropy", "chunks"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Torch's own function, or what torch 2.11 has; 7 rows a chunk."""
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 7 * 61)
    if request.param == "chunks":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    return request.param


def drawn(dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    head = nn.Linear(16, 61, bias=bias, dtype=dtype)
    labels = torch.randint(61, (3, 25))
    labels[torch.rand(3, 25) < 0.2] = -100
    return head, torch.randn(3, 25, 16, dtype=dtype, requires_grad=True), labels


def dense(head, hidden, labels, divisor=None):
    logits = head(hidden)[:, :-1].flatten(0, 1)
    total = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten(), reduction="sum"
    )
    return total / (divisor or (labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divisor", [None, 31, torch.tensor(31)])
def test_loss_and_gradients_are_those_of_all_logits(path, divisor, bias):
    head, hidden, labels = drawn(bias=bias)
    got = next_token_loss(head, hidden, labels, num_items_in_batch=divisor)
    exact = dense(head, hidden, labels, divisor)
    torch.testing.assert_close(got, exact, atol=FLOAT64, rtol=FLOAT64)
    wanted = (hidden, *head.parameters())
    grads = torch.autograd.grad(3 * got, wanted), torch.autograd.grad(3 * exact, wanted)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=FLOAT64, rtol=FLOAT64)


def test_labels_may_come_shifted(path):
    head, hidden, labels = drawn()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    got = next_token_loss(head, hidden, None, shift_labels=shifted)
    assert torch.equal(got, next_token_loss(head, hidden, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_a_half_precision_model_is_float32(path, dtype):
    """Torch's function answers in the dtype of its input: 0.5 % off in bfloat16."""
    head, hidden, labels = drawn(dtype)
    got = next_token_loss(head, hidden, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, dense(head, hidden, labels), atol=1e-6, rtol=1e-6)
    (got_grad,) = torch.autograd.grad(got, hidden)
    (exact,) = torch.autograd.grad(dense(*(x.double() for x in (head, hidden)), labels), hidden)
    torch.testing.assert_close(got_grad, exact, atol=BFLOAT16 * exact.abs().max().item(), rtol=0)


def test_a_frozen_head_and_a_frozen_body(path):
    for frozen in ("head", "body"):
        head, hidden, labels = drawn()
        exact = dense(head, hidden, labels)
        (head.weight if frozen == "head" else hidden).requires_grad_(False)
        got = next_token_loss(head, hidden, labels)
        wanted = hidden if frozen == "head" else head.weight
        torch.testing.assert_close(
            torch.autograd.grad(got, wanted), torch.autograd.grad(exact, wanted), atol=FLOAT64, rtol=FLOAT64
        )
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(head, hidden, labels), exact, atol=FLOAT64, rtol=FLOAT64)


def test_a_head_that_is_more_than_its_weight_is_called(path):
    """An adapter (LoRA) on the head must not be passed by."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    _, hidden, labels = drawn()
    for head in (
        Adapted(16, 61, dtype=torch.float64),
        nn.Sequential(nn.Tanh(), nn.Linear(16, 61, dtype=torch.float64)),
    ):
        torch.testing.assert_close(
            next_token_loss(head, hidden, labels), dense(head, hidden, labels), atol=FLOAT64, rtol=FLOAT64
        )
    head = nn.Linear(16, 61, dtype=torch.float64)
    head.register_forward_hook(lambda _module, _args, out: 3 * out)
    torch.testing.assert_close(
        next_token_loss(head, hidden, labels), dense(head, hidden, labels), atol=FLOAT64, rtol=FLOAT64
    )


def test_a_second_backward_pass_is_right_or_raises(path):
    """Never gradients of what the first pass has consumed."""
    head, hidden, labels = drawn()
    loss = next_token_loss(head, hidden, labels)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    if path == "chunks":
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)
    else:
        with pytest.raises(RuntimeError, match="backward called twice; retain_graph=True"):
            torch.autograd.grad(loss, hidden)


def test_labels_must_fit():
    head, hidden, labels = drawn()
    with pytest.raises(ValueError, match=r"labels must be \(3, 25\)"):
        next_token_loss(head, hidden, labels[:, 1:])
    with pytest.raises(ValueError, match="labels or shift_labels"):
        next_token_loss(head, hidden, None)


def test_in_training_the_model_returns_no_logits(path):
    model = LongNetForCausalLM(LongNetConfig.preset("tiny", vocab_size=61)).double()
    ids = torch.randint(61, (2, 40))
    logits = model.eval()(ids).logits
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    trained = model.train()(ids, labels=ids)
    assert trained.logits is None
    assert model(ids).logits is not None
    evaluated = model.eval()(ids, labels=ids, logits_to_keep=2)  # the loss is over all labels all the same
    assert torch.equal(evaluated.logits, logits[:, -2:])
    for loss in (trained.loss, evaluated.loss, model(ids, labels=ids, return_dict=False)[0]):
        torch.testing.assert_close(loss, exact, atol=FLOAT64, rtol=FLOAT64)
    halves = [model(ids[row : row + 1], labels=ids[row : row + 1], num_items_in_batch=78).loss for row in (0, 1)]
    torch.testing.assert_close(sum(halves), exact, atol=FLOAT64, rtol=FLOAT64)


_MEASURE = """
import sys, torch
from torch.nn import functional
from longnet import LongNetConfig, LongNetForCausalLM
from longnet.measurement import peak_bytes
if sys.argv[1] == "chunks":
    functional.__dict__.pop("linear_cross_entropy", None)
model = LongNetForCausalLM(
    LongNetConfig.preset("tiny", vocab_size=32768, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
).train()
warm = torch.zeros(1, 64, dtype=torch.long)
model(warm, labels=warm).loss.backward()
before = peak_bytes(torch.device("cpu"), reset=True)
ids = torch.randint(32768, (1, 32768))
model(ids, labels=ids).loss.backward()
assert model.model.embed_tokens.weight.grad.isfinite().all()
print(peak_bytes(torch.device("cpu")) - before)
"""


@pytest.mark.parametrize("path", PATHS)
def test_32k_tokens_of_32k_words_take_a_tenth_of_their_logits(path):
    """All of them would be 4 GiB, and as much again for their gradients."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, path], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 32768 * 32768 * 4 / 10
