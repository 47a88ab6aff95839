"""Documents in a row, told of in every way that callers have, in every kind of model.

| source | instance | right value |
|---|---|---|
| tried here | position_ids that restart, in a decoder that makes a cache by default | as alone; no cache |
| tried here | … with a mask of ones beside them | each document as alone |
| tried here | … with padding beside them | each document as alone |
| tried here | … given to an encoder (BERT, RoBERTa, EuroBERT) | each document as alone |
| axolotl, LLaMA-Factory | a mask that numbers the documents, 1, 1, 2, 2, 0 | each document as alone |
| DataCollatorWithFlattening(return_seq_idx=True) | seq_idx | each document as alone |
| tried here | … in RoBERTa's kin, whose positions begin behind padding's: off by 1.25 of 1.27 | as alone |
| tried here | … in a model that takes no position_ids and has a table of them (BART) | one line |
| tried here | … or position_ids in a LongNet encoder's head, of learned positions | each document as alone |
| tried here | position_ids of several axes that restart (Qwen2-VL): off by 1.19 of 1.2 | each document as alone |
| tried here | two threads, one of which tells of documents: 3 passes in 150 were cut as the other's | each its own |
| tried here | any of these with a cache | one line |
| tried here | an additive mask of two dimensions, 0 and −inf | one line |
"""

import threading

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForCausalLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
)

from longnet import LongNetConfig, LongNetForMaskedLM, use_dilated_attention
from longnet.model.versions import CACHE, checkpoint_layers
from model.families import BRANCHES, CAUSAL, TEXT, VOCAB, build, dilated, tokens_of

LENGTHS = (13, 21, 9)
TOKENS = sum(LENGTHS)
SAME = 2e-5


def restarts(start=0):
    return torch.cat([torch.arange(length) for length in LENGTHS])[None] + start


def numbers():
    return torch.cat([torch.full((length,), index + 1) for index, length in enumerate(LENGTHS)])[None]


