"""Recipes: resolved, written, compared."""

import dataclasses
import json
import tomllib

import pytest

from longnet import LongNetConfig
from longnet.comparison.folder import check_plan
from longnet.data.shards import TokenData
from longnet.training.config import ModelConfig, differences, to_toml


def test_the_model_table_has_every_field_of_the_configuration():
    fields = {item.name: item for item in dataclasses.fields(ModelConfig)}
    assert fields.keys() - {"preset", "attention"} == LongNetConfig.__annotations__.keys()
    for name, hint in LongNetConfig.__annotations__.items():
        assert fields[name].type == hint | None
        assert fields[name].default is None
        assert f"{name}: " in ModelConfig.__doc__


def test_the_model_is_the_recipes_then_the_presets_then_the_datas(make_recipe, data):
    opened = TokenData.open(data)
    config = make_recipe(model={"preset": "5m", "hidden_dropout": None}).model_config(opened)
    assert (config.hidden_size, config.num_hidden_layers) == (16, 1)
    assert (config.vocab_size, config.eos_token_id) == (257, 256)
    assert config.hidden_dropout == 0
    assert config._attn_implementation == "dilated"
    config = make_recipe(model={"vocab_size": 320, "attention": "sdpa", "hidden_size": None, "preset": "25m"})
    config = config.model_config(opened)
    assert (config.hidden_size, config.vocab_size, config._attn_implementation) == (512, 320, "sdpa")


def test_a_resolved_recipe_is_one_and_gives_the_same_model(make_recipe, data):
    opened = TokenData.open(data)
    recipe = make_recipe(model={"preset": "tiny"}, sample={"prompt": 'a "quoted"\n\\ é'}, evaluate={"contexts": ()})
    tables = recipe.resolve(opened)
    assert tomllib.loads(to_toml(tables)) == tables
    assert tables["evaluate"]["contexts"] == [32]
    model = {name: value for name, value in tables["model"].items() if name != "attention"}
    assert LongNetConfig(**model).to_dict() == recipe.model_config(opened).to_dict()
    assert "preset" not in tables["model"]


def test_differences_are_those_that_change_what_is_learned(make_recipe, data):
    opened = TokenData.open(data)

    def tables(**replaced):
        return make_recipe(**replaced).resolve(opened)

    free = {
        "train": {"log_every": 7, "device": "auto", "tensorboard": True, "max_skipped": 2},
        "evaluate": {"every": 3, "contexts": (16,)}, "sample": {"every": 1}, "checkpoint": {"every": 9, "keep": 9},
        "parallel": {"dp": 2, "sp": 2, "timeout_seconds": 9},
    }  # fmt: skip
    assert differences(tables(), tables(**free)) == []
    assert differences(tables(), tables(optim={"lr": 1.0}, model={"sparse_block": 4})) == [
        "model.sparse_block",
        "optim.lr",
    ]
    assert differences(tables(), tables(train={"steps": 13})) == ["train.steps"]
    constant = {"schedule": "constant"}
    assert differences(tables(optim=constant), tables(optim=constant, train={"steps": 13})) == []


def test_a_setting_that_there_was_not_yet_had_its_default(make_recipe, data, tmp_path):
    """A run, and a comparison, that an earlier version began go on in one that knows more settings."""
    tables = make_recipe().resolve(TokenData.open(data))
    added = {"model": ("global_tokens", "queries"), "train": ("chunk_tokens",), "optim": ("betas",)}
    old = {name: {k: v for k, v in table.items() if k not in added.get(name, ())} for name, table in tables.items()}
    assert differences(old, tables) == []
    tables["model"]["global_tokens"] = 1
    assert differences(old, tables) == ["model.global_tokens"]
    (tmp_path / "plan.json").write_text(json.dumps({"recipe": old}))
    with pytest.raises(ValueError, match=r"another recipe: model.global_tokens \(0 → 1\); set"):
        check_plan(tmp_path / "plan.json", tables)
    tables["model"]["global_tokens"] = 0
    check_plan(tmp_path / "plan.json", tables)


def test_a_default_that_follows_from_other_settings_does_so_of_the_old_ones(make_recipe, data):
    """DeepNorm normalises behind its sublayers, whether there is a setting of its own for that or not yet."""
    tables = make_recipe(model={"deepnorm": True, "sub_layernorm": False}).resolve(TokenData.open(data))
    old = {name: dict(table) for name, table in tables.items()}
    assert old["model"].pop("post_layernorm") is True
    assert old["model"].pop("head_dim") == 8 != LongNetConfig().head_dim
    assert differences(old, tables) == []


def test_a_vocabulary_that_is_too_small_says_what_to_do(make_recipe, data):
    with pytest.raises(ValueError, match=r"leave vocab_size out, or give at least 257"):
        make_recipe(model={"vocab_size": 100}).model_config(TokenData.open(data))
