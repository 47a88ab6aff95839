"""Models on the fused kernel, in Triton's interpreter: test_backends.py runs this file in a process of its own."""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import longnet
from longnet import DilatedCache, DilatedSelfAttention, DilationPattern
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.blocks import Blocks
from longnet.evaluation.perplexity import EvaluateConfig
from longnet.model import LongNetConfig, LongNetForCausalLM, LongNetModel
from longnet.training.chunked import chunked_gradients
from longnet.training.config import DataConfig, ModelConfig, Recipe, TrainConfig
from longnet.training.loop import train
from tolerances import SAME_FLOAT32
from training.conftest import write_data

SIZES = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "segment_lengths": (8, 18), "dilation_rates": (1, 3), "pad_token_id": 0,
}  # fmt: skip
CLOSE = {"rtol": 10 * SAME_FLOAT32, "atol": 10 * SAME_FLOAT32}  # of sums over layers
IDS = torch.randint(1, 20, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels that were launched: which shows that the backend was there at all."""
    for blocks in ("forward_blocks", "query_blocks", "key_blocks", "decode_blocks"):  # of the interpreter's pace
        monkeypatch.setattr(launch, blocks, lambda *_, **__: Blocks(16, 16, 4, 1))
    names, launch_once = [], launch._launch
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda kernel, *rest, **more: names.append(kernel.__name__) or launch_once(kernel, *rest, **more),
    )
    return names


def both(model):
    """Yield the model on tiles, then on the fused kernel."""
    for name in ("dilated", "dilated_triton"):
        model.set_attn_implementation(name)
        model.zero_grad(set_to_none=True)
        yield model


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def same(pair, launched, *kernels):
    want, got = pair
    torch.testing.assert_close(got, want, **CLOSE)
    assert set(launched) == set(kernels)


def learned(model, **inputs):
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits = model(**inputs).logits[real]
    logits[:-1].log_softmax(-1).gather(1, inputs["input_ids"][real][1:, None]).sum().backward()
    return {"logits": logits.detach(), **gradients(model)}


def test_logits_and_gradients_of_a_padded_batch(launched):
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    model = LongNetForCausalLM(LongNetConfig(**SIZES, queries="all"))
    inputs = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
    same([learned(each, **inputs) for each in both(model)], launched, "attend", "backward_queries", "backward_keys")


def test_a_model_of_transformers(launched, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name not in ("segment_lengths", "dilation_rates")}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    pattern = DilationPattern((8, 18), (1, 3))
    found = []
    for backend in ("auto", "triton"):
        longnet.use_dilated_attention(model, pattern, backend=backend)
        model.zero_grad(set_to_none=True)
        found.append(learned(model, input_ids=IDS[:1], use_cache=False))
    same(found, launched, "attend", "backward_queries", "backward_keys")
    model.save_pretrained(tmp_path)
    assert "triton" not in (tmp_path / "config.json").read_text()


def test_an_encoder_with_tails_of_torchscale(launched):
    model = LongNetModel(LongNetConfig(**{**SIZES, "is_causal": False, "tail": "torchscale", "dilation_rates": (1, 4)}))
    found = []
    for each in both(model):
        hidden = each(input_ids=IDS[:1, :20]).last_hidden_state
        (hidden * torch.linspace(-1, 1, 32)).sum().backward()
        found.append({"hidden": hidden.detach(), **gradients(each)})
    same(found, launched, "attend", "backward_queries", "backward_keys")


def test_generation_and_a_cache_that_is_made_before_the_first_token(launched):
    model = LongNetForCausalLM(LongNetConfig(**SIZES)).eval()
    texts, logits = [], []
    for each in both(model):
        texts.append(each.generate(IDS[:, :12], max_new_tokens=3, min_new_tokens=3, do_sample=False))
        cache = DilatedCache(each.config, batch_size=2, dtype=torch.float32, device="cpu")
        parts = [IDS[:, :9], *IDS[:, 9:12].split(1, dim=1), IDS[:, 12:16], IDS[:, 16:17]]
        with torch.no_grad():
            logits.append(torch.cat([each(part, cache=cache).logits for part in parts], 1))
    assert torch.equal(*texts)
    same(logits, launched, "attend", "decode")
    with torch.no_grad():
        torch.testing.assert_close(logits[1], model(IDS[:, :17], use_cache=False).logits, **CLOSE)


def test_one_cache_serves_both_in_turns():
    model = LongNetForCausalLM(LongNetConfig(**SIZES)).eval()
    cache, found = DilatedCache(model.config), []
    with torch.no_grad():
        want = model(IDS[:, :16], use_cache=False).logits
        for index, part in enumerate(IDS[:, :16].split([9, 1, 1, 1, 2, 1, 1], dim=1)):
            model.set_attn_implementation(("dilated", "dilated_triton")[index // 2 % 2])
            found.append(model(part, cache=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), want, **CLOSE)


def test_a_step_in_chunks(launched):
    model, found = LongNetForCausalLM(LongNetConfig(**SIZES)), []
    for each in both(model):
        loss = chunked_gradients(each, IDS[:1, :20], IDS[:1, 1:21], chunk_tokens=12)
        found.append({"loss": torch.tensor(loss), **gradients(each)})
    same(found, launched, "attend", "backward_queries", "backward_keys", "backward_halo")


def test_a_slice_of_a_sequence(launched):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = LongNetForCausalLM(LongNetConfig(**SIZES))
    try:
        with longnet.sequence_parallel(init_device_mesh("cpu", (1,), mesh_dim_names=("sp",))["sp"]):
            found = [learned(each, input_ids=IDS[:1]) for each in both(model)]
    finally:
        dist.destroy_process_group()
    same(found, launched, "attend", "backward_queries", "backward_keys")


def test_a_layer(launched):
    x, found = torch.randn(1, 20, 32), []
    layers = [
        DilatedSelfAttention(32, 2, DilationPattern((8, 18), (1, 3)), backend=name) for name in ("auto", "triton")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        out = layer(x, is_causal=True)
        out.sum().backward()
        found.append({"out": out.detach(), **gradients(layer)})
    same(found, launched, "attend", "backward_queries", "backward_keys")


def test_a_run_is_resumed_by_another_backend(launched, tmp_path):
    """Who computes is no part of what is learned; the recipe's flag is the whole of what a user writes."""
    data = write_data(tmp_path / "DATA", seed=0)
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "segment_lengths", "dilation_rates")}
    losses = []
    for backend in ("auto", "triton"):
        for steps in (1, 2):
            recipe = Recipe(
                data=DataConfig(path=data),
                model=ModelConfig(**sizes, num_hidden_layers=1),
                evaluate=EvaluateConfig(contexts=(24,), tokens=24),
                train=TrainConfig(
                    steps=steps, tokens=24, batch_sequences=1, log_every=1, device="cpu",
                    backend=backend if steps == 2 else "auto",
                ),
            )  # fmt: skip
            recipe.optim.schedule, recipe.optim.warmup_steps = "constant", 0
            with contextlib.redirect_stdout(None):
                train(recipe, tmp_path / backend, resume=steps == 2, progress=False)
        rows = [json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()]
        losses.append(torch.tensor([row["loss"] for row in rows if row["kind"] == "train"]))
    assert len(losses[0]) == 2
    assert {"attend", "backward_queries", "backward_keys"} <= set(launched)
    torch.testing.assert_close(*losses, **CLOSE)
