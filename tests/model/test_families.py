"""Dilated attention inside every family: with one branch it is sdpa, with several it is its definition."""

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from longnet.attention.reference import multiplicity
from longnet.model.versions import CACHE
from model.families import (
    BRANCHES,
    CAUSAL,
    FAMILIES,
    ONE_BRANCH,
    TEXT,
    VERSION,
    build,
    dilated,
    positions_of,
    skip_broken_prefill,
    tokens_of,
)

TOKENS = 37
DROP_IN = {"atol": 1e-5, "rtol": 0}  # the claim: logits and gradients of sdpa to 1e-5
SAME = {"atol": 1e-5, "rtol": 1e-5}


def texts(mode: str) -> tuple[dict, torch.Tensor]:
    """The inputs of a mode, and which of their tokens are real."""
    ids = tokens_of(2, TOKENS)
    mask = torch.ones_like(ids)
    if mode == "right padding":
        mask[0, 23:] = 0
    if mode == "left padding":
        mask[0, :14] = 0
    if mode == "packed documents":
        positions = torch.cat([torch.arange(n) for n in (11, 6, 20)]).expand(2, -1)
        return {"input_ids": ids, "position_ids": positions, "use_cache": False}, mask.bool()
    inputs = {"input_ids": ids}
    if mode != "plain":
        inputs |= {"attention_mask": mask, "position_ids": positions_of(mask)}
    return inputs, mask.bool()


def outputs(model, inputs):
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def gradients(model, out):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(11))
    model.zero_grad()
    (out * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_function(sdpa, model, inputs, real):
    expected, out = outputs(sdpa, inputs)[real], outputs(model, inputs)[real]
    torch.testing.assert_close(out, expected, **DROP_IN)
    assert_same_gradients(gradients(model, out), gradients(sdpa, expected))


def assert_same_gradients(found, wanted):
    assert wanted.keys() == found.keys()
    largest = max(grad.abs().max().item() for grad in wanted.values())
    for name, grad in found.items():
        difference = (grad - wanted[name]).abs().max().item()
        assert difference <= 1e-5 * largest, f"{name}: {difference} where the largest gradient is {largest}"


MODES = [
    *[pytest.param(f, "plain", marks=pytest.mark.feature("logits and gradients of sdpa")) for f in TEXT],
    *[pytest.param(f, "right padding", marks=pytest.mark.feature("right padding as sdpa")) for f in TEXT],
    *[pytest.param(f, "left padding", marks=pytest.mark.feature("left padding as sdpa")) for f in TEXT],
    *[pytest.param(f, "packed documents", marks=pytest.mark.feature("packed position_ids as sdpa")) for f in CAUSAL],
]


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_one_branch_is_sdpa(family, mode):
    sdpa = build(family)
    inputs, real = texts(mode)
    assert_same_function(sdpa, dilated(sdpa, ONE_BRANCH), inputs, real)


@pytest.mark.feature("logits and gradients of sdpa")
@pytest.mark.parametrize("family", ["ViT"])
def test_one_branch_is_sdpa_on_images(family):
    sdpa = build(family)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 37, dtype=torch.bool)  # 36 patches and the class token
    assert_same_function(sdpa, dilated(sdpa, ONE_BRANCH), {"pixel_values": pixels}, real)


@pytest.mark.feature("packed cu_seq_lens as separate documents")
@pytest.mark.parametrize("family", TEXT)
def test_cu_seq_lens_separate_documents(family):
    """As DataCollatorWithFlattening sends them; sdpa, document by document, is the truth."""
    sdpa = build(family)
    for model in (dilated(sdpa, ONE_BRANCH), dilated(sdpa, BRANCHES)):
        ids, lengths = tokens_of(1, TOKENS), (11, 6, 20)
        edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = {
            "input_ids": ids,
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": edges,
            "cu_seq_lens_k": edges,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        if family in CAUSAL:
            packed["use_cache"] = False
        truth = sdpa if model.config.segment_lengths == list(ONE_BRANCH.segment_lengths) else model
        alone = [outputs(truth, {"input_ids": part}) for part in ids.split(lengths, 1)]
        torch.testing.assert_close(outputs(model, packed), torch.cat(alone, 1), **DROP_IN)
        if truth is sdpa:
            assert_same_gradients(gradients(model, outputs(model, packed)), gradients(sdpa, torch.cat(alone, 1)))


@pytest.mark.feature("packed position_ids as separate documents")
@pytest.mark.parametrize("family", CAUSAL)
def test_packed_is_separate_with_several_branches(family):
    model = dilated(build(family), BRANCHES)
    ids, lengths = tokens_of(2, TOKENS), (11, 6, 20)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = outputs(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    alone = [outputs(model, {"input_ids": part}) for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **SAME)


@pytest.mark.feature("left and right padding as unpadded")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", TEXT)
def test_padded_is_unpadded_with_several_branches(family, side):
    model = dilated(build(family), BRANCHES)
    ids = tokens_of(2, TOKENS)
    mask = torch.ones_like(ids)
    real = slice(14, None) if side == "left" else slice(None, 23)
    mask[0] = 0
    mask[0, real] = 1
    padded = outputs(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)})
    torch.testing.assert_close(padded[0, real], outputs(model, {"input_ids": ids[:1, real]})[0], **SAME)
    torch.testing.assert_close(padded[1], outputs(model, {"input_ids": ids[1:]})[0], **SAME)


