"""Learning rates by hand; who decays."""

import math

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.training.optim import OptimConfig, gradient_norm, learning_rate, make_optimizer, update


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "polynomial", "power": 2.0}, [0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625]),
        ({"schedule": "cosine"}, [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "min_lr_ratio": 0.2}, [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
    ],
)
def test_learning_rates(settings, expected):
    optim = OptimConfig(lr=1.0, warmup_steps=2, **settings)
    assert [learning_rate(optim, step, 6) for step in range(6)] == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_longer_than_the_run_and_none_at_all():
    assert [learning_rate(OptimConfig(lr=1.0, warmup_steps=10), step, 2) for step in range(2)] == [0.5, 1.0]
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 0, 1) == 1.0


@pytest.fixture
def model():
    return LongNetForCausalLM(LongNetConfig.preset("tiny", hidden_size=16, num_hidden_layers=1, vocab_size=11))


def test_matrices_alone_decay(model):
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named)  # the tied head is the embedding's weight, once
    for name, weight in named.items():
        is_matrix = name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "embed_tokens.weight"))
        assert decay[weight] == (0.3 if is_matrix else 0.0), name
    assert all(group["fused"] for group in optimizer.param_groups)


def test_an_update_is_that_of_adamw_with_the_clipped_gradient(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 16))
    optim = OptimConfig(lr=0.1, clip=0.01, weight_decay=0.1)
    optimizer = make_optimizer(model, optim)
    model(ids, labels=ids).loss.backward()
    norm = gradient_norm(model)
    assert norm == pytest.approx(torch.cat([w.grad.flatten() for w in model.parameters()]).norm().item(), rel=1e-5)
    assert norm > optim.clip
    before = {name: weight.detach().double() for name, weight in model.named_parameters()}
    gradients = {name: weight.grad.double() * optim.clip / norm.double() for name, weight in model.named_parameters()}
    update(optimizer, lr=0.02, clip=optim.clip, norm=norm)
    for name, weight in model.named_parameters():
        # the first step of Adam: both moments are the gradient's, freed of their bias
        decayed = before[name] * (1 - 0.02 * (0.1 if weight.ndim >= 2 else 0.0))
        expected = decayed - 0.02 * gradients[name] / (gradients[name].abs() + optim.eps)
        torch.testing.assert_close(weight.double(), expected, atol=2e-4, rtol=1e-4)
        assert weight.grad is None


def test_clip_0_never_clips(model):
    optimizer = make_optimizer(model, OptimConfig(clip=0, betas=(0.0, 0.0)))
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 100.0)
    update(optimizer, lr=0.0, clip=0, norm=gradient_norm(model))
    assert all((state["exp_avg"] == 100).all() for state in optimizer.state.values())
