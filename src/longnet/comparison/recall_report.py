"""The report of `longnet recall`: accuracy by distance against the FLOPs of attention, and its headline."""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longnet.comparison.document import Code, Document, Heading, Headline, Picture, Points, Table, Text, write_text
from longnet.comparison.recall import RecallCellResult, RecallOutcome
from longnet.comparison.systems import kind_of, order_of, title_of
from longnet.evaluation.recall import RecallResult, RecallTask
from longnet.plots.charts import Curve, draw_curves
from longnet.training.config import to_toml

_BAR = 0.95  # of what dense attention recalls, in every bucket of distance


@dataclass(frozen=True)
class SystemRecall:
    """A system's answers, all its seeds together.

    Attributes:
        system: its name.
        cells: its results, a seed each.
        share: of dense attention's FLOPs; None where the dense system was left out.
    """

    system: str
    cells: list[RecallCellResult]
    share: float | None

    def result(self, pairs: int) -> RecallResult:
        """Return the answers of all seeds to sequences of so many pairs."""
        parts = [result for cell in self.cells for result in cell.results if result.pairs == pairs]
        return functools.reduce(operator.add, parts)

    def accuracies(self, task: RecallTask, pairs: int) -> list[float]:
        """Return the share of right answers in each bucket of distance."""
        result = self.result(pairs)
        return [result.accuracy(low, high) or 0.0 for low, high in task.buckets]

    def spread(self, low: int, high: int, pairs: int) -> float:
        """Return the largest difference between two seeds in a bucket."""
        values = [
            result.accuracy(low, high) or 0.0 for cell in self.cells for result in cell.results if result.pairs == pairs
        ]
        return max(values) - min(values)


def write_recall_report(outcome: RecallOutcome, output: Path) -> Path:
    """Write OUT/report.md, its pictures in OUT/figures, and OUT/report.html, which needs nothing else; return that."""
    task = outcome.recipe.task
    document = Document(f"What is recalled over {task.tokens:,} tokens, by distance and attention")
    systems = gather_systems(outcome)
    if systems:
        document.add(Headline(describe_headline(systems, task)))
        _describe(document, systems, outcome, output / "figures")
    else:
        document.add(Text("No cell is finished."))
    if outcome.failures:
        document.add(Heading("Cells that failed"))
        document.add(Points([f"{cell.title}: {reason}" for cell, reason in outcome.failures.items()]))
        document.add(Text("The same command tries them again."))
    document.add(Heading("Recipe"), Code(to_toml(outcome.recipe.tables())))
    write_text(document.to_markdown(output), output / "report.md")
    write_text(document.to_html(), output / "report.html")
    return output / "report.html"


def gather_systems(outcome: RecallOutcome) -> list[SystemRecall]:
    """Return the systems that have a finished cell, dense attention first."""
    names = outcome.recipe.recall.systems
    own = {name: [result for result in outcome.results if result.system == name] for name in names}
    dense = next((cells[0].attention_flops for name, cells in own.items() if name == "sdpa" and cells), None)
    return [
        SystemRecall(name, own[name], None if dense is None else own[name][0].attention_flops / dense)
        for name in sorted(names, key=order_of)
        if own[name]
    ]


def describe_headline(systems: Sequence[SystemRecall], task: RecallTask) -> str:
    """Say which systems recall what dense attention does at every distance, and at what share of its FLOPs."""
    pairs = max(task.scored)
    dense = next((system for system in systems if system.system == "sdpa"), None)
    said = f"With {pairs} pairs in {task.tokens:,} tokens, "
    if dense is None:
        worst = [f"{title_of(one.system)} {min(one.accuracies(task, pairs)):.2f}" for one in systems]
        return f"{said}the share of right answers in the worst bucket of distance is: {', '.join(worst)}."
    full = dense.accuracies(task, pairs)
    reach: list[str] = []
    miss: list[str] = []
    for one in systems:
        if one is dense:
            continue
        ratios = [own / other if other else 0.0 for own, other in zip(one.accuracies(task, pairs), full, strict=True)]
        least, (low, high) = min(zip(ratios, task.buckets, strict=True))
        words = f"{title_of(one.system)} ({least:.2f} at {low}–{high - 1}, FLOPs {one.share:.3f})"
        (reach if least >= _BAR else miss).append(words)
    return (
        f"{said}as a share of what dense attention recalls, at the worst distance and with its share of dense "
        f"attention's FLOPs: {_BAR} or more for {_listed(reach)}; less for {_listed(miss)}. Dense attention itself is "
        f"right in {min(full):.2f} of the questions or more, a guess in {1 / task.values:.2f}."
    )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) if words else "no system"