@pytest.mark.feature("several branches as a dense mask")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_several_branches_are_sdpa_with_a_multiplicity_mask(family):
    """A key that n branches see counts n times: sdpa with log(n) added to its score."""
    sdpa = build(family)
    is_causal = FAMILIES[family].is_causal
    heads, kv_heads = 4, getattr(sdpa.config, "num_key_value_heads", None) or 4
    if FAMILIES[family].is_text:
        inputs = {"input_ids": tokens_of(1, TOKENS)}
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))}
    positions = torch.arange(TOKENS)[None]
    count = multiplicity(positions, torch.zeros_like(positions), BRANCHES, num_kv_heads=kv_heads, is_causal=is_causal)
    bias = count.double().log().float().repeat_interleave(heads // kv_heads, 1)
    if family == "ViT" and Version("5.10") > VERSION:
        pytest.skip(f"transformers {VERSION} drops the masks of a ViT")
    expected = outputs(sdpa, {**inputs, "attention_mask": bias})
    torch.testing.assert_close(outputs(dilated(sdpa, BRANCHES), inputs), expected, **DROP_IN)


@pytest.mark.feature("cached logits and gradients of sdpa")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_one_branch_is_sdpa_through_a_cache(family, cache):
    """A left-padded batch, prefilled in two chunks and then token by token; a static cache has no gradient."""
    sdpa = build(family)
    ids = tokens_of(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = positions_of(mask)

    def run(model):
        past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=50)
        parts, start = [], 0
        for stop in (9, 16, *range(17, 25)):
            step = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            step |= {"attention_mask": mask[:, :stop], CACHE: past, "use_cache": True}
            parts.append(outputs(model, step))
            start = stop
        return torch.cat(parts, 1)[mask[:, :24].bool()]

    model = dilated(sdpa, ONE_BRANCH)
    with torch.set_grad_enabled(cache == "dynamic"):
        expected, out = run(sdpa), run(model)
    torch.testing.assert_close(out, expected, **DROP_IN)
    if cache == "dynamic":
        assert_same_gradients(gradients(model, out), gradients(sdpa, expected))


@pytest.mark.feature("cached decoding as the full forward")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_cached_decoding_is_the_full_forward(family, cache):
    model = dilated(build(family), BRANCHES)
    ids = tokens_of(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = positions_of(mask)
    full = outputs(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    past = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=50)
    )
    parts, start = [], 0
    with torch.no_grad():
        for stop in (9, 16, *range(17, TOKENS + 1)):  # a prefill in two chunks, then token by token
            step = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            step |= {"attention_mask": mask[:, :stop], CACHE: past, "use_cache": True}
            parts.append(outputs(model, step))
            start = stop
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], full[mask.bool()], **SAME)


GENERATIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beam search": {"do_sample": False, "num_beams": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
}


def generate(model, mask, **settings):
    torch.manual_seed(17)
    result = model.generate(
        tokens_of(2, 13), attention_mask=mask, max_new_tokens=9, min_new_tokens=9, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "way"),
    [pytest.param(f, way, marks=pytest.mark.feature(f"generate(): {way}")) for way in GENERATIONS for f in CAUSAL],
)
def test_generate_as_sdpa_and_as_without_cache(family, way, cache):
    if way == "chunked prefill":
        skip_broken_prefill(cache)
    sdpa = build(family)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    settings = {**GENERATIONS[way], "cache_implementation": cache}
    expected, expected_logits = generate(sdpa, mask, **settings)
    tokens, logits = generate(dilated(sdpa, ONE_BRANCH), mask, **settings)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, **DROP_IN)
    model = dilated(sdpa, BRANCHES)
    tokens, logits = generate(model, mask, **settings)
    without = {key: value for key, value in GENERATIONS[way].items() if key != "prefill_chunk_size"}
    assert torch.equal(tokens, generate(model, mask, use_cache=False, **without)[0])
    assert not torch.allclose(logits, expected_logits, **DROP_IN)


@pytest.mark.feature("generate(): left-padded as alone")
@pytest.mark.parametrize("family", CAUSAL)
def test_generate_left_padded_as_alone(family):
    model = dilated(build(family), BRANCHES)
    ids = tokens_of(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], **settings)
    assert torch.equal(together[:1, 13:], alone[:, 9:])