def sharpened(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()


def other_encoder(name):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if name == "RoBERTa":
        model = RobertaForMaskedLM(RobertaConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    else:
        model = EuroBertForMaskedLM(EuroBertConfig(**sizes, num_key_value_heads=2, pad_token_id=0, mask_token_id=3))
    use_dilated_attention(sharpened(model), BRANCHES)
    return model


def model_of(name):
    return other_encoder(name) if name in ("RoBERTa", "EuroBERT") else dilated(build(name), BRANCHES)


def alone(model, ids, start=0):
    parts = ids.split(LENGTHS, 1)
    return torch.cat([model(part, position_ids=torch.arange(part.shape[1])[None] + start).logits for part in parts], 1)


@pytest.mark.parametrize("beside", ["nothing", "ones", "padding", "gaps"])
@pytest.mark.parametrize("family", [*TEXT, "RoBERTa", "EuroBERT"])
@torch.no_grad()
def test_position_ids_that_restart(family, beside):
    model, ids, start = model_of(family), tokens_of(1, TOKENS), 2 * (family == "RoBERTa")
    expected, positions, mask = alone(model, ids, start), restarts(start), None
    if beside == "ones":
        mask = torch.ones_like(ids)
    if beside in ("padding", "gaps"):
        documents = ids.split(LENGTHS, 1)
        gap = 3 if beside == "gaps" else 0
        lengths = [len(part[0]) for part in documents]
        ids = torch.cat([torch.cat([torch.zeros(1, gap, dtype=ids.dtype), part], 1) for part in documents], 1)
        positions = torch.cat([torch.cat([torch.zeros(gap, dtype=ids.dtype), torch.arange(n)]) for n in lengths])[None]
        positions = torch.nn.functional.pad(positions + start, (4, 6))
        ids = torch.nn.functional.pad(ids, (4, 6))
        mask = torch.cat(
            [torch.cat([torch.zeros(gap, dtype=ids.dtype), torch.ones(n, dtype=ids.dtype)]) for n in lengths]
        )
        mask = torch.nn.functional.pad(mask[None], (4, 6))
    out = model(ids, position_ids=positions, attention_mask=mask)
    real = slice(None) if mask is None else mask[0] == 1
    torch.testing.assert_close(out.logits[:, real], expected, atol=SAME, rtol=SAME)
    assert getattr(out, CACHE, None) is None


@pytest.mark.parametrize("family", [*TEXT, "EuroBERT"])
@torch.no_grad()
def test_a_mask_that_numbers_the_documents(family):
    model, ids = model_of(family), tokens_of(2, TOKENS)
    mask = torch.cat([numbers(), torch.ones(1, TOKENS, dtype=torch.long)])
    mask[1, :5] = 0
    out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[:1], alone(model, ids[:1]), atol=SAME, rtol=SAME)
    torch.testing.assert_close(out[1:, 5:], model(ids[1:, 5:]).logits, atol=SAME, rtol=SAME)


@torch.no_grad()
def test_seq_idx():
    model, ids = model_of("Llama"), tokens_of(1, TOKENS)
    out = model(ids, seq_idx=(numbers() - 1).int()).logits
    torch.testing.assert_close(out, alone(model, ids), atol=SAME, rtol=SAME)


@pytest.mark.parametrize("family", CAUSAL)
def test_documents_and_a_cache_exclude_each_other(family):
    model, ids = model_of(family), tokens_of(1, TOKENS)
    for told in ({"position_ids": restarts()}, {"attention_mask": numbers()}):
        with pytest.raises(ValueError, match="a cache cannot tell"):
            model(ids, use_cache=True, **told)
        with pytest.raises(ValueError, match="a cache cannot tell"):
            model.generate(ids, max_new_tokens=2, **{"attention_mask": torch.ones_like(ids), **told})
        with pytest.raises(ValueError, match="a cache cannot tell"):
            model.generate(
                ids, max_new_tokens=2, cache_implementation="static", **{"attention_mask": torch.ones_like(ids), **told}
            )


@torch.no_grad()
def test_gradients_where_layers_are_computed_again():
    model, ids = model_of("Llama").train(), tokens_of(1, TOKENS)
    inputs = {"position_ids": restarts(), "attention_mask": torch.ones_like(ids), "labels": ids}
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            checkpoint_layers(model)
        model.zero_grad()
        with torch.enable_grad():
            model(ids, **inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["Llama", "BERT", "LongNet"])
@torch.no_grad()
def test_compiled(family):
    model, ids = model_of(family), tokens_of(1, TOKENS)
    expected = alone(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (None, torch.ones_like(ids)):
        cached = {} if family == "BERT" else {"use_cache": False}
        out = compiled(ids, position_ids=restarts(), attention_mask=mask, **cached).logits
        torch.testing.assert_close(out, expected, atol=SAME, rtol=SAME)
    with pytest.raises(ValueError, match="needs position_ids"):
        compiled(ids, attention_mask=numbers(), **cached)


def test_masks_of_other_numbers_are_refused():
    model, ids = model_of("Llama"), tokens_of(1, 9)
    additive = torch.zeros(1, 9)
    additive[0, :3] = -torch.inf
    with pytest.raises(ValueError, match="must hold 0 for padding"):
        model(ids, attention_mask=additive)
    mask = torch.ones(1, 9)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="have gaps"):
        model(ids, attention_mask=mask)


def test_another_attention_sees_what_it_always_saw():
    model, ids = model_of("Llama"), tokens_of(1, TOKENS)
    model.set_attn_implementation("sdpa")
    expected = build("Llama")(ids, attention_mask=numbers().clamp(max=1), position_ids=restarts())
    out = model(ids, attention_mask=numbers(), position_ids=restarts())
    torch.testing.assert_close(out.logits, expected.logits)
    assert getattr(out, CACHE) is not None


@pytest.mark.parametrize("kind", ["XLMRoberta", "Esm", "RobertaPreLayerNorm", "Data2VecText"])
@torch.no_grad()
def test_positions_that_begin_behind_the_row_for_padding(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64,
        **({"token_dropout": False, "position_embedding_type": "absolute"} if kind == "Esm" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpened(getattr(transformers, f"{kind}Model")(config))
    use_dilated_attention(model, BRANCHES)
    ids = tokens_of(1, TOKENS).clamp(min=3)
    expected = torch.cat([model(part).last_hidden_state for part in ids.split(LENGTHS, 1)], 1)
    out = model(ids, attention_mask=numbers()).last_hidden_state
    torch.testing.assert_close(out, expected, atol=SAME, rtol=SAME)


@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal", "rope"])
@torch.no_grad()
def test_a_head_that_hands_positions_on(position_embedding):
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        position_embedding=position_embedding, first_position=2, is_causal=False,
        segment_lengths=BRANCHES.segment_lengths, dilation_rates=BRANCHES.dilation_rates,
    )  # fmt: skip
    model, ids = LongNetForMaskedLM(config).eval(), tokens_of(1, TOKENS)
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(model(ids, attention_mask=numbers()).logits, expected, atol=SAME, rtol=SAME)
    out = model(ids, attention_mask=torch.ones_like(ids), position_ids=restarts()).logits
    torch.testing.assert_close(out, expected, atol=SAME, rtol=SAME)


def test_a_model_that_cannot_be_told_positions_is_refused():
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        is_encoder_decoder=False, is_decoder=True, add_cross_attention=False, attention_dropout=0.0,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    use_dilated_attention(model, BRANCHES)
    ids = tokens_of(1, TOKENS)
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"^BartForCausalLM takes no position_ids, .* give each document a row$"):
        model(ids, attention_mask=numbers())


@pytest.mark.parametrize("axes", [3, 4])
@torch.no_grad()
def test_positions_of_several_axes(axes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2VLConfig(
        text_config={**sizes, "vocab_size": VOCAB, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}, **tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = sharpened(Qwen2VLForConditionalGeneration(config)), tokens_of(1, TOKENS).clamp(3, 80)
    use_dilated_attention(model, BRANCHES)
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    positions = restarts()[None].expand(axes, 1, TOKENS)
    for mask in (None, torch.ones_like(ids)):
        out = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(out, expected, atol=SAME, rtol=SAME)
    with pytest.raises(ValueError, match="a cache cannot tell"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="documents with images"):
        model(ids, attention_mask=numbers(), pixel_values=torch.ones(4, 16))


def test_what_one_thread_tells_another_does_not_hear():
    model, ids = model_of("Llama"), tokens_of(1, TOKENS)
    with torch.no_grad():
        expected = {"plain": model(ids).logits, "packed": alone(model, ids)}
    found, together = {}, threading.Barrier(2, timeout=60)

    @torch.no_grad()
    def read(name, **told):
        found[name] = model(ids, use_cache=False, **told).logits

    # Both are within their forward when the masks are made.
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: (together.wait(), None)[1])
    told = {"plain": {}, "packed": {"position_ids": restarts()}}
    threads = [threading.Thread(target=read, args=(name,), kwargs=told[name]) for name in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    torch.testing.assert_close(found, expected, atol=SAME, rtol=SAME)
