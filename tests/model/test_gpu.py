"""Whole models on a CUDA device give what they give on the CPU: outputs, gradients, generated tokens, saved caches."""

import copy

import pytest
import torch

import longnet
from cases import DEVICES
from longnet import DilatedCache
from longnet.model.versions import CACHE
from model.families import BRANCHES, CAUSAL, FAMILIES, TEXT, build, dilated, tokens_of

pytestmark = pytest.mark.parametrize("device", DEVICES[1:])

EXACT, ROUNDED = 1e-9, 5e-6  # relative, float64 on two devices; ROUNDED where transformers computes in float32 within


def on_both(model, device):
    return copy.deepcopy(model), model.to(device)


def error_of(model):
    """Return what two devices may differ by: rotations and RMSNorms of transformers are float32 in any model.

    One unit in the last place of the sines gives 6e-7 (Qwen3), another order of RMSNorm's sums 5e-7.
    """
    within = {type(module) for module in model.modules() if type(module).__module__.startswith("transformers.")}
    is_rounded = any(kind.__name__.endswith(("RotaryEmbedding", "RMSNorm")) for kind in within)
    return ROUNDED if is_rounded else EXACT


def outputs_and_gradients(model, **inputs):
    output = model(**inputs)
    found = output.logits if "logits" in output else output.last_hidden_state
    found.square().mean().backward()
    return {"output": found.detach(), **{name: x.grad for name, x in model.named_parameters() if x.grad is not None}}


def assert_near(got, expected, error=EXACT):
    assert got.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        assert (got[name].cpu() - x).abs().max() <= error * max(x.abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_does_on_the_cpu(family, is_padded, device):
    cpu, gpu = on_both(dilated(build(family), BRANCHES).double(), device)
    if family not in TEXT:
        if is_padded:
            pytest.skip("images are not padded")
        inputs = {"pixel_values": torch.randn(2, 3, 24, 24, dtype=torch.float64)}
    else:
        inputs = {"input_ids": tokens_of(2, 70)}
        if is_padded:
            mask = torch.ones(2, 70, dtype=torch.long)
            mask[0, 50:] = 0  # behind, where positions need not be told
            inputs["attention_mask"] = mask
        if family in CAUSAL:
            inputs["use_cache"] = False
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    expected, got = outputs_and_gradients(cpu, **inputs), outputs_and_gradients(gpu, **moved)
    if is_padded:
        expected["output"], got["output"] = (
            x["output"] * inputs["attention_mask"][..., None].to(x["output"].device) for x in (expected, got)
        )
    assert_near(got, expected, error_of(cpu))


def test_packed_documents(device):
    cpu, gpu = on_both(dilated(build("LongNet"), BRANCHES).double(), device)
    edges = torch.tensor([0, 5, 40, 70], dtype=torch.int32)
    positions = torch.cat([torch.arange(size) for size in edges.diff().tolist()])[None]
    inputs = {
        "input_ids": tokens_of(1, 70), "position_ids": positions, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges,
    }  # fmt: skip
    moved = {name: x.to(device) for name, x in inputs.items()}
    expected = outputs_and_gradients(cpu, **inputs, use_cache=False)
    assert_near(outputs_and_gradients(gpu, **moved, use_cache=False), expected)


@pytest.mark.parametrize("family", ["LongNet", "Llama"])
def test_greedy_tokens(family, device):
    cpu, gpu = on_both(dilated(build(family), BRANCHES).double(), device)
    ids = tokens_of(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = cpu.generate(ids, attention_mask=mask, **settings)
    got = gpu.generate(ids.to(device), attention_mask=mask.to(device), **settings)
    assert torch.equal(got.cpu(), expected)


@torch.no_grad()
def test_a_cache_saved_on_a_device_goes_on_there_and_on_the_cpu(device, tmp_path):
    cpu, gpu = on_both(dilated(build("Llama"), BRANCHES).double(), device)
    ids = tokens_of(2, 60)
    expected = cpu(ids, use_cache=False).logits[:, 41:]
    cache = DilatedCache(gpu.config)
    gpu(ids[:, :41].to(device), **{CACHE: cache})
    cache.save(tmp_path / "cache")
    for model, place in ((gpu, device), (cpu, "cpu")):
        loaded = DilatedCache.load(tmp_path / "cache", model.config, device=torch.device(place))
        got = model(ids[:, 41:].to(place), **{CACHE: loaded}).logits
        torch.testing.assert_close(got.cpu(), expected, atol=ROUNDED, rtol=ROUNDED)


@pytest.mark.parametrize("tail", ["exact", "torchscale"])
def test_slides(tail, device):
    config = longnet.LongNetSlideConfig(
        feature_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, segment_lengths=(8, 18, 32),
        dilation_rates=(1, 2, 4), classifier_layers=(1,), num_labels=3, tail=tail,
    )  # fmt: skip
    cpu, gpu = on_both(longnet.LongNetSlideModel(config).double().eval(), device)
    slides = [
        (
            torch.randn(tiles, 12, dtype=torch.float64),
            torch.stack([torch.arange(tiles) // 8, torch.arange(tiles) % 8], 1) * 256,
        )
        for tiles in (57, 30)
    ]
    found = []
    for model, place in ((cpu, "cpu"), (gpu, device)):
        output = model(**longnet.collate_slides([(x.to(place), coords.to(place)) for x, coords in slides]))
        output.pooled.square().mean().backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        found.append({"output": output.pooled.detach(), **gradients})
    assert_near(found[1], found[0])
