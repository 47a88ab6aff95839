"""Steps in chunks that tests take: models, tokens, and one pass over the whole for comparison."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longnet
from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from longnet.training.chunked import ChunkedStep

PATTERN = DilationPattern((8, 20, 64), (1, 3, 8))


def longnet_model(pattern=PATTERN, *, layers=2, position="rope", device="cpu", **fields):
    torch.manual_seed(0)
    config = LongNetConfig(
        **{
            "attn_implementation": "dilated", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "segment_lengths": pattern.segment_lengths,
            "dilation_rates": pattern.dilation_rates, "head_offsets": pattern.head_offsets,
            "queries": pattern.queries, "position_embedding": position, **fields,
        }
    )  # fmt: skip
    return LongNetForCausalLM(config).double().train().to(device)


def llama(pattern=PATTERN, *, device="cpu"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().train()
    longnet.use_dilated_attention(model, pattern)
    return model.to(device)


def tokens_of(rows, tokens, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, 50, (rows, tokens), generator=generator) for _ in "it")
    targets[:, 3::7] = -100
    return ids.to(device), targets.to(device)


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
    assert_same_gradients(gradients(model), wanted, limit=limit)


def assert_same_gradients(got, wanted, *, limit=1e-10):
    assert got.keys() == wanted.keys()
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (got[name] - gradient).norm()
        assert error <= limit * max(gradient.norm(), 1e-3 * scale), (name, (error / gradient.norm()).item())


def reader_of(ids, targets):
    return lambda start, stop: (ids[:, start:stop], targets[:, start:stop])


def learn_to_the_end(folder, sender, device="cpu"):
    """Learn from a batch of two parts, going on where the folder says; tell of each chunk, and leave the result."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    pattern = DilationPattern((8, 64, 256), (1, 4, 16))
    model = longnet_model(pattern, hidden_dropout=0.1, drop_path=0.1, device=device).float()
    with ChunkedStep(
        model, reader_of(*tokens_of(2, 600)), sequences=2, tokens=600, chunk_tokens=24, items=900, parts=2, seed=(1, 2),
        folder=Path(folder),
    ) as step:  # fmt: skip
        for count, progress in enumerate(step):
            sender.send(progress.is_learning)
            if count % 5 == 4:
                step.save()
        torch.save([step.loss, gradients(model)], folder / "result.pt")