def _describe(document: Document, systems: Sequence[SystemRecall], outcome: RecallOutcome, figures: Path) -> None:
    task, settings = outcome.recipe.task, outcome.recipe.recall
    first = systems[0].cells[0]
    document.add(
        Text(
            f"The same model of {first.parameters:,} parameters with each attention, trained for {settings.steps} "
            f"steps of {settings.batch_sequences} sequences, and asked the same questions in sequences that no "
            "training has seen. A sequence tells values beside keys, a row each, and asks for them by key; what stands "
            "between means nothing. Distance is that from the pair to its question; each bucket of distances is asked "
            "for as often. q_proj and k_proj begin as a match on the key, so that few steps do; what a plain start "
            f"would need was not measured. {_origin(first)}"
        )
    )
    for pairs in sorted(task.scored, reverse=True):
        what = "A pass key: one pair, one question" if pairs == 1 else f"{pairs} pairs, {pairs} questions"
        document.add(Heading(what), _by_distance(systems, task, pairs))
        document.add(Picture(_draw_distances(systems, task, pairs, figures), f"{what}: right answers by distance."))
    most = max(task.scored)
    document.add(
        Heading("Where two rows meet"),
        Text(
            "A head joins a question to a pair if it lets the one attend to the other in one hop; the tokens between "
            "could pass the value on in two, which is what the paper counts on. Questions of all distances:"
        ),
        _by_reach(systems, task, most),
    )
    modulus = _largest_rate(systems)
    if modulus > 1:
        low = task.buckets[-2][0] if len(task.buckets) > 1 else task.distances[0]
        document.add(
            Heading(f"By distance modulo {modulus}"),
            Text(f"Distances of {low} and more, {most} pairs; {modulus} is the largest dilation rate."),
            _by_rest(systems, task, most, low, modulus),
            Picture(
                _draw_rests(systems, task, most, low, modulus, figures),
                f"Right answers by distance modulo {modulus}, from {low} tokens on.",
            ),
        )
    document.add(Heading("Training"), Picture(_draw_losses(systems, figures), "Training loss, mean of the seeds."))
    document.add(Heading("What this cannot show"), Points(_limits(outcome, systems)))


def _origin(result: RecallCellResult) -> str:
    about = result.provenance
    return (
        f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}, commit {about['commit']}, float32."
    )


def _by_distance(systems: Sequence[SystemRecall], task: RecallTask, pairs: int) -> Table:
    rows = []
    for one in systems:
        cells = [
            f"{value:.3f}" + (f" ({one.spread(low, high, pairs):.3f})" if len(one.cells) > 1 else "")
            for value, (low, high) in zip(one.accuracies(task, pairs), task.buckets, strict=True)
        ]
        share = "" if one.share is None else f"{one.share:.3f}"
        rows.append([title_of(one.system), one.cells[0].pattern, share, f"{one.cells[0].attention_flops:.3e}", *cells])
    head = ["system", "pattern", "of dense FLOPs", "attention FLOPs a sequence"]
    asked = sum(systems[0].result(pairs).asked)
    caption = (
        f"Share of right answers by distance, all seeds together ({asked:,} questions a system)"
        f"{'; in brackets the largest difference between two seeds' if len(systems[0].cells) > 1 else ''}."
    )
    return Table([*head, *(f"{low}–{high - 1}" for low, high in task.buckets)], rows, caption)


