"""The recipe of a training run: one dataclass a table, each beside its owner, composed here.

No annotation is a string here, since cyclopts looks those of a class that extends Recipe up in the extension's module.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longnet.evaluation.perplexity import EvaluateConfig
from longnet.model.configuration import LongNetConfig
from longnet.model.patterns import dilated_by, sparse_pattern_of
from longnet.training.checkpoint import CheckpointConfig
from longnet.training.optim import OptimConfig

if TYPE_CHECKING:
    from longnet.data.shards import TokenData

Attention = Literal["dilated", "sdpa", "sparse_fixed"]
Tables = dict[str, dict[str, Any]]

# What may differ between a run and its resumption: where things lie, who computes them and what is told, nothing that
# is learned.
_FREE = {"data.path", "train.device", "train.backend", "train.log_every", "train.tensorboard", "train.max_skipped"}
_FREE_TABLES = {"parallel", "evaluate", "sample", "checkpoint"}


@dataclass(kw_only=True)
class DataConfig:
    """The recipe's table `[data]`."""

    path: Path
    """Folder of tokens, which `longnet prepare` wrote; relative to where the command is started."""


@dataclass(kw_only=True)
class TrainConfig:
    """The recipe's table `[train]`."""

    steps: int = 1000
    """Optimizer steps of the whole run."""

    tokens: int = 2048
    """Length of a training sequence, in tokens."""

    batch_sequences: int = 8
    """Sequences of a step. The order of the tokens depends on this and on the seed, on nothing else."""

    accumulate: int = 1
    """Into how many parts, one after the other, a step's sequences are divided: more parts, less memory, the same
    result but for rounding. A divisor of batch_sequences."""

    chunk_tokens: int | None = None
    """Learn from each sequence in chunks of so many tokens, exactly, in the memory of one: for sequences that do not
    fit. Slower by a pass without a graph; keeps a log on disk, and a checkpoint of every step. None learns at once."""

    init_from: Path | None = None
    """Folder of a run, a checkpoint or a LongNet whose weights training begins with, to go on with longer sequences or
    another attention; its model must be the recipe's in all else. Relative to where the command is started. None begins
    at random."""

    seed: int = 0
    """Of the initial weights, of the order of the data and of dropout."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation: bfloat16 is autocast. Weights and the optimizer's state are float32 in either case."""

    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, then faster, on GPUs above all."""

    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: slower, in far less memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""

    backend: Literal["auto", "triton"] = "auto"
    """Of dilated attention: auto takes what is known to be fast; triton is one fused kernel, on CUDA (docs/gpu.md)."""

    log_every: int = 10
    """Steps between two lines of metrics."""

    tensorboard: bool = False
    """Write TensorBoard files beside metrics.jsonl (extra `tensorboard`)."""

    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, after which the run ends; each changes no weight."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("steps", "tokens", "batch_sequences", "accumulate", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"train.chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train.seed must be 0 or more and below 2^63, got {self.seed}")
        if self.batch_sequences % self.accumulate:
            raise ValueError(
                f"train.accumulate must divide train.batch_sequences = {self.batch_sequences}, got {self.accumulate}"
            )


@dataclass(kw_only=True)
class ParallelConfig:
    """The recipe's table `[parallel]`: dp × sp processes, which torchrun starts (docs/distributed.md)."""

    dp: int = 1
    """Ranks that divide the sequences of a step among them."""

    sp: int = 1
    """Ranks that divide each sequence among them, a slice of its tokens on each; only with dilated attention."""

    timeout_seconds: int = 600
    """How long a rank may take for one thing: a step, compiling, an evaluation, reading a checkpoint, waiting until one
    is written. After that the others stop, and name it."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("dp", "sp", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.sp


@dataclass(kw_only=True)
class SampleConfig:
    """The recipe's table `[sample]`: text that the model writes while it learns."""

    every: int = 0
    """Steps between two samples; 0 writes none."""

    prompt: str = ""
    """Text to continue; empty begins a document."""

    tokens: int = 200
    """Tokens to write, at most."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (("every", 0), ("tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sample.{name} must be at least {least}, got {getattr(self, name)}")


def _arguments_of(docstring: str | None) -> str:
    found = re.search(r"^ *Args:\n(.*?)(?=\n\n)", docstring or "", re.DOTALL | re.MULTILINE)
    arguments = found.group(1) if found else ""
    for name, rule in (
        ("vocab_size", "V; the data's when None."),
        ("eos_token_id", "ends generation; the data's when None."),
    ):
        arguments = re.sub(rf"(?m)^( *{name}: ).*$", rf"\g<1>{rule}", arguments)
    return arguments


if TYPE_CHECKING:

    @dataclass(kw_only=True)
    class ModelConfig:
        """What type checkers know of the class below."""

        preset: str | None = None
        attention: Attention = "dilated"
else:
    # The fields of LongNetConfig are these, with their types and descriptions, None where the recipe leaves one out.
    ModelConfig = dataclasses.make_dataclass(
        "ModelConfig",
        [
            ("preset", str | None, None),
            ("attention", Attention, "dilated"),
            *((name, hint | None, None) for name, hint in LongNetConfig.__annotations__.items()),
        ],
        kw_only=True,
    )
    ModelConfig.__module__ = __name__
    ModelConfig.__doc__ = f"""The recipe's table `[model]`: a size with a name, or LongNetConfig's fields, or both.

    Args:
        preset: a size with a name ("tiny", "5m", "25m", "125m", "350m", "760m", "2.7b"), whose fields hold where the
            recipe gives no others; the paper's 125M model when None.
        attention: "dilated" is LongNet, "sdpa" the dense Transformer, "sparse_fixed" the Sparse Transformer.
{_arguments_of(LongNetConfig.__doc__)}

    """


@dataclass(kw_only=True)
class Recipe:
    """What a training run is: tables of settings, as in the recipe's TOML file."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def model_config(self, data: "TokenData") -> LongNetConfig:
        """Return the configuration of the model, whose vocabulary and end token are the data's unless given.

        Raises:
            ValueError: fields that make no model, or a vocabulary smaller than the data's.
        """
        given = getattr(self.model, "vocab_size")  # noqa: B009  # the fields are LongNetConfig's
        if given is not None and given < data.vocab_size:
            raise ValueError(
                f"model.vocab_size = {given} is too small for {self.data.path}, whose vocabulary has "
                f"{data.vocab_size} tokens: leave vocab_size out, or give at least {data.vocab_size}"
            )
        return config_of(
            self.model,
            attn_implementation=self.implementation,
            vocab_size=data.vocab_size,
            eos_token_id=data.end_of_text,
        )

    def resolve(self, data: "TokenData") -> Tables:
        """Return the tables of the recipe with every value filled in, the model's and the evaluation's too.

        Raises:
            ValueError: tables that do not go together.
        """
        self._check_ways()
        config = self.model_config(data)
        names = [item.name for item in dataclasses.fields(Recipe)]  # what a subclass adds is not training's
        tables: Tables = {name: plain(dataclasses.asdict(getattr(self, name))) for name in names}
        model = {name: getattr(config, name) for name in LongNetConfig.__annotations__}
        tables["model"] = plain({"attention": self.model.attention, **model})
        tables["evaluate"]["contexts"] = list(self.contexts)
        return tables

    def _check_ways(self) -> None:
        train, dp, sp = self.train, self.parallel.dp, self.parallel.sp
        if train.batch_sequences % (dp * train.accumulate):
            raise ValueError(
                f"parallel.dp × train.accumulate must divide train.batch_sequences = {train.batch_sequences}, got "
                f"{dp} × {train.accumulate}"
            )
        if train.chunk_tokens is not None and (sp > 1 or self.model.attention != "dilated"):
            raise ValueError(
                f"train.chunk_tokens needs parallel.sp = 1 and model.attention = 'dilated', got parallel.sp = {sp} and "
                f"{self.model.attention!r}: take parallel.dp for ranks, or leave it out"
            )
        if sp > 1 and self.model.attention != "dilated":
            raise ValueError(
                f"parallel.sp = {sp} needs model.attention = 'dilated', got {self.model.attention!r}: use parallel.dp"
            )
        if train.backend != "auto" and self.model.attention != "dilated":
            raise ValueError(
                f"train.backend = {train.backend!r} is one of model.attention = 'dilated', got "
                f"{self.model.attention!r}: leave it out"
            )
        if sp > train.tokens:
            raise ValueError(f"parallel.sp = {sp} ranks cannot share {train.tokens} tokens of a sequence")

    @property
    def implementation(self) -> str:
        """The attention as transformers has it: by its backend, where it is dilated."""
        return dilated_by(self.train.backend) if self.model.attention == "dilated" else self.model.attention

    @property
    def contexts(self) -> tuple[int, ...]:
        """The context lengths of evaluations."""
        return self.evaluate.contexts or (self.train.tokens,)


