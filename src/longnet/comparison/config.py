"""The recipe of a comparison, and its cells: an attention and a training length each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet.comparison.systems import check_systems, fields_of, name_of, title_of
from longnet.plots.names import name_length
from longnet.training.config import Recipe, Tables

if TYPE_CHECKING:
    from longnet.data.shards import TokenData


@dataclass(kw_only=True)
class CompareConfig:
    """The recipe's table `[compare]`: what `longnet compare` trains and evaluates."""

    attentions: tuple[str, ...] = ("sdpa", "window", "sparse_fixed", "dilated")
    """Systems: "sdpa" is the Transformer, "dilated" LongNet with [model]'s pattern, "window" blocks alone and
    "sparse_fixed" the Sparse Transformer, both at that pattern's cost; "64:1,1024:8;all" is LongNet with a pattern of
    its own."""

    lengths: tuple[int, ...] = (512, 2048)
    """Training lengths, in tokens. A step holds train.batch_sequences × train.tokens tokens at each of them."""

    contexts: tuple[int, ...] = ()
    """Context lengths of the evaluation, each a divisor of the longest; the training lengths when empty."""

    cells: tuple[str, ...] = ()
    """Which cells to run, like "sdpa-512"; every attention at every length when empty."""

    sparse_block: int | None = None
    """Block of the Sparse Transformer; the shortest segment of LongNet when None (2048 both, in the paper). Its summary
    and stride are chosen so that it costs what LongNet costs at the training length."""

    rounds: int = 3
    """Rounds of the timing at the end, in which a step of each cell runs in turn; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_systems(self.attentions, "compare.attentions")
        if not self.lengths or len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"compare.lengths must be different values, at least one, got {list(self.lengths)}")
        if min((*self.lengths, *self.contexts)) < 1:
            raise ValueError(
                f"compare.lengths and compare.contexts must be 1 or more, got {self.lengths, self.contexts}"
            )
        if self.rounds < 0 or (self.sparse_block is not None and self.sparse_block < 1):
            raise ValueError("compare.rounds must be 0 or more, and compare.sparse_block 1 or more")


class Cell(NamedTuple):
    """One entry of the comparison."""

    attention: str
    length: int

    @property
    def name(self) -> str:
        """As in `compare.cells`, and of its folder."""
        return f"{name_of(self.attention)}-{self.length}"

    @property
    def title(self) -> str:
        """For people: "LongNet, 2K"."""
        return f"{title_of(self.attention)}, {name_length(self.length)}"


@dataclass(kw_only=True)
class ComparisonRecipe(Recipe):
    """A training recipe with a table `[compare]`."""

    compare: CompareConfig = field(default_factory=CompareConfig)

    @property
    def all_cells(self) -> list[Cell]:
        """The cells, by system and length.

        Raises:
            ValueError: `compare.cells` names one that there is not, or a length does not fit the tokens of a step.
        """
        compare = self.compare
        cells = [Cell(attention, length) for attention in compare.attentions for length in sorted(compare.lengths)]
        names = [cell.name for cell in cells]
        for name in compare.cells:
            if name not in names:
                raise ValueError(f"compare.cells: there is no cell {name!r}; there are {', '.join(names)}")
        for cell in cells:
            if self.step_tokens % cell.length:
                raise ValueError(
                    f"compare.lengths: a step has train.batch_sequences × train.tokens = {self.step_tokens:,} tokens, "
                    f"which is no multiple of {cell.length:,}; choose them so that every length divides it"
                )
        return [cell for cell in cells if not compare.cells or cell.name in compare.cells]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, the same in every cell."""
        return self.train.batch_sequences * self.train.tokens

    @property
    def scored_contexts(self) -> tuple[int, ...]:
        """The context lengths of the final evaluation, shortest first."""
        return tuple(sorted(self.compare.contexts or self.compare.lengths))

    def for_cell(self, cell: Cell, data: TokenData) -> Recipe:
        """Return the training recipe of a cell: the same model, the same tokens a step, another attention and length.

        Raises:
            ValueError: no fixed pattern costs what LongNet's does.
        """
        sequences = self.step_tokens // cell.length
        part = max(1, self.step_tokens // self.train.accumulate // cell.length)  # sequences of a forward pass
        while sequences % part:
            part -= 1
        train = dataclasses.replace(
            self.train, tokens=cell.length, batch_sequences=sequences, accumulate=sequences // part
        )
        # The longest of all lengths, so that xPos places its scales alike in every cell.
        fields: dict[str, Any] = {"attention": "dilated"}
        if getattr(self.model, "max_position_embeddings") is None:  # noqa: B009  # the fields are LongNetConfig's
            fields["max_position_embeddings"] = max(*self.compare.lengths, *self.scored_contexts)
        model = dataclasses.replace(self.model, **fields)
        if cell.attention == "sparse_fixed" and getattr(model, "sparse_block") is not None:  # noqa: B009
            fields = {"attention": "sparse_fixed"}
        else:
            config = Recipe(data=self.data, model=model).model_config(data)
            fields = fields_of(cell.attention, config, tokens=cell.length, sparse_block=self.compare.sparse_block)
        model = dataclasses.replace(model, **fields)
        if model.attention != "dilated":
            train = dataclasses.replace(train, backend="auto")
        # The comparison evaluates each cell at its end; training's own last evaluation is one window here.
        evaluate = dataclasses.replace(self.evaluate, contexts=self.scored_contexts[:1], tokens=1)
        if self.evaluate.every:
            evaluate = dataclasses.replace(self.evaluate, contexts=(min(cell.length, self.scored_contexts[-1]),))
        return Recipe(
            data=self.data, model=model, optim=self.optim, train=train, evaluate=evaluate, checkpoint=self.checkpoint
        )

    def shared_tables(self, data: TokenData) -> Tables:
        """Return what decides the results of every cell, filled in; which cells there are is not part of it."""
        tables = self.for_cell(Cell("dilated", min(self.compare.lengths)), data).resolve(data)
        for key in ("attention", "sparse_block", "sparse_summary", "sparse_stride"):
            tables["model"].pop(key, None)
            if getattr(self.model, key) is not None:
                tables["model"][key] = getattr(self.model, key)
        for key in ("tokens", "batch_sequences", "accumulate"):
            tables["train"][key] = getattr(self.train, key)
        tables["evaluate"] = {"tokens": self.evaluate.tokens}
        tables["compare"] = {"contexts": list(self.scored_contexts)}
        if self.compare.sparse_block is not None:
            tables["compare"]["sparse_block"] = self.compare.sparse_block
        return tables
