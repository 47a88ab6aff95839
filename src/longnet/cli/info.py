"""`longnet info`: what a recipe, a model or a data folder is, and needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from longnet.cli.check import at_least_one, refuse_unused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from longnet.model import LongNetConfig
    from longnet.training.config import Recipe


def info(
    path: Path,
    *settings: Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True)],
    tokens: Annotated[int | None, cyclopts.Parameter(("--tokens", "-n"))] = None,
    memory: float | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
) -> None:
    """Print parameters, FLOPs and memory of a recipe or a model; counts and origin of a data folder.

    Args:
        path: A recipe (TOML, or its name), a run or Hugging Face model folder, or a folder that `longnet
            prepare` wrote.
        settings: Flags with the last word over a recipe, as `longnet train` takes them: --parallel.sp 8.
        tokens: Length of a sequence; that of training when left out.
        memory: GiB of a rank: prints the longest sequence with which training the recipe stays within them.
        output: Where to draw the attention; its suffix is the format (.png, .svg, .pdf).
    """
    from longnet.cli.recipe import recipes

    if tokens is not None:
        at_least_one(tokens=tokens)
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory must be a number of GiB above 0, got {memory}")
    if path.suffix == ".toml" or (not path.exists() and str(path) in recipes()):
        lines, config, tokens = _of_recipe(path, settings, tokens, memory)
    elif settings or memory is not None:
        given = "--memory" if memory is not None else settings[0]
        raise ValueError(f"{given} goes with a recipe, and {path} is none: give a TOML file")
    elif (path / "index.json").is_file():
        refuse_unused("is of a recipe or a model, and data have no length of sequences: leave it away", tokens=tokens)
        lines, config, tokens = _of_data(path), None, 0
    else:
        lines, config, tokens = _of_model(path, tokens)
    if output is not None and config is None:
        raise ValueError("a data folder has no attention to draw: leave --output away")
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    if output is not None and config is not None:
        _draw(config, tokens, output)
        print(f"{'drawn':{width}}  {output}")


def _of_recipe(
    path: Path, settings: tuple[str, ...], tokens: int | None, memory: float | None
) -> tuple[list[tuple[str, str]], PreTrainedConfig, int]:
    from longnet.cli.recipe import load_recipe
    from longnet.training.config import Recipe

    recipe = load_recipe(path, settings, kind=Recipe)
    config, vocabulary = _config(recipe)
    train = recipe.train
    length = tokens or train.tokens
    step = train.batch_sequences * train.tokens
    lines = [
        ("recipe", f"{path}, data {recipe.data.path}{vocabulary}"),
        ("training", f"{train.steps:,} steps of {train.batch_sequences:,} × {train.tokens:,} = {step:,} tokens, "
         f"{train.steps * step:,} in all"),
        *_of_config(config, length, training=True),
        *_memory_of_training(recipe, config, length, memory),
    ]  # fmt: skip
    return lines, config, length


def _memory_of_training(
    recipe: Recipe, config: LongNetConfig, tokens: int, memory: float | None
) -> list[tuple[str, str]]:
    from longnet.model.budget import longest_sequence, training_memory

    train, dp, sp = recipe.train, recipe.parallel.dp, recipe.parallel.sp
    if train.chunk_tokens is not None:
        refuse_unused("asks for the longest sequence, and chunks fit any: leave it away", memory=memory)
        return _memory_in_chunks(recipe, config, tokens, train.chunk_tokens)
    sequences = train.batch_sequences // (train.accumulate * dp)
    bfloat16, checkpointed = train.dtype == "bfloat16", train.checkpoint_activations
    needed = training_memory(
        config, tokens=tokens, sequences=sequences, bfloat16=bfloat16, checkpoint_activations=checkpointed, dp=dp, sp=sp
    )
    parts = {
        "weights": needed.weights, "gradients": needed.gradients, "Adam": needed.optimizer,
        "gathered weights": needed.gathered, "activations": needed.activations, "halo": needed.halo,
        "loss": needed.loss,
    }  # fmt: skip
    listed = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    ranks = "training" if dp * sp == 1 else f"each of {dp} × {sp} ranks in training"
    lines = [("memory", f"{ranks} {_gigabytes(needed.total)}: {listed} (estimate; PyTorch itself on top)")]
    if memory is None:
        return lines
    lengths = {
        count: longest_sequence(
            config, memory=int(memory * 2**30), sequences=sequences, bfloat16=bfloat16,
            checkpoint_activations=checkpointed, dp=dp, sp=count,
        )
        for count in ((1, 8, 64) if recipe.model.attention == "dilated" else (1,))
    }  # fmt: skip
    longest = ", ".join(f"{length:,} with parallel.sp = {count}" for count, length in lengths.items())
    lines.append(("longest", f"sequence in {memory:g} GiB a rank, in tokens: {longest} (parallel.dp = {dp})"))
    return lines


def _memory_in_chunks(recipe: Recipe, config: LongNetConfig, tokens: int, chunk_tokens: int) -> list[tuple[str, str]]:
    from longnet.model.budget import training_memory
    from longnet.training.chunk_schedule import chunk_costs

    train = recipe.train
    sequences, bfloat16 = train.batch_sequences // train.accumulate, train.dtype == "bfloat16"
    needed = training_memory(
        config, tokens=min(tokens, chunk_tokens), sequences=sequences, bfloat16=bfloat16,
        checkpoint_activations=train.checkpoint_activations,
    )  # fmt: skip
    costs = chunk_costs(
        config, tokens=tokens, chunk_tokens=chunk_tokens, sequences=sequences, itemsize=2 if bfloat16 else 4
    )
    return [
        ("memory", f"in chunks of {chunk_tokens:,} tokens {_gigabytes(needed.total + costs.state + costs.owed)}: "
         f"a chunk, weights and Adam {_gigabytes(needed.total)}, state {_gigabytes(costs.state)}, gradients owed "
         f"{_gigabytes(costs.owed)} (estimate; PyTorch itself on top)"),
        ("log", f"{_gigabytes(costs.log)} on disk, {costs.log / tokens / sequences:.3g} bytes a token"),
    ]  # fmt: skip


def _config(recipe: Recipe) -> tuple[LongNetConfig, str]:
    """Return a recipe's configuration, and a remark where its data are not there to give the vocabulary."""
    from types import SimpleNamespace
    from typing import Any

    from longnet.data.shards import TokenData
    from longnet.model import LongNetConfig

    data: Any
    try:
        data = TokenData.open(recipe.data.path)
        remark = f", vocabulary {data.vocab_size:,}"
    except FileNotFoundError:
        given: Any = recipe.model
        default = LongNetConfig() if given.preset is None else LongNetConfig.preset(given.preset)
        data = SimpleNamespace(vocab_size=given.vocab_size or default.vocab_size, end_of_text=None)
        remark = f" (not prepared yet: a vocabulary of {data.vocab_size:,} is assumed)"
    recipe.resolve(data)  # refuses tables that do not go together
    return recipe.model_config(data), remark


