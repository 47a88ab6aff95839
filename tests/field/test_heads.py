"""Which heads a layer holds, and what its heads see beside the text.

| source | instance | right value |
|---|---|---|
| tried here | tp_plan="auto" on 2 and 4 ranks, rates 1, 2, 4, global tokens | logits and text of one process |
| tried here | heads split by something else (Ulysses) | one line |
| transformers: gpt-oss and seven others | attention sinks (s_aux) | an eager softmax with one more column |
| inkling2 | sinks of each query, (B, H, T, 1) | likewise |
"""

import os

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from longnet import DilatedCache, DilationPattern, use_dilated_attention
from longnet.attention.reference import multiplicity
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import use_sparse_fixed_attention
from longnet.model.interface import dilated_attention_forward
from longnet.model.versions import CACHE
from model.families import BRANCHES, VOCAB, dilated, tokens_of
from ranks import run_ranks

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
TOKENS = 37


def sharpened(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()


def split(rank, _, folder):
    """What a rank computes of the models in a folder, whose heads are split: the worst difference, equal texts."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    results = []
    for name in ("llama", "llama-block", "neox"):
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", attn_implementation="dilated", tp_plan="auto")
        ids, wanted = tokens_of(1, TOKENS), torch.load(f"{folder}/{name}.pt")
        with torch.no_grad():
            logits = model(ids).logits
            text = model.generate(ids[:, :13], attention_mask=torch.ones(1, 13, dtype=torch.long), **GREEDY)
        results.append(((logits - wanted["logits"]).abs().max().item(), torch.equal(text, wanted["text"])))
    q = torch.randn(1, 4, 9, 8)
    layer = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8)).model.layers[0].self_attn
    layer.config.segment_lengths, layer.config.dilation_rates = [8, 16], [1, 2]
    with pytest.raises(ValueError, match="holds 4 of 8 heads, and which they are cannot be known"):
        dilated_attention_forward(layer, q, q, q, None)
    layer.config.dilation_rates = [1, 1]
    dilated_attention_forward(layer, q, q, q, None)
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_split_across_ranks_are_those_of_one_process(ranks, tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4))
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4))
    for model in (llama, neox):
        sharpened(model)
    for name, model, options in (
        ("llama", llama, {}),
        ("llama-block", llama, {"head_offsets": "block"}),
        ("neox", neox, {"global_tokens": 2}),
    ):
        use_dilated_attention(model, DilationPattern((4, 16, 32), (1, 2, 4), **options))
        model.save_pretrained(tmp_path / name)
        ids = tokens_of(1, TOKENS)
        with torch.no_grad():
            text = model.generate(ids[:, :13], attention_mask=torch.ones(1, 13, dtype=torch.long), **GREEDY)
            torch.save({"logits": model(ids).logits, "text": text}, tmp_path / f"{name}.pt")
    for results in run_ranks("field.test_heads:split", ranks, tmp_path / "ranks", str(tmp_path)):
        for difference, is_same_text in results:
            assert difference <= 1e-5
            assert is_same_text


def gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = sharpened(GptOssForCausalLM(config))
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.randn(4)
    return model


def outputs(model, **inputs):
    """Logits, and the gradients of their weighted sum."""
    logits = model(tokens_of(1, TOKENS), use_cache=False, **inputs).logits
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_sinks_are_one_more_column_of_the_softmax():
    eager = gpt_oss()
    positions = torch.arange(TOKENS)[None]
    count = multiplicity(positions, torch.zeros_like(positions), BRANCHES, num_kv_heads=2, is_causal=True)
    expected, wanted = outputs(eager, attention_mask=count.double().log().float().repeat_interleave(2, 1))
    model = dilated(eager, BRANCHES)
    logits, gradients = outputs(model)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert wanted.keys() == gradients.keys()
    assert gradients["model.layers.0.self_attn.sinks"].abs().max() > 0
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in gradients.items():
        assert (grad - wanted[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("cache", [DilatedCache, DynamicCache])
@torch.no_grad()
def test_sinks_in_decoding(cache):
    model, ids = dilated(gpt_oss(), BRANCHES), tokens_of(2, TOKENS)
    past = cache(config=model.config)
    parts = [model(part, **{CACHE: past}).logits for part in ids.split([9, *[1] * 7, 21], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sinks_in_generation():
    model, ids = dilated(gpt_oss(), BRANCHES), tokens_of(2, 13)
    given = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, **GREEDY}
    text = model.generate(ids, **given)
    assert isinstance(text[CACHE], DilatedCache)
    assert torch.equal(text.sequences, model.generate(ids, **given, use_cache=False).sequences)


def test_sinks_of_each_query_and_of_other_heads():
    layer = dilated(gpt_oss(), BRANCHES).model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 9, 8).unbind(0)
    sinks = torch.randn(4)
    expected = dilated_attention_forward(layer, q, k[:, :2], v[:, :2], None, s_aux=sinks)[0]
    out = dilated_attention_forward(
        layer, q, k[:, :2], v[:, :2], None, sinks=sinks.view(1, 4, 1, 1).expand(1, 4, 9, 1)
    )[0]
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match=r"sinks .* do not fit 4 heads"):
        dilated_attention_forward(layer, q, k[:, :2], v[:, :2], None, s_aux=torch.randn(3))


def test_sinks_of_the_sparse_transformer():
    eager = gpt_oss()
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = (key <= query) & ((key // 8 == query // 8) | (key % 8 >= 6))
    expected, wanted = outputs(eager, attention_mask=torch.where(seen, 0.0, -torch.inf)[None, None])
    use_sparse_fixed_attention(eager, SparseFixedPattern(8, 2))
    logits, gradients = outputs(eager)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    name = "model.layers.0.self_attn.sinks"
    torch.testing.assert_close(gradients[name], wanted[name], atol=1e-5, rtol=1e-4)