def _by_reach(systems: Sequence[SystemRecall], task: RecallTask, pairs: int) -> Table:
    low, high = task.distances[0], task.distances[-1]
    rows = []
    for one in systems:
        result = one.result(pairs)
        joined, other = (result.reached(low, high, is_joined=flag) for flag in (True, False))
        share = sum(result.joined_asked) / max(1, sum(result.asked))
        rows.append(
            [
                title_of(one.system),
                f"{share:.3f}",
                *("none" if part is None else f"{part:.3f}" for part in (joined, other)),
            ]
        )
    return Table(["system", "joined", "right, of those", "right, of the others"], rows)


def _by_rest(systems: Sequence[SystemRecall], task: RecallTask, pairs: int, low: int, modulus: int) -> Table:
    rows = [
        [title_of(one.system), *(f"{value:.3f}" for value in _rests(one.result(pairs), task, low, modulus))]
        for one in systems
    ]
    return Table(["system", *(str(rest) for rest in range(modulus))], rows)


def _rests(result: RecallResult, task: RecallTask, low: int, modulus: int) -> list[float]:
    high = task.distances[-1]
    return [result.accuracy(low, high, modulus=modulus, rest=rest) or 0.0 for rest in range(modulus)]


def _largest_rate(systems: Sequence[SystemRecall]) -> int:
    rates = [1]
    for one in systems:
        if ":" in one.cells[0].pattern:
            branches = one.cells[0].pattern.rpartition(" ")[2].partition(";")[0]
            rates += [int(branch.partition(":")[2]) for branch in branches.split(",")]
    return max(rates)


def _label(one: SystemRecall) -> str:
    return title_of(one.system).removeprefix("LongNet ")


def _draw_distances(systems: Sequence[SystemRecall], task: RecallTask, pairs: int, figures: Path) -> Path:
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / f"distance-{pairs}.svg"
    places = [(low * high) ** 0.5 for low, high in task.buckets]
    draw_curves(
        [Curve(_label(one), places, one.accuracies(task, pairs), kind=kind_of(one.system)) for one in systems],
        path, x="distance (tokens, middle of the bucket)", y="right answers", scale="log",
    )  # fmt: skip
    return path


def _draw_rests(
    systems: Sequence[SystemRecall], task: RecallTask, pairs: int, low: int, modulus: int, figures: Path
) -> Path:
    path = figures / "modulo.svg"
    draw_curves(
        [Curve(_label(one), range(modulus), _rests(one.result(pairs), task, low, modulus),
               kind=kind_of(one.system))
         for one in systems],
        path, x=f"distance modulo {modulus}", y="right answers", scale="linear",
    )  # fmt: skip
    return path


def _draw_losses(systems: Sequence[SystemRecall], figures: Path) -> Path:
    path = figures / "training.svg"
    curves = []
    for one in systems:
        steps = [step for step, _ in one.cells[0].losses]
        lines = zip(*(cell.losses for cell in one.cells), strict=True)
        losses = [statistics.fmean(loss for _, loss in line) for line in lines]
        curves.append(Curve(_label(one), steps, losses, kind=kind_of(one.system)))
    draw_curves(curves, path, x="steps", y="training loss (nats an answer)", scale="linear")
    return path


def _limits(outcome: RecallOutcome, systems: Sequence[SystemRecall]) -> list[str]:
    task, model = outcome.recipe.task, outcome.recipe.model_config("dilated")
    seeds = len(outcome.recipe.recall.seeds)
    sizes = ", ".join(map(str, sorted(set(task.pairs))))
    return [
        f"Trained with {sizes} pairs a sequence, asked with {', '.join(map(str, task.scored))}.",
        f"A model of {model.num_hidden_layers} layers and {outcome.recipe.recall.steps} steps, the same number for "
        "every system: what a system does not recall here it might learn with more of either.",
        "A pair lies in one row, so that one hop answers; text puts a key and its value in different tokens. Whether "
        "language needs recall at such distances, this does not say: perplexity does (docs/evidence.md).",
        f"{seeds} seed{'s' if seeds > 1 else ''}, {task.tokens:,} tokens; nothing follows for longer sequences.",
        "FLOPs of attention alone: for LongNet, the window and the Sparse Transformer counted by "
        "torch.utils.flop_counter, and equal to the closed form; for dense attention in closed form, the pairs that "
        "the causal mask hides left out.",
    ]
