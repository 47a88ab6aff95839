"""Where a run begins: from nothing, from another's weights, or from a checkpoint that the same recipe and data left."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from pathlib import Path
from typing import TypeVar

import torch
from transformers import GenerationConfig

from longnet.data.shards import TokenData
from longnet.data.tokenizer import refuse_other_vocabulary
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.patterns import PATTERN_FIELDS
from longnet.model.weights import load_config, load_folder
from longnet.training.checkpoint import describe_damage, has_checkpoints, model_folder, newest_whole
from longnet.training.config import Recipe, Tables, differences, to_toml
from longnet.training.metrics import Screen
from longnet.training.parallel import Ranks
from longnet.training.state import FORMAT, changed_machine, read_record

R = TypeVar("R", bound=Recipe)

# In what a model may differ from one whose weights it takes: what it attends to, the length it is meant for, dropout,
# and what concerns generation alone.
_MAY_DIFFER = {
    *itertools.chain.from_iterable(PATTERN_FIELDS.values()), "tail",
    "max_position_embeddings", "rope_theta", "xpos_scale_base", "attention_dropout", "hidden_dropout", "drop_path",
    "initializer_range", "initializer_gain", "use_cache", "bos_token_id", "eos_token_id",
}  # fmt: skip


def pin_init(recipe: R, before: Tables | None) -> R:
    """Return the recipe with the one checkpoint in `train.init_from` whose weights are meant, where it names a run.

    Args:
        recipe: as given.
        before: the tables that were written when the run, or the comparison, began, whose checkpoint stays the one
            meant; None at the beginning.

    Raises:
        ValueError: a damaged checkpoint.
        OSError: there is no model in the folder.
    """
    given = recipe.train.init_from
    if given is None:
        return recipe
    meant = (before or {}).get("train", {}).get("init_from")
    if meant is not None and Path(meant).resolve().is_relative_to(given.resolve()):
        folder = Path(meant)
    elif given.is_dir():
        folder = model_folder(given)
    else:
        raise FileNotFoundError(f"train.init_from: there is no folder {given}")
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, init_from=folder))


def refuse_other_model(config: LongNetConfig, data: TokenData, folder: Path) -> None:
    """Raise ValueError unless the weights in a model's folder suit the model and the tokens of a recipe.

    Args:
        config: of the recipe's model.
        data: of the recipe.
        folder: of a LongNet.
    """
    there = load_config(folder)
    if not isinstance(there, LongNetConfig):
        raise ValueError(f"train.init_from takes a LongNet, and {folder} holds a model of type {there.model_type!r}")
    refuse_other_vocabulary(folder, there.vocab_size, data.folder, data.vocab_size)
    free = _MAY_DIFFER - ({"max_position_embeddings"} if config.position_embedding == "learned" else set())
    other = [
        f"model.{name} = {getattr(there, name)!r} (here {getattr(config, name)!r})"
        for name in LongNetConfig.__annotations__
        if name not in free and getattr(there, name) != getattr(config, name)
    ]
    if other:
        raise ValueError(f"the weights in {folder} are of another model than the recipe's: it has {', '.join(other)}")


def initial_model(config: LongNetConfig, data: TokenData, folder: Path | None) -> LongNetForCausalLM:
    """Return the model that a run begins with, on the CPU: drawn at random, or with the weights of another.

    Args:
        config: of the recipe's model.
        data: of the recipe.
        folder: of a LongNet, or of its run, for its weights.

    Raises:
        ValueError: weights of another model or of other tokens, or damaged ones.
        OSError: there is no model in the folder.
    """
    if folder is None:
        return LongNetForCausalLM(config)
    folder = model_folder(folder)
    refuse_other_model(config, data, folder)
    model: LongNetForCausalLM = load_folder(
        LongNetForCausalLM, folder, config=config, attn_implementation=config._attn_implementation, dtype=torch.float32
    )
    model.generation_config = GenerationConfig.from_model_config(config)  # not those of the folder
    return model


def starting_point(output: Path, data: TokenData, tables: Tables, ranks: Ranks, *, resume: bool) -> Path | None:
    """Return the checkpoint to continue from, None to begin; refuse what would mix two runs."""
    if not has_checkpoints(output):
        _refuse_to_overwrite(output / "recipe.toml", tables)
        return None
    if not resume:
        raise ValueError(
            f"{output} holds the checkpoints of a run: continue it with --resume, or choose another folder"
        )
    found = newest_whole(output)
    screen = Screen(steps=0, step=0, wanted=False)
    if found.whole is None:
        raise ValueError(
            f"no checkpoint of {output} is whole ({describe_damage(found.damaged)}): take another folder to begin anew"
        )
    if found.damaged:
        screen.warn(f"damaged: {describe_damage(found.damaged)}; {found.whole.name} is used instead")
    record = read_record(found.whole)
    if record["format"] != FORMAT:
        raise ValueError(
            f"{found.whole} has format {record['format']}, and this version of longnet continues format {FORMAT}: "
            "continue it with the version that wrote it, or begin another run"
        )
    if record["data"] != data.fingerprint:
        raise ValueError(f"{output} was trained on other data than {data.folder}: resume it with its own")
    changed = differences(record["recipe"], tables)
    if changed:
        before, now = record["recipe"], tables
        pairs = [key.partition(".")[::2] for key in changed]
        told = ", ".join(f"{t}.{k} ({before[t].get(k)} → {now[t].get(k)})" for t, k in pairs)
        raise ValueError(
            f"{output} cannot be resumed with another recipe: {told}; set these back, or begin another run"
        )
    if record["progress"]["step"] > tables["train"]["steps"]:
        raise ValueError(f"{output} has finished {record['progress']['step']} steps already: raise train.steps")
    _refuse_to_overwrite(output / "recipe.toml", tables)
    moved = changed_machine(record, ranks)
    if moved:
        screen.warn(f"{output} continues on another machine ({', '.join(moved)}): rounding may differ from here on")
    return found.whole


def write_recipe(path: Path, tables: Tables) -> None:
    """Write the recipe into a run's folder, whole or not at all, unless it is there."""
    if not path.exists() or read_recipe(path) != tables:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(to_toml(tables), encoding="utf-8")
        partial.replace(path)


def read_recipe(path: Path) -> Tables | None:
    """Return the tables of a recipe's file; None where there is none that can be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None


def _refuse_to_overwrite(path: Path, tables: Tables) -> None:
    """Raise ValueError where a run would write its recipe over one that a user has written."""
    if not path.exists():
        return
    there = read_recipe(path)
    is_of_a_run = there is not None and to_toml(there) == path.read_text(encoding="utf-8")  # nobody else writes so
    if there != tables and not is_of_a_run:
        raise ValueError(
            f"{path} is yours, and the run would write its own over it: give another folder with --output, or move it"
        )
