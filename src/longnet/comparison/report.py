"""The comparison's report: the paper's Table 2 and Figures 6 and 7b, cost, and what holds (arXiv:2307.02486 §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from longnet.comparison.cell import CellResult
from longnet.comparison.compare import Outcome
from longnet.comparison.document import Code, Document, Heading, Headline, Picture, Points, Table, Text, write_text
from longnet.comparison.findings import (
    describe_contexts,
    describe_headline,
    describe_lengths,
    describe_limits,
    describe_systems,
    describe_use_of_context,
)
from longnet.comparison.systems import kind_of, order_of, title_of
from longnet.comparison.timing import Timing
from longnet.evaluation.perplexity import paired_difference
from longnet.evaluation.record import position_curve
from longnet.measurement import ratio
from longnet.plots.charts import Curve, draw_curves
from longnet.plots.names import name_length
from longnet.training.config import to_toml

_MOST_PAIRS = 6  # curves of differences that a picture holds


def write_report(outcome: Outcome, output: Path) -> Path:
    """Write OUT/report.md, its pictures in OUT/figures, and OUT/report.html, which needs nothing else; return that."""
    document = Document("The same model with several attentions, by training length and context")
    results = sorted(outcome.results, key=lambda result: (order_of(result.attention), result.length))
    if results:
        _describe(document, results, outcome.timing, output / "figures", outcome.tables["train"].get("init_from"))
    else:
        document.add(Text("No cell is finished."))
    if outcome.failures:
        document.add(Heading("Cells that failed"))
        document.add(Points([f"{cell.title}: {reason}" for cell, reason in outcome.failures.items()]))
        document.add(Text("The same command tries them again."))
    document.add(Heading("Recipe"), Code(to_toml(outcome.tables)))
    write_text(document.to_markdown(output), output / "report.md")
    write_text(document.to_html(), output / "report.html")
    return output / "report.html"


def _describe(
    document: Document, results: Sequence[CellResult], timing: Timing | None, figures: Path, init_from: str | None
) -> None:
    first = results[0]
    contexts = [part.context for part in first.contexts]
    scores = [
        (result.attention, result.length, {part.context: part.perplexity for part in result.contexts})
        for result in results
    ]
    document.add(
        Headline(describe_headline(scores)),
        Text(
            f"Each cell trains the same model of {first.parameters['total']:,} parameters "
            f"({first.parameters['embedding']:,} of them embeddings), "
            + (f"beginning with the weights of {init_from}, " if init_from is not None else "")
            + f"on {first.tokens:,} tokens, "
            f"{first.steps:,} steps of {first.tokens // first.steps:,}, and is scored on the same "
            f"{first.contexts[0].tokens:,} validation tokens at every context length. “±” is one standard error, over "
            f"{len(first.contexts[0].by_unit)} windows of {contexts[-1]:,} tokens; differences are paired by window, "
            "and called clear from two standard errors on."
        ),
        Heading("What holds"),
        Points([*describe_use_of_context(results), *describe_systems(results), *describe_lengths(results, contexts)]),
        Heading("Perplexity by training length and context (Table 2 of the paper)"),
        _perplexities(results, contexts),
        Text("* longer than the training sequences."),
        Points(describe_contexts(results)),
    )
    document.add(*_pictures(results, contexts, figures), Heading("Cost"), _costs(results, timing))
    document.add(Points(_cost_notes(results, timing)))
    document.add(Heading("What this cannot show"), Points(describe_limits(results, init_from)))
    document.add(Heading("Where and with what"), _origins(results))


def _perplexities(results: Sequence[CellResult], contexts: Sequence[int]) -> Table:
    rows = []
    for result in results:
        cells = []
        for part in result.contexts:
            mark = "*" if part.context > result.length else ""
            error = "" if part.standard_error is None else f" ± {part.perplexity * part.standard_error:.3f}"
            cells.append(f"{part.perplexity:.3f}{error}{mark}")
        rows.append([title_of(result.attention), name_length(result.length), str(result.batch_sequences), *cells])
    return Table(["system", "training length", "batch", *map(name_length, contexts)], rows)


def _pictures(results: Sequence[CellResult], contexts: Sequence[int], figures: Path) -> list[Heading | Picture]:
    figures.mkdir(parents=True, exist_ok=True)
    longest = contexts[-1]

    def at_own_length(result: CellResult) -> float:
        within = [part for part in result.contexts if part.context <= result.length] or result.contexts[:1]
        return within[-1].perplexity

    systems = {
        attention: [result for result in results if result.attention == attention]
        for attention in dict.fromkeys(result.attention for result in results)
    }
    paths = {name: figures / f"{name}.svg" for name in ("flops", "context", "difference", "training", "position")}
    draw_curves(
        [Curve(title_of(name), [result.total_flops for result in own], [at_own_length(result) for result in own],
               kind=kind_of(name), names=[name_length(result.length) for result in own])
         for name, own in systems.items()],
        paths["flops"], x="FLOPs of the whole training", y="perplexity at the training length", scale="log",
    )  # fmt: skip
    draw_curves(
        [Curve(result.cell.title, contexts, [part.loss for part in result.contexts], None, kind_of(result.attention))
         for result in results],
        paths["context"], x="context length (tokens)", y="loss (nats per token)",
    )  # fmt: skip
    pairs = [
        (result, other)
        for result in results
        for other in results
        if kind_of(result.attention) == "dilated" != kind_of(other.attention) and result.length == other.length
    ]
    chosen = _nearest_in_cost(pairs) if len(pairs) > _MOST_PAIRS else pairs
    if pairs:
        _draw_differences(chosen, contexts, paths["difference"])
    else:
        del paths["difference"]
    draw_curves(
        [Curve(result.cell.title, [tokens for tokens, _ in result.losses], [loss for _, loss in result.losses],
               kind=kind_of(result.attention)) for result in results],
        paths["training"], x="tokens trained on", y="training loss (nats per token)", scale="linear",
    )  # fmt: skip
    draw_curves(
        [replace(position_curve(result.at(longest), result.cell.title, kind_of(result.attention)), error=None)
         for result in results],
        paths["position"], x="position in the window (tokens)", y="loss (nats per token)",
    )  # fmt: skip
    captions = {
        "flops": "Perplexity at each cell's training length against the FLOPs of its training, counted; a line joins "
        "the training lengths of a system (Figure 6 of the paper).",
        "context": "Loss on the same tokens against the context length (Figure 7b of the paper).",
        "difference": "LongNet's loss less that of the other systems trained at the same length, on the same windows, "
        "against the context length; bars: ±2 standard errors. Below 0 LongNet is better."
        + (" Of many systems the one nearest in FLOPs to each." if chosen is not pairs else ""),
        "position": f"Loss by position, in windows of {longest:,} tokens: how much each token gains from those before.",
        "training": "Training loss.",
    }
    return [
        Heading("Pictures"),
        *(Picture(paths[name], caption) for name, caption in captions.items() if name in paths),
    ]


def _nearest_in_cost(pairs: Sequence[tuple[CellResult, CellResult]]) -> list[tuple[CellResult, CellResult]]:
    """Return of each LongNet's pairs the one whose steps cost most nearly the same."""
    of_ours: dict[str, list[tuple[CellResult, CellResult]]] = {}
    for ours, other in pairs:
        of_ours.setdefault(ours.cell.name, []).append((ours, other))
    return [
        min(own, key=lambda pair: abs(math.log(pair[0].flops["counted"] / pair[1].flops["counted"])))
        for own in of_ours.values()
    ]


