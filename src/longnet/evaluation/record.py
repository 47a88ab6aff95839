"""What an evaluation found: its file, its pictures, and what it says in words."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from longnet.evaluation.passkey import PasskeyResult
from longnet.evaluation.perplexity import ContextResult, Difference, paired_difference
from longnet.plots.charts import Curve, draw_curves
from longnet.plots.names import name_length

_ROUNDING = 1e-5  # nats per token


@dataclass(frozen=True)
class Evaluation:
    """A model evaluated on data.

    Attributes:
        model: folder.
        data: folder.
        attention: the model's, while it was evaluated.
        training_length: tokens of a training sequence; None where the model does not say.
        contexts: shortest first.
        passkey: nearest first; empty where it was not asked for.
        provenance: machine, versions, commit, date.
    """

    model: str
    data: str
    attention: str
    training_length: int | None
    contexts: list[ContextResult]
    passkey: list[PasskeyResult] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return JSON, with the paired differences between successive contexts; `from_json` reads it."""
        row = dataclasses.asdict(self)
        row["contexts"] = [
            {**result.as_row(), "beyond_training": self.is_beyond(result.context)} for result in self.contexts
        ]
        row["differences"] = [
            {"context": long.context, "than": short.context, "loss": mean, "standard_error": error}
            for short, long, (mean, error) in successive(self.contexts)
        ]
        return json.dumps(row, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `as_json` was called on."""
        row = json.loads(text)
        row["contexts"] = [ContextResult.from_row(context) for context in row["contexts"]]
        row["passkey"] = [PasskeyResult(**result) for result in row["passkey"]]
        return cls(**{item.name: row[item.name] for item in dataclasses.fields(cls)})

    def is_beyond(self, context: int) -> bool | None:
        """Tell whether a context is longer than the training sequences; None where that is unknown."""
        return None if self.training_length is None else context > self.training_length

    def draw(self, folder: Path) -> dict[str, Path]:
        """Draw perplexity and change of loss by context, loss by position, and pass keys; return the files."""
        folder.mkdir(parents=True, exist_ok=True)
        kind = self.attention
        mark = None if self.training_length is None else (self.training_length, "training length")
        lengths = [result.context for result in self.contexts]
        pictures = {name: folder / f"{name}.svg" for name in ("perplexity", "difference", "position")}
        draw_curves(
            [Curve("", lengths, [result.perplexity for result in self.contexts], None, kind)],
            pictures["perplexity"], x="context length (tokens)", y="perplexity", mark=mark,
        )  # fmt: skip
        shortest = self.contexts[0]
        steps = [paired_difference(result, shortest) for result in self.contexts]
        draw_curves(
            [Curve("", lengths, [step.mean for step in steps], [step.standard_error for step in steps], kind)],
            pictures["difference"], x="context length (tokens)", y="change of loss (nats per token)", mark=mark,
            zero=f"loss with {name_length(shortest.context)} of context",
        )  # fmt: skip
        draw_curves(
            [position_curve(result, name_length(result.context), kind) for result in self.contexts],
            pictures["position"], x="position in the window (tokens)", y="loss (nats per token)", mark=mark,
        )  # fmt: skip
        if self.passkey:
            pictures |= {name: folder / f"{name}.svg" for name in ("passkey", "gain")}
            distances = [result.distance for result in self.passkey]
            draw_curves(
                [Curve("", distances, [result.exact for result in self.passkey], None, kind)],
                pictures["passkey"], x="distance (tokens)", y="share of keys retrieved", mark=mark,
            )  # fmt: skip
            gains = [result.gain for result in self.passkey]
            errors = [result.gain_standard_error for result in self.passkey]
            draw_curves(
                [Curve("", distances, gains, errors, kind)],
                pictures["gain"], x="distance (tokens)", y="gained by the key (nats per token)", mark=mark,
                zero="as without a key",
            )  # fmt: skip
        return pictures

    def headline(self) -> str:
        """Say in one sentence what the longest context that was trained is worth against the shortest."""
        within = [result for result in self.contexts if not self.is_beyond(result.context)] or self.contexts
        short, long = within[0], within[-1]
        if short is long:
            return f"Perplexity {long.perplexity:.2f} with {name_length(long.context)} of context."
        step = paired_difference(long, short)
        worth = {
            "falls": "the longer context helps",
            "rises": "the longer context harms",
            "does not clearly change": "the longer context makes no clear difference",
        }[judge(step)]
        return (
            f"With {name_length(long.context)} of context in place of {name_length(short.context)}, perplexity on the "
            f"same tokens is {long.perplexity:.2f} in place of {short.perplexity:.2f}: {worth} ({with_error(step)} "
            "nats per token)."
        )

    def sentences(self) -> list[str]:
        """Say what the figures show, and what they don't."""
        said = [describe_step(short, long, step) for short, long, step in successive(self.contexts)]
        beyond = [name_length(result.context) for result in self.contexts if self.is_beyond(result.context)]
        if beyond:
            said.append(
                f"Contexts of {', '.join(beyond)} are longer than the training sequences of "
                f"{name_length(self.training_length or 0)}: the model was not trained on those."
            )
        units = len(self.contexts[0].by_unit)
        if units < 30:
            said.append(
                f"The {self.contexts[0].tokens:,} scored tokens are {units} windows of the longest context: the "
                "standard errors are rough themselves."
            )
        if self.passkey:
            said.append(_describe_passkey(self.passkey))
        return said


def successive(contexts: Sequence[ContextResult]) -> list[tuple[ContextResult, ContextResult, Difference]]:
    """Return each context but the first with the one before it, and the paired difference of their losses."""
    return [(short, long, paired_difference(long, short)) for short, long in itertools.pairwise(contexts)]


def position_curve(result: ContextResult, label: str, kind: str) -> Curve:
    """Return the loss by position, each bin at its end."""
    ends = [part.position_to for part in result.by_position]
    losses = [part.loss for part in result.by_position]
    return Curve(label, ends, losses, [part.standard_error for part in result.by_position], kind)


def judge(difference: Difference) -> str:
    """Return "falls", "rises", or "does not clearly change": by less than two standard errors, or by rounding."""
    mean, error = difference
    if error is None or abs(mean) <= max(2 * error, _ROUNDING):
        return "does not clearly change"
    return "falls" if mean < 0 else "rises"


def with_error(difference: Difference, *, sign: bool = True) -> str:
    """Return "−0.031 ± 0.004", the latter one standard error, with as many digits as it tells."""
    mean, error = difference
    digits = 4 if error is None or error >= 0.00095 else 6
    value = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return value.replace("-", "−") + ("" if error is None else f" ± {error:.{digits}f}")


def describe_step(short: ContextResult, long: ContextResult, step: Difference) -> str:
    """Say what a longer context does to the loss."""
    verdict = {
        "falls": "the loss falls: the longer context helps",
        "rises": "the loss rises: the longer context harms",
        "does not clearly change": "no clear change of the loss",
    }[judge(step)]
    return (
        f"From {name_length(short.context)} to {name_length(long.context)} of context, on the same tokens: {verdict} "
        f"({with_error(step)} nats per token; perplexity {short.perplexity:.3f} → {long.perplexity:.3f})."
    )


def _describe_passkey(results: Sequence[PasskeyResult]) -> str:
    found = [result for result in results if result.exact > 0]
    hints = [result for result in results if (result.gain_standard_error or 0) * 2 < result.gain]
    exact = (
        f"retrieved at {', '.join(f'{result.distance:,} ({result.exact:.0%})' for result in found)} tokens"
        if found
        else "not retrieved at any distance"
    )
    hint = (
        f"the key told raises its own probability at {', '.join(f'{result.distance:,}' for result in hints)} tokens"
        if hints
        else "at no distance does the key told raise its own probability by more than chance"
    )
    return f"Pass keys ({results[0].trials} a distance): {exact}; {hint}."