def _of_model(path: Path, tokens: int | None) -> tuple[list[tuple[str, str]], PreTrainedConfig, int]:
    import longnet.model  # noqa: F401  # makes LongNet known to transformers
    from longnet.cli.model import training_length
    from longnet.model.weights import load_config
    from longnet.training.checkpoint import model_folder

    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a recipe, a run or model folder, or a data folder")
    folder = model_folder(path)
    config = load_config(folder)
    trained = training_length(folder)
    length = tokens or trained or int(getattr(config, "max_position_embeddings", None) or 2048)
    lines = [("model", f"{folder}, {config.model_type}")]
    if trained is not None:
        lines.append(("trained at", f"{trained:,} tokens"))
    return [*lines, *_of_config(config, length, training=False)], config, length


def _of_config(config: PreTrainedConfig, tokens: int, *, training: bool) -> list[tuple[str, str]]:
    from longnet.model import LongNetConfig
    from longnet.model.budget import cache_bytes, count_parameters, step_flops
    from longnet.model.cost import attention_flops

    parameters = count_parameters(config)
    lines = [
        ("parameters", f"{parameters.total:,}; {parameters.total - parameters.embedding:,} without the "
         f"{parameters.embedding:,} of embeddings")
    ]  # fmt: skip
    if not isinstance(config, LongNetConfig):
        return lines
    attention = attention_flops(config, tokens=tokens) / tokens
    dense = 2 * config.num_attention_heads * int(config.head_dim or 0) * (tokens + 1) * config.num_hidden_layers
    rest = 2 * parameters.multiplied
    lines += [
        ("attention", f"{config._attn_implementation}, {config.pattern}"),
        ("FLOPs", f"{rest + attention:.3e} a token forward at {tokens:,} tokens: {rest:.3e} in weights, "
         f"{attention:.3e} in attention, {attention / dense:.3f} × that of dense attention"),
    ]  # fmt: skip
    if training:
        step = step_flops(config, tokens=tokens, sequences=1) / tokens
        lines.append(("", f"{step:.3e} a token in training, forward and backward"))
    cache = cache_bytes(config, tokens=tokens)
    lines.append((
        "cache", f"{_gigabytes(cache['dense'])} of keys and values after {tokens:,} tokens (float32); the streaming "
        f"state of the pattern would be {_gigabytes(cache['dilated'])}",
    ))  # fmt: skip
    return lines


def _of_data(path: Path) -> list[tuple[str, str]]:
    import numpy as np

    from longnet.data.shards import TokenData

    data = TokenData.open(path)
    lines = [("data", f"{path}, vocabulary {data.vocab_size:,}, fingerprint {data.fingerprint[:16]}")]
    for split in (data.train, data.validation):
        sizes = np.diff(split.documents)
        each = f", {split.bytes / split.tokens:.3f} bytes a token" if split.tokens else ""
        lines.append((
            split.name, f"{split.tokens:,} tokens, {split.bytes:,} bytes of text{each}, {len(sizes):,} documents in "
            f"{len(split.shards)} shards",
        ))  # fmt: skip
        if len(sizes):
            marks = np.quantile(sizes, (0.1, 0.5, 0.9, 1), method="nearest")
            shares = ", ".join(
                f"{name} {int(mark):,}" for name, mark in zip(("10 %", "half", "90 %", "all"), marks, strict=True)
            )
            lines.append(("", f"tokens a document, at most: {shares}"))
    lines += [(name.replace("_", " "), _in_words(value)) for name, value in data.provenance.items()]
    return lines


def _in_words(value: object) -> str:
    """Return what data tell of their origin as a person would write it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case None | "":
            return "none"
        case dict():  # not "case {}", which any dict matches
            return ", ".join(f"{name.replace('_', ' ')} {_in_words(part)}" for name, part in value.items()) or "none"
        case list():
            return ", ".join(_in_words(part) for part in value) or "none"
    return str(value)


def _draw(config: PreTrainedConfig, tokens: int, output: Path) -> None:
    from longnet.model.patterns import pattern_of
    from longnet.plots.patterns import draw_pattern

    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    draw_pattern(pattern_of(config), output, tokens=tokens, num_heads=heads)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
