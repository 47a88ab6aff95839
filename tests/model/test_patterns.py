"""The pattern that each layer of a model follows: dense queries, offsets that rotate with depth, and who is told."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from longnet import (
    DilatedCache,
    DilationPattern,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForImageClassification,
    LongNetModel,
    LongNetSlideModel,
    use_dilated_attention,
)
from longnet.attention import reference
from longnet.cli.recipe import load_recipe
from longnet.model.patterns import pattern_of, warn_of_unseen
from longnet.model.versions import CACHE
from longnet.training.config import Recipe, config_of
from tolerances import SAME_FLOAT32

PATTERN = DilationPattern((8, 32), (1, 5), queries="all")
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "longnet": LongNetConfig.preset("tiny", vocab_size=50, num_key_value_heads=2),
}  # fmt: skip


def oracle(module, query, key, value, attention_mask, scaling=None, **_):
    """The definition, with the offsets that the layer's number gives, computed here."""
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    positions = torch.arange(query.shape[2])[None]
    shifts = [(module.layer_idx * heads + head) % 5 for head in range(heads)]
    scores = query @ key.repeat_interleave(group, 1).mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    inside, same = positions[0] % 32, positions[0][:, None] // 32 == positions[0] // 32
    near = positions[0][:, None] // 8 == positions[0] // 8
    far = torch.stack([same & (inside % 5 == shift) for shift in shifts]).repeat_interleave(group, 0)
    first = positions[0] < module.config.global_tokens
    count = (near.int() + far.int() + first.int()) * torch.ones_like(near).tril()
    p = torch.softmax(torch.where(count > 0, scores + count.log(), -torch.inf), -1)
    return (p @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("rotating_oracle", oracle)


@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_offsets_rotate_with_depth_and_all_queries_attend(name, global_tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    use_dilated_attention(model, replace(PATTERN, global_tokens=global_tokens), rotate_offsets=True)
    ids = torch.randint(1, 50, (2, 75))  # generate() takes pad_token_id for padding
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
        cache = DilatedCache(model.config)
        parts = [model(piece, **{CACHE: cache}).logits for piece in ids.split([30, 1, 1, 20, 23], 1)]
        expected = copy.deepcopy(model)
        expected.set_attn_implementation("rotating_oracle")
        want = expected(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=SAME_FLOAT32, rtol=SAME_FLOAT32)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=SAME_FLOAT32, rtol=SAME_FLOAT32)
    generated = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, cache_implementation="dynamic")
    assert torch.equal(generated, plain)