def _draw_differences(pairs: Sequence[tuple[CellResult, CellResult]], contexts: Sequence[int], path: Path) -> None:
    curves, is_one = [], len({ours.attention for ours, _ in pairs}) == 1
    for ours, other in pairs:
        steps = [paired_difference(ours.at(context), other.at(context)) for context in contexts]
        less = "" if is_one else f"{title_of(ours.attention).removeprefix('LongNet ')} less "
        label = f"{less}{title_of(other.attention)}, {name_length(other.length)}"
        losses, errors = [step.mean for step in steps], [step.standard_error for step in steps]
        curves.append(Curve(label, contexts, losses, errors, kind_of(other.attention)))
    draw_curves(
        curves, path, x="context length (tokens)", y="LongNet less the other (nats per token)", zero="no difference"
    )


def _costs(results: Sequence[CellResult], timing: Timing | None) -> Table:
    head = ["cell", "FLOPs a step", "attention, of that", "FLOPs in all", "attention / dense", "seconds in steps",
            "peak memory, MB", "before the model, MB"]  # fmt: skip
    rows = []
    for result in results:
        flops = result.flops
        row = [
            result.cell.title,
            f"{flops['counted']:.4e}",
            f"{flops['attention'] / flops['counted']:.1%}",
            f"{result.total_flops:.4e}",
            f"{flops['attention_per_token'] / flops['dense_attention_per_token']:.3f}",
            f"{result.seconds:,.1f}",
            f"{result.peak_bytes / 1e6:,.0f}",
            f"{result.start_bytes / 1e6:,.0f}",
        ]
        if timing is not None:
            other = _baseline(results, result)
            share = ratio(timing.of(result.cell.name), timing.of(other.cell.name))
            row += [f"{timing.median(result.cell.name):.3f}", f"{share:.3f}"]
        rows.append(row)
    if timing is not None:
        head += ["seconds a step, in turn", f"ratio to {title_of(results[0].attention)}"]
    return Table(head, rows)


def _baseline(results: Sequence[CellResult], result: CellResult) -> CellResult:
    """Return the cell of the first system at the same length; the very first where there is none."""
    same = [other for other in results if other.length == result.length and other.attention == results[0].attention]
    return same[0] if same else results[0]


def _cost_notes(results: Sequence[CellResult], timing: Timing | None) -> list[str]:
    notes = [
        "FLOPs are those of matrix products, forward and backward, as they are executed (flash attention computes the "
        "scores twice): counted by torch.utils.flop_counter for the blocks and for dilated and fixed sparse attention, "
        "in closed form for the loss and for dense attention, of which the pairs that the causal mask hides are left "
        "out. The counter and the closed form agree in every cell.",
        "“Seconds in steps” is wall-clock time with whatever else the machine was doing. Peak memory is that of the "
        "cell's own process while it trained, libraries included; of a cell that a GPU trained, of the GPU's memory.",
    ]
    if timing is not None:
        base = _baseline(results, results[-1]).cell.title.partition(",")[0]
        notes.append(
            f"“Seconds a step, in turn”: median of {len(timing.seconds[0])} rounds, in each of which a step of every "
            f"cell ran, one after the other, in one process, on {timing.device}. The ratio is the median over rounds, "
            f"against {base} at the same length where it is there."
        )
    return notes


def _origins(results: Sequence[CellResult]) -> Table:
    head = ["cell", "pattern", "commit", "torch", "device", "threads", "seed", "data"]
    rows = [
        [
            result.cell.title, result.pattern, str(about["commit"]), str(about["torch"]), str(about["device"]),
            str(about["threads"]), str(result.seed), str(about["data"])[:12],
        ]
        for result in results
        for about in [result.provenance]
    ]  # fmt: skip
    return Table(head, rows)
