"""Where a run begins: from nothing, from another's weights, or from a checkpoint that the same recipe and data left."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch

from longnet.data.shards import TokenData
from longnet.data.tokenizer import refuse_other_vocabulary
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.weights import load_config, load_folder
from longnet.training.checkpoint import describe_damage, has_checkpoints, model_folder, newest_whole
from longnet.training.config import Tables, differences, to_toml
from longnet.training.metrics import Screen
from longnet.training.parallel import Ranks
from longnet.training.state import FORMAT, changed_machine, read_record

# In what a model may differ from one whose weights it takes: how far it attends, and what holds in training only.
_MAY_DIFFER = {
    "segment_lengths", "dilation_rates", "head_offsets", "queries", "global_tokens", "rotate_offsets", "tail",
    "sparse_block", "sparse_summary", "sparse_stride", "max_position_embeddings", "rope_theta", "xpos_scale_base",
    "attention_dropout", "hidden_dropout", "drop_path", "initializer_range", "initializer_gain", "use_cache",
}  # fmt: skip


def initial_model(config: LongNetConfig, data: TokenData, init_from: Path | None) -> LongNetForCausalLM:
    """Return the model that a run begins with, on the CPU: drawn at random, or with the weights of another.

    Args:
        config: of the recipe's model.
        data: whose tokens must be those of the weights.
        init_from: as in `TrainConfig`.

    Raises:
        ValueError: weights of another model or of other tokens, or damaged ones.
        OSError: there is no model in `init_from`.
    """
    if init_from is None:
        return LongNetForCausalLM(config)
    if not init_from.is_dir():
        raise FileNotFoundError(f"train.init_from: there is no folder {init_from}")
    folder = model_folder(init_from)
    there = load_config(folder)
    if not isinstance(there, LongNetConfig):
        raise ValueError(f"train.init_from takes a LongNet, and {folder} holds a model of type {there.model_type!r}")
    refuse_other_vocabulary(folder, there.vocab_size, data.folder, data.vocab_size)
    other = [
        f"model.{name} = {getattr(there, name)!r} (here {getattr(config, name)!r})"
        for name in LongNetConfig.__annotations__
        if name not in _MAY_DIFFER and getattr(there, name) != getattr(config, name)
    ]
    if other:
        raise ValueError(f"the weights in {folder} are of another model than the recipe's: it has {', '.join(other)}")
    model: LongNetForCausalLM = load_folder(
        LongNetForCausalLM, folder, config=config, attn_implementation=config._attn_implementation, dtype=torch.float32
    )
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
    if not path.exists() or _read_recipe(path) != tables:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(to_toml(tables), encoding="utf-8")
        partial.replace(path)


def _read_recipe(path: Path) -> Tables | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None


def _refuse_to_overwrite(path: Path, tables: Tables) -> None:
    """Raise ValueError where a run would write its recipe over one that a user has written."""
    if not path.exists():
        return
    there = _read_recipe(path)
    is_of_a_run = there is not None and to_toml(there) == path.read_text(encoding="utf-8")  # nobody else writes so
    if there != tables and not is_of_a_run:
        raise ValueError(
            f"{path} is yours, and the run would write its own over it: give another folder with --output, or move it"
        )