def test_a_saved_model_keeps_its_queries_its_global_tokens_and_its_rotation(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    pattern = replace(PATTERN, global_tokens=3)
    use_dilated_attention(model, pattern, rotate_offsets=True)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert [pattern_of(config, layer) for layer in range(3)] == [pattern, pattern.shifted(2), pattern.shifted(4)]
    use_dilated_attention(model, DilationPattern((8,), (1,)))
    assert pattern_of(model.config, 2) == DilationPattern((8,), (1,))


def test_global_tokens_leave_xpos_one_centre():
    # Without them positions count from each block of segments, 32 tokens here; a first token is any distance away.
    with pytest.raises(ValueError, match="and every token sees the first 1: set xpos_scale_base to"):
        LongNetConfig.preset(
            "tiny", xpos_scale_base=0.5, segment_lengths=(8, 32), dilation_rates=(1, 2), global_tokens=1
        )
    LongNetConfig.preset("tiny", xpos_scale_base=0.5, segment_lengths=(8, 32), dilation_rates=(1, 2))


def test_a_cache_of_another_rotation_is_refused(tmp_path):
    config = LongNetConfig.preset("tiny", queries="all", rotate_offsets=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DilatedCache(config)
    with torch.no_grad():
        model(torch.randint(0, 50, (1, 9)), **{CACHE: cache})
    cache.save(tmp_path / "cache")
    for other in ({"rotate_offsets": False}, {"queries": "kept"}, {"global_tokens": 1}):
        changed = LongNetConfig.from_dict({**config.to_dict(), **other})
        with pytest.raises(ValueError, match="layers of the pattern"):
            DilatedCache.load(tmp_path / "cache", changed)
        fixed = AutoModelForCausalLM.from_config(changed).eval()
        with pytest.raises(ValueError, match="this DilatedCache is for the pattern"):
            fixed(torch.randint(0, 50, (1, 9)), **{CACHE: DilatedCache.load(tmp_path / "cache", config)})


def test_positions_that_no_head_keeps_are_told_with_the_mend():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    with pytest.warns(UserWarning, match=r"branch 32:5 .* no head keeps 3 of each 5 .* with 2 key/value heads: choose"):
        use_dilated_attention(model, PATTERN)
    with pytest.warns(UserWarning, match=r"no head keeps 1 of each 7 .* or more than 3 layers"):
        use_dilated_attention(model, DilationPattern((8, 32), (1, 7)), rotate_offsets=True)
    with pytest.warns(UserWarning, match="rotate_offsets=True, which shifts them with depth"):
        AutoModelForCausalLM.from_config(LongNetConfig.preset("tiny", dilation_rates=(1, 2, 16)))


def test_the_mend_of_block_offsets_is_a_divisor(recwarn):
    sizes = {"num_attention_heads": 6, "hidden_size": 96, "head_offsets": "block"}
    with pytest.warns(
        UserWarning, match=r"branch 64:4 .* no head keeps 1 of each 4 .*: choose rates that divide 6, or"
    ):
        LongNetModel(LongNetConfig.preset("tiny", **sizes, segment_lengths=(8, 64), dilation_rates=(1, 4)))
    for mend in ({"dilation_rates": (1, 3)}, {"dilation_rates": (1, 4), "rotate_offsets": True}):
        LongNetModel(LongNetConfig.preset("tiny", **sizes, segment_lengths=(8, 64), **mend))
    assert not recwarn


@pytest.mark.parametrize("attention", ["dilated", "sdpa"])
@pytest.mark.parametrize(
    "kind", [LlamaForCausalLM, LongNetForCausalLM, LongNetSlideModel, LongNetForImageClassification]
)
def test_whoever_builds_a_model_with_a_pattern_is_told_once(kind, attention, recwarn):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    pattern = {"segment_lengths": [8, 32], "dilation_rates": [1, 5], "attn_implementation": attention}
    kind(kind.config_class(**sizes, **pattern))
    told = [str(warning.message) for warning in recwarn if "no head keeps 1 of each 5" in str(warning.message)]
    assert len(told) == (attention == "dilated")


@pytest.mark.parametrize("preset", ["tiny", "5m", "25m", "125m", "350m", "760m", "2.7b"])
def test_no_preset_has_such_positions(preset, recwarn):
    config = LongNetConfig.preset(preset)
    warn_of_unseen(config.pattern, config)
    assert not recwarn


def test_the_demo_has_no_such_positions(recwarn):
    config = config_of(load_recipe("demo", kind=Recipe).model)
    warn_of_unseen(config.pattern, config)
    assert not recwarn


def test_they_are_told_once_however_many_branches_lack_some(recwarn):
    LongNetModel(LongNetConfig.preset("tiny", segment_lengths=(8, 16, 32, 64), dilation_rates=(1, 8, 16, 32)))
    (told,) = [str(warning.message) for warning in recwarn if "no head keeps" in str(warning.message)]
    assert "in the branch 16:8 of" in told
    assert "(and 2 other branches lack some)" in told


def test_no_warning_where_all_phases_are_seen(recwarn):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    use_dilated_attention(model, PATTERN, rotate_offsets=True)
    use_dilated_attention(model, DilationPattern((8, 32), (1, 2)))
    assert not [warning for warning in recwarn if "no head keeps" in str(warning.message)]


def test_what_a_model_decides_itself_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    for pattern in (PATTERN.shifted(1), PATTERN.shard(0, 2)):
        with pytest.raises(ValueError, match="rotate_offsets=True shifts them"):
            use_dilated_attention(model, pattern)


def test_a_layer_that_does_not_know_its_number_cannot_rotate():
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = BertModel(config).eval()
    use_dilated_attention(model, DilationPattern((8, 32), (1, 4)), rotate_offsets=True)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = None
    with pytest.raises(ValueError, match="does not know which layer it is: set rotate_offsets=False"):
        model(torch.randint(0, 50, (1, 9)))


def test_the_oracle_here_is_the_oracle():
    q, k, v = torch.randn(1, 4, 75, 8), torch.randn(1, 2, 75, 8), torch.randn(1, 2, 75, 8)
    module = torch.nn.Module()
    module.layer_idx, module.config = 3, LlamaConfig(global_tokens=2)
    pattern = replace(PATTERN.shifted(6), global_tokens=2)
    want = reference.attend(q, k, v, pattern, bounds=None, is_causal=True, scale=8**-0.5)[0]
    torch.testing.assert_close(oracle(module, q, k, v, None)[0].transpose(1, 2), want)
