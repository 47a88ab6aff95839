"""What LongNetConfig accepts, refuses, keeps through files, and which sizes it names."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoConfig

from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, LongNetImageConfig, LongNetSlideConfig


def test_the_default_is_the_papers_model():
    config = LongNetConfig()
    assert config.pattern == DilationPattern.paper()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (3072, 64, 12)
    assert (config.position_embedding, config.hidden_act, config.sub_layernorm) == ("xpos", "gelu", True)
    assert config._attn_implementation == "dilated"


# Weights of GPT-3's models with its vocabulary and learned positions (arXiv:2005.14165 table 2.1), in millions.
@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("350m", 356), ("760m", 760), ("2.7B", 2650)])
def test_presets_have_the_size_of_their_name(name, millions):
    config = LongNetConfig.preset(name, vocab_size=50_257)
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
        model.tie_weights()  # transformers 5.0 does not, without memory
    parameters = sum(p.numel() for p in model.parameters()) + 2048 * config.hidden_size
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
    assert config.pattern == DilationPattern.paper()


def test_presets_for_laptops_are_small_and_can_be_changed():
    for name, limit in (("tiny", 2e5), ("5m", 6e6), ("25m", 28e6)):
        with torch.device("meta"):
            model = LongNetForCausalLM(LongNetConfig.preset(name))
        assert sum(p.numel() for p in model.parameters()) < limit
    config = LongNetConfig.preset("tiny", hidden_size=128, segment_lengths=[64], dilation_rates=[1])
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (128, 32, 512)
    assert config.pattern == DilationPattern((64,), (1,))
    with pytest.raises(ValueError, match=r"'125n': did you mean '125m'\?"):
        LongNetConfig.preset("125n")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("hiden_size", "did you mean 'hidden_size'"),
        ("segment_length", "did you mean 'segment_lengths'"),
        ("dilated_ratio", "did you mean 'dilation_rates'"),
        ("n_layer", "did you mean 'num_hidden_layers'"),
        ("num_heads", "did you mean 'num_attention_heads'"),
        ("temperature", "model.generation_config"),
        ("qqqq", "no field 'qqqq'"),
    ],
)
def test_an_unknown_key_names_the_nearest_field(key, says, tmp_path):
    with pytest.raises(TypeError, match=says):
        LongNetConfig(**{key: 1})
    LongNetConfig().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=says):
        LongNetConfig.from_pretrained(tmp_path, **{key: 1})
    with pytest.raises(TypeError, match=says):
        AutoConfig.from_pretrained(tmp_path, **{key: 1})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 1}))
    if key == "qqqq":  # near to nothing of ours: others may have set it before the folder was saved
        assert AutoConfig.from_pretrained(tmp_path).qqqq == 1
    else:
        with pytest.raises(TypeError, match=says):
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"hidden_size": "768"}, TypeError, "hidden_size must be int, got '768' of type str"),
        ({"hidden_size": 768.0}, TypeError, "hidden_size must be int"),
        ({"num_hidden_layers": True}, TypeError, "num_hidden_layers must be int"),
        ({"segment_lengths": 2048}, TypeError, "segment_lengths must be tuple"),
        ({"dilation_rates": (1, 2, 4, 6, 12.0)}, TypeError, "dilation_rates must be tuple"),
        ({"use_cache": 1}, TypeError, "use_cache must be bool"),
        ({"eos_token_id": [1, "a"]}, TypeError, "eos_token_id must be int"),
        ({"position_embedding": "xpoz"}, ValueError, "did you mean 'xpos'"),
        ({"head_offsets": 3}, ValueError, "head_offsets must be one of"),
        ({"hidden_act": "gelo"}, ValueError, "did you mean 'gelu'"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1"),
        ({"hidden_size": 100, "head_dim": None}, ValueError, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, ValueError, "multiple of num_key_value_heads"),
        ({"head_dim": 63}, ValueError, "head_dim must be even"),
        ({"attention_dropout": 1.0}, ValueError, r"attention_dropout must be in \[0, 1\)"),
        ({"sparse_summary": 0}, ValueError, "sparse_summary must be at least 1"),
        ({"rope_theta": 0.5}, ValueError, "rope_theta must be at least 1"),
        ({"xpos_scale_base": math.nan}, ValueError, "xpos_scale_base must be above 0"),
        ({"segment_lengths": (2048,)}, ValueError, "one dilation rate per segment length"),
        ({"segment_lengths": (8, 8), "dilation_rates": (1, 1)}, ValueError, "given twice"),
        ({"pad_token_id": 100_352}, ValueError, "pad_token_id must be a token below vocab_size"),
        ({"eos_token_id": [0, -1]}, ValueError, "eos_token_id must be a token below vocab_size"),
    ],
)
def test_a_wrong_value_is_a_clear_error(fields, error, says, tmp_path):
    with pytest.raises(error, match=says):
        LongNetConfig(**fields)
    LongNetConfig().save_pretrained(tmp_path)
    with pytest.raises(error, match=says):
        LongNetConfig.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "error", "says"),
    [
        (
            LongNetSlideConfig,
            {"tile_sizes": 1},
            TypeError,
            "LongNetSlideConfig has no field .*: did you mean 'tile_size'",
        ),
        (LongNetSlideConfig, {"d_model": 1}, TypeError, "LongNetSlideConfig has no field .* 'hidden_size'"),
        (LongNetSlideConfig, {"tile_size": "256"}, TypeError, "tile_size must be int, got '256'"),
        (LongNetSlideConfig, {"tile_size": 0}, ValueError, "tile_size must be at least 1"),
        (LongNetSlideConfig, {"head_norm_eps": 0.0}, ValueError, "head_norm_eps must be above 0"),
        (LongNetSlideConfig, {"classifier_pool": "max"}, ValueError, "classifier_pool must be one of"),
        (LongNetSlideConfig, {"classifier_layers": 11}, TypeError, "classifier_layers must be tuple"),
        (
            LongNetImageConfig,
            {"img_size": 1},
            TypeError,
            "LongNetImageConfig has no field .*: did you mean 'image_size'",
        ),
        (LongNetImageConfig, {"patch_size": 3.5}, TypeError, "patch_size must be int"),
    ],
)
def test_the_fields_of_a_derived_configuration_are_checked_as_its_own(kind, fields, error, says, tmp_path):
    with pytest.raises(error, match=says):
        kind(**fields)
    kind().save_pretrained(tmp_path)
    with pytest.raises(error, match=says):
        kind.from_pretrained(tmp_path, **fields)


def test_whole_numbers_do_for_floats():
    assert LongNetConfig(attention_dropout=0, rope_theta=500_000).rope_theta == 500_000
    assert LongNetConfig(head_dim=63, position_embedding="none").head_dim == 63


def test_the_advice_on_xpos_is_enough():
    geometric = DilationPattern.geometric(2048, 2**30)
    fields = {
        "segment_lengths": geometric.segment_lengths,
        "dilation_rates": geometric.dilation_rates,
        "max_position_embeddings": 2**30,
    }
    with pytest.raises(ValueError, match="set xpos_scale_base to") as refusal:
        LongNetConfig(**fields)
    advised = int(str(refusal.value).split("xpos_scale_base to ")[1].split()[0])
    assert LongNetConfig(**fields, xpos_scale_base=advised).pattern == geometric
    with pytest.raises(ValueError, match="set xpos_scale_base to"):
        LongNetConfig(**fields, xpos_scale_base=advised * 0.999)
    assert LongNetConfig(**fields, position_embedding="rope").pattern == geometric
    # The paper's segments end together every 32768 tokens, so its scales serve any length.
    assert LongNetConfig(max_position_embeddings=2**30).xpos_scale_base == 512


def test_files_keep_everything(tmp_path):
    config = LongNetConfig.preset(
        "tiny",
        head_offsets="block",
        num_key_value_heads=2,
        eos_token_id=[1, 2],
        dtype="bfloat16",
        sub_layernorm=False,
        sparse_block=64,
        sparse_summary=8,
    )
    config.save_pretrained(tmp_path)
    loaded = [LongNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)]
    loaded += [LongNetConfig(**config.to_dict()), LongNetConfig.from_dict(config.to_dict())]
    loaded += [LongNetConfig(**config.to_diff_dict()), copy.deepcopy(config)]
    for again in loaded:
        assert type(again) is LongNetConfig
        assert again.to_diff_dict() == config.to_diff_dict()
        assert again.pattern == config.pattern
        assert again._attn_implementation == "dilated"


def test_loading_replaces_fields_and_the_attention(tmp_path):
    LongNetConfig.preset("tiny").save_pretrained(tmp_path)
    config, unused = LongNetConfig.from_pretrained(
        tmp_path, attn_implementation="sdpa", vocab_size=7, segment_lengths=[5], dilation_rates=[1], cats=1,
        return_unused_kwargs=True,
    )  # fmt: skip
    assert (config.vocab_size, config.pattern) == (7, DilationPattern((5,), (1,)))
    assert config._attn_implementation == "sdpa"
    assert unused == {"cats": 1}
    about_files = {
        "revision": "main",
        "trust_remote_code": True,
        "gguf_file": None,
        "subfolder": "",
        "device_map": None,
        "dtype": "float16",
    }
    assert AutoConfig.from_pretrained(tmp_path, **about_files).vocab_size == 320
    assert LongNetConfig(attn_implementation="eager")._attn_implementation == "eager"
    written = {"attn_implementation": "sdpa"}  # as the trainer writes it into a checkpoint
    assert LongNetConfig.from_dict(written)._attn_implementation == "sdpa"
    assert LongNetConfig.from_dict(written, attn_implementation="eager")._attn_implementation == "eager"


def test_a_pattern_without_rate_1_warns():
    with pytest.warns(UserWarning, match="no branch of dilation rate 1"):
        LongNetConfig.preset("tiny", segment_lengths=(8,), dilation_rates=(2,))
