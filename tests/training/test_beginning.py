"""Runs that begin with the weights of another: what they take, what they refuse, and how they are resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.model.weights import load_folder
from longnet.training.beginning import initial_model, pin_init
from longnet.training.checkpoint import model_folder
from longnet.training.loop import train
from training.runs import lines, tensors

NO_DROPOUT = {"hidden_dropout": 0.0}
LONGER = {"segment_lengths": (8, 64), "dilation_rates": (1, 4), "queries": "all", "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def short(make_recipe, tmp_path_factory):
    """A run of 32 tokens a sequence."""
    run = tmp_path_factory.mktemp("short") / "RUN"
    recipe = make_recipe(model=NO_DROPOUT, train={"steps": 120, "log_every": 120}, checkpoint={"every": 0})
    train(recipe, run, progress=False)
    return run


def longer(make_recipe, init_from, **replaced):
    tables = {
        "model": {**NO_DROPOUT, **LONGER, **replaced},
        "train": {"tokens": 64, "steps": 2, "init_from": init_from},
        "evaluate": {"contexts": (8, 64)},
        "checkpoint": {"every": 1},
    }
    return make_recipe(**tables)


def test_a_run_begins_with_the_weights_of_another_and_its_own_pattern(make_recipe, data, short, tmp_path):
    recipe = longer(make_recipe, short)
    train(recipe, tmp_path / "RUN", progress=False)
    config = recipe.model_config(TokenData.open(data))
    model = LongNetForCausalLM.from_pretrained(model_folder(short), config=config)
    assert model.config.segment_lengths == (8, 64)
    ids, targets = Windows(TokenData.open(data).train, 64, seed=0).batch(0, 4)
    with torch.no_grad():
        expected = model(ids, shift_labels=targets).loss.item()
    told = lines(tmp_path / "RUN")[0]["loss"]
    assert told == pytest.approx(expected, rel=1e-5)
    assert told < 2.6  # it knows what the short run has learned: 3.3 and more at random


def test_a_checkpoint_counts_more_than_where_the_run_began(make_recipe, short, tmp_path):
    source = tmp_path / "SOURCE"
    shutil.copytree(short, source)
    recipe = longer(make_recipe, source)
    meant = model_folder(source)
    train(recipe, tmp_path / "whole", progress=False)
    train(recipe, tmp_path / "RUN", progress=False)
    assert f'init_from = "{meant}"' in (tmp_path / "RUN" / "recipe.toml").read_text()
    shutil.rmtree(tmp_path / "RUN" / "checkpoints" / "step-00000002")
    shutil.rmtree(source)  # what it was begun with is not asked for any more
    respelt = longer(make_recipe, tmp_path / "whole" / ".." / "SOURCE")
    train(respelt, tmp_path / "RUN", resume=True, progress=False)
    whole, resumed = model_folder(tmp_path / "whole"), model_folder(tmp_path / "RUN")
    assert tensors(resumed) == tensors(whole)
    assert (resumed / "generation_config.json").read_text() == (whole / "generation_config.json").read_text()
    with pytest.raises(ValueError, match=r"cannot be resumed with another recipe: train\.init_from"):
        train(longer(make_recipe, short), tmp_path / "RUN", resume=True, progress=False)


def test_the_checkpoint_that_a_run_began_with_stays_the_one(make_recipe, data, short, tmp_path):
    source = tmp_path / "SOURCE"
    shutil.copytree(short, source)
    first = model_folder(source)
    begun = pin_init(longer(make_recipe, source), None)
    assert begun.train.init_from == first
    train(make_recipe(model=NO_DROPOUT, train={"steps": 3}), source / "later", progress=False)
    shutil.copytree(model_folder(source / "later"), source / "checkpoints" / "step-00000999")
    assert pin_init(longer(make_recipe, source), None).train.init_from != first
    tables = begun.resolve(TokenData.open(data))
    assert pin_init(longer(make_recipe, source), tables).train.init_from == first


def test_any_longnet_will_do_and_brings_its_weights_alone(make_recipe, data, short, tmp_path):
    config = longer(make_recipe, None).model_config(TokenData.open(data))
    model = LongNetForCausalLM(LongNetConfig(**{**config.to_dict(), "eos_token_id": None, "segment_lengths": (16,)}
                                             | {"dilation_rates": (1,)}))  # fmt: skip
    model.generation_config.update(do_sample=True, max_new_tokens=3)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain", max_shard_size="2KB")
    assert len([*(tmp_path / "plain").glob("*.safetensors")]) > 1
    begun = initial_model(config, TokenData.open(data), tmp_path / "plain")
    for name, weight in begun.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.get_parameter(name).float()), name
    assert begun.config.segment_lengths == (8, 64)
    assert begun.generation_config.to_dict() == LongNetForCausalLM(config).generation_config.to_dict()


def test_what_is_loaded_from_a_compiled_models_folder_is_saved_under_its_own_names(make_recipe, data, tmp_path):
    model = LongNetForCausalLM(longer(make_recipe, None).model_config(TokenData.open(data)))
    model.save_pretrained(tmp_path / "plain")
    names = load_file(tmp_path / "plain" / "model.safetensors")
    shutil.copytree(tmp_path / "plain", tmp_path / "compiled")
    save_file({f"_orig_mod.{name}": weight for name, weight in names.items()},
              tmp_path / "compiled" / "model.safetensors", {"format": "pt"})  # fmt: skip
    for source in ("plain", "compiled"):
        load_folder(LongNetForCausalLM, tmp_path / source).save_pretrained(tmp_path / f"{source} again")
        again = load_file(tmp_path / f"{source} again" / "model.safetensors")
        assert again.keys() == names.keys()


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"num_attention_heads": 4}, r"num_attention_heads = 2 \(here 4\), model\.num_key_value_heads = 2 \(here 4\)"),
        ({"position_embedding": "rope"}, r"position_embedding = 'xpos' \(here 'rope'\)"),
        ({"vocab_size": 320}, r"vocab_size = 257 \(here 320\)"),
        ({"hidden_size": 32}, r"hidden_size = 16 \(here 32\)"),
        (
            {"position_embedding": "learned", "max_position_embeddings": 64},
            r"max_position_embeddings = 32768 \(here 64\), model\.position_embedding = 'xpos' \(here 'learned'\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused(make_recipe, short, tmp_path, replaced, said):
    with pytest.raises(ValueError, match=f"are of another model than the recipe's: it has .*{said}"):
        train(longer(make_recipe, short, **replaced), tmp_path / "RUN", progress=False)
    assert not (tmp_path / "RUN" / "recipe.toml").exists()


def test_what_is_no_such_model_is_refused(make_recipe, short, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.init_from: there is no folder"):
        train(longer(make_recipe, tmp_path / "nothing"), tmp_path / "RUN", progress=False)
    llama = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"takes a LongNet, and .* holds a model of type 'llama'"):
        train(longer(make_recipe, tmp_path / "llama"), tmp_path / "RUN", progress=False)
    other = tmp_path / "other"
    shutil.copytree(model_folder(short), other)
    for name in ("state.json", "manifest.json"):
        (other / name).unlink(missing_ok=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [*vocabulary][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"the tokenizers of .* differ: prepare the data with the model's tokenizer"):
        train(longer(make_recipe, other), tmp_path / "RUN", progress=False)
