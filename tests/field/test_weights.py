"""Weights that did not load, and models that see what they are to predict.

| source | instance | right value |
|---|---|---|
| pytorch/pytorch#101107 | names prefixed `_orig_mod.`, as torch.compile saves them | the same weights as without it |
| tried here | a config.json with another number of layers, or width | one line that names the weights, status 2 |
| tried here | `model.safetensors` cut off | one line, status 2 |
| tried here | NaN in a weight | one line that names it, status 2 |
| torchtitan's way | meta device, `to_empty`, `load_state_dict`: rotary steps were what lay in memory | the logits |
| tried here | `evaluate` of BertForMaskedLM | one line, status 2: no perplexity |
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from longnet import (
    DilationPattern,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    use_dilated_attention,
)
from longnet.cli.model import load_model
from longnet.evaluation.scoring import refuse_sight_of_later_tokens

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **SIZES))
    use_dilated_attention(model, DilationPattern((16, 64), (1, 4)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, name=lambda key: key, weight=lambda _, value: value):
    weights = load_file(folder / "model.safetensors")
    changed = {name(key): weight(key, value) for key, value in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "name",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
        lambda key: key.replace("model.", "model._orig_mod."),
    ],
)
def test_names_of_torch_compile_are_understood(copy, llama, name):
    rewrite(copy, name)
    expected = load_model(llama, torch.device("cpu")).model.state_dict()
    found = load_model(copy, torch.device("cpu")).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def drop_one(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def damage(value):
    value = value.clone()
    value.view(-1)[-1] = value.new_tensor(torch.nan)
    return value


FAULTS = {
    "a layer too many": (
        lambda f: reconfigure(f, num_hidden_layers=3),
        r"9 missing \(model\.layers\.2\.input_layernorm",
    ),
    "a layer too few": (
        lambda f: reconfigure(f, num_hidden_layers=1),
        r"9 of no use to this model \(model\.layers\.1\.input_layernorm",
    ),
    "another width": (
        lambda f: reconfigure(f, intermediate_size=64),
        r"6 of another shape \(model\.layers\.0\.mlp\.down_proj\.weight \[32, 32\] in place of \[32, 64\]",
    ),
    "other names": (lambda f: rewrite(f, lambda key: f"student.{key}"), r"21 missing .* 21 of no use"),
    "one is missing": (drop_one, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
    "cut off": (cut, r"are damaged \(.*\): copy them anew"),
    "NaN": (
        lambda f: rewrite(f, weight=lambda key, value: damage(value) if key == "model.norm.weight" else value),
        r"NaN or infinite, 1 in all \(model\.norm\.weight\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_named(call, copy, words, tmp_path, capsys, fault):
    spoil, message = FAULTS[fault]
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        load_model(copy, torch.device("cpu"))
    (tmp_path / "text.txt").write_text("text")
    for arguments in (
        ("evaluate", copy, words, "--contexts", "16"),
        ("generate", copy, "--prompt", "a"),
        ("stream", copy, tmp_path / "text.txt", "--tokenizer", "bytes", "-o", tmp_path / "out"),
    ):
        assert call(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert "perplexity" not in captured.out
        assert str(copy) in captured.err


def test_tied_weights_and_moved_heads_are_whole(tmp_path):
    for tie in (True, False):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(intermediate_size=32, tie_word_embeddings=tie, **SIZES)).save_pretrained(tmp_path)
        model = load_model(tmp_path, torch.device("cpu"), dtype=torch.bfloat16).model
        assert model.dtype == torch.bfloat16
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie


def test_an_encoder_gets_no_perplexity(call, words, tmp_path, capsys):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(intermediate_size=32, **SIZES)).save_pretrained(tmp_path / "bert")
    assert call("evaluate", tmp_path / "bert", words, "--contexts", "16") == 2
    captured = capsys.readouterr()
    assert "its tokens see later ones" in captured.err
    assert captured.err.count("\n") == 1
    assert "perplexity" not in captured.out
    BertForMaskedLM(BertConfig(intermediate_size=32, is_decoder=True, **SIZES)).save_pretrained(tmp_path / "decoder")
    assert call("evaluate", tmp_path / "decoder", words, "--contexts", "16") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=32, **SIZES)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_head=2, n_layer=2, n_positions=16)),
        lambda: MixtralForCausalLM(
            MixtralConfig(intermediate_size=32, num_local_experts=4, num_key_value_heads=2, **SIZES)
        ),
        lambda: LongNetForCausalLM(
            LongNetConfig.preset("tiny", vocab_size=257, segment_lengths=(4, 16), dilation_rates=(1, 4))
        ),
    ],
    ids=["llama", "gpt2", "mixtral", "longnet"],
)
def test_causal_models_see_nothing_later(make, dtype):
    torch.manual_seed(0)
    assert refuse_sight_of_later_tokens(make().eval().to(dtype)) is None  # or it raises


@pytest.mark.parametrize("position_embedding", ["rope", "xpos", "learned", "sinusoidal"])
@pytest.mark.parametrize(("kind", "is_causal"), [(LongNetForCausalLM, True), (LongNetForSequenceClassification, False)])
def test_what_is_no_weight_is_right_after_the_meta_device(kind, is_causal, position_embedding):
    config = LongNetConfig(
        **SIZES, intermediate_size=48, position_embedding=position_embedding, is_causal=is_causal,
        segment_lengths=[4, 32], dilation_rates=[1, 2], pad_token_id=0,
    )  # fmt: skip
    model = kind(config).eval()
    with torch.device("meta"):
        empty, assigned = kind(config), kind(config)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 99)
    empty.load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    ids = torch.arange(1, 41).reshape(2, 20)
    for again in (empty, assigned):
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