def config_of(model: ModelConfig, **defaults: Any) -> LongNetConfig:
    """Return the configuration that a table `[model]` makes, with `defaults` for fields that it leaves out.

    Raises:
        ValueError: fields that make no model.
    """
    given = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    preset, attention = given.pop("preset", None), given.pop("attention")
    given = {"attn_implementation": attention, **defaults, **given}
    try:
        config = LongNetConfig(**given) if preset is None else LongNetConfig.preset(preset, **given)
        if attention == "sparse_fixed":
            sparse_pattern_of(config)
        if attention != "sdpa" and config.attention_dropout:
            raise ValueError(f"attention_dropout must be 0 with {attention} attention, got {config.attention_dropout}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"[model]: {error}") from error
    return config


def with_defaults(tables: Tables, like: Tables) -> Tables:
    """Return the tables of a recipe that an earlier version has written, with the settings that there are since then.

    Whatever such a setting makes possible was not done before: its default is what held.

    Args:
        tables: as written.
        like: the same of this version, for which settings to look.
    """
    known: dict[str, Any] = {
        each.name: each.default_factory()
        for each in dataclasses.fields(Recipe)
        if each.default_factory is not dataclasses.MISSING
    }
    # Of a model some defaults follow from its other settings.
    model = tables.get("model", {})
    known["model"] = LongNetConfig(
        **{key: value for key, value in model.items() if key in LongNetConfig.__annotations__}
    )

    def default(table: str, key: str) -> Any:
        value = getattr(known.get(table), key, None)
        return list(value) if isinstance(value, tuple) else value

    return {
        name: {**{key: default(name, key) for key in like.get(name, {})}, **table} for name, table in tables.items()
    }


def differences(old: Tables, new: Tables) -> list[str]:
    """Return the dotted keys of a resolved recipe that may not change when a run is resumed, and did.

    Where the learning rate does not depend on the number of steps (schedule "constant", and no warm-up that is cut
    short), that may change.
    """
    changed = []
    old = with_defaults(old, new)
    for table in sorted((old.keys() | new.keys()) - _FREE_TABLES):
        before, after = old.get(table, {}), new.get(table, {})
        changed += [
            f"{table}.{key}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and f"{table}.{key}" not in _FREE
        ]
    steps = {"train.steps"} & {*changed}
    if steps and old["optim"]["schedule"] == "constant":
        fewest = min(tables["train"]["steps"] for tables in (old, new))
        if fewest >= old["optim"]["warmup_steps"]:
            changed.remove("train.steps")
    return changed


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return tables of plain values as TOML."""
    lines = []
    for name, table in tables.items():
        # A JSON string, number, boolean or list of them is TOML's, too.
        lines += [
            f"[{name}]",
            *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()),
            "",
        ]
    return "\n".join(lines)


def plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's values as TOML and JSON know them, those that are None left out."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }
