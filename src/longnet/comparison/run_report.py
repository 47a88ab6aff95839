"""The report of one run: what was trained, and how it fares by context."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from longnet.attention.pattern import DilationPattern
from longnet.comparison.document import Code, Document, Heading, Headline, Picture, Points, Table, Text, write_text
from longnet.comparison.findings import describe_run_limits
from longnet.evaluation.record import Evaluation
from longnet.model import LongNetConfig
from longnet.model.budget import count_parameters, step_flops
from longnet.model.cost import attention_flops
from longnet.model.patterns import pattern_of
from longnet.plots.charts import Curve, draw_curves
from longnet.plots.names import name_length
from longnet.plots.patterns import draw_pattern

_DRAWN_TOKENS = 2**17


def write_run_report(run: Path, config: PreTrainedConfig, evaluation: Evaluation, path: Path) -> None:
    """Write one HTML file, which needs nothing else, about a model and its evaluation.

    Args:
        run: of the training, whose metrics, sample and recipe are shown; any other folder for a model without one.
        config: of the model.
        evaluation: of the model.
        path: of the report.
    """
    rows = _metrics(run)
    document = Document(f"{Path(evaluation.model).resolve().name}: perplexity by context length")
    with tempfile.TemporaryDirectory() as folder:
        pictures = evaluation.draw(Path(folder))
        document.add(Headline(evaluation.headline()), Text(_origin(evaluation)))
        document.add(Heading("What holds"), Points(evaluation.sentences()))
        document.add(Heading("By context length"), context_table(evaluation))
        document.add(
            Picture(pictures["perplexity"], "Perplexity of the same tokens by context length."),
            Picture(
                pictures["difference"],
                "Change of the loss against the shortest context, paired by window; bars: ±2 standard errors.",
            ),
        )
        document.add(
            Heading("By position"),
            Picture(pictures["position"], "Loss by position in the window; bars: ±2 standard errors."),
        )
        if evaluation.passkey:
            document.add(Heading("Pass keys by distance"), passkey_table(evaluation))
            document.add(Picture(pictures["passkey"], "Pass keys retrieved."))
            document.add(Picture(pictures["gain"], "What the key told is worth; bars: ±2 standard errors."))
        _add_training(document, rows, Path(folder))
        _add_limits(document, rows, config, evaluation)
        _add_cost(document, config, evaluation, Path(folder))
        if (run / "recipe.toml").is_file():
            document.add(Heading("Recipe"), Code((run / "recipe.toml").read_text(encoding="utf-8")))
        write_text(document.to_html(), path)


def context_table(evaluation: Evaluation) -> Table:
    """Return perplexity, loss and bits per byte by context."""
    rows = []
    for result in evaluation.contexts:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
        bits = f"{result.bits_per_byte:.4f}" if result.bytes else ""
        beyond = {None: "unknown", True: "yes", False: "no"}[evaluation.is_beyond(result.context)]
        name = f"{result.context:,}"
        rows.append([name, f"{result.perplexity:.3f}", f"{result.loss:.4f}{error}", bits, beyond])
    head = ["context", "perplexity", "loss, nats per token", "bits per byte", "beyond training length"]
    return Table(head, rows, f"{evaluation.contexts[0].tokens:,} validation tokens, the same for every context")


def passkey_table(evaluation: Evaluation) -> Table:
    """Return retrieval and gain by distance."""
    rows = []
    for result in evaluation.passkey:
        error = "" if result.gain_standard_error is None else f" ± {result.gain_standard_error:.3f}"
        gain = f"{result.gain:.3f}{error}".replace("-", "−")
        rows.append([f"{result.distance:,}", f"{result.exact:.0%}", f"{result.loss:.3f}", gain])
    head = ["distance", "retrieved", "loss of the key", "gained by the key told, nats per token"]
    return Table(head, rows, f"{evaluation.passkey[0].trials} prompts a distance")


def _origin(evaluation: Evaluation) -> str:
    about = evaluation.provenance
    length = "" if evaluation.training_length is None else f", trained on sequences of {evaluation.training_length:,}"
    where = ", ".join(f"{name} {about[name]}" for name in ("device", "torch", "commit", "date") if name in about)
    return f"Model {evaluation.model}, attention {evaluation.attention}{length}; data {evaluation.data}; {where}."


def _add_training(document: Document, rows: list[dict[str, Any]], folder: Path) -> None:
    losses = [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None]
    if losses:
        curves = [Curve("training", [tokens for tokens, _ in losses], [loss for _, loss in losses], kind="other")]
        reached = {row["step"]: row["tokens"] for row in rows if row["kind"] == "train"}
        scored = [
            (reached[row["step"]], row["contexts"][-1])
            for row in rows
            if row["kind"] == "evaluate" and row["step"] in reached
        ]
        if scored:
            places, values = [tokens for tokens, _ in scored], [float(part["loss"]) for _, part in scored]
            curves.append(Curve("validation", places, values, joined=False))
        draw_curves(
            curves, folder / "training.svg", x="tokens trained on", y="loss (nats per token)", scale="linear",
        )  # fmt: skip
        last = [row for row in rows if row["kind"] == "train"][-1]
        document.add(
            Heading("Training"),
            Picture(
                folder / "training.svg",
                "Loss of the training batches"
                + (f", and of validation at a context of {name_length(scored[-1][1]['context'])}." if scored else "."),
            ),
            Text(
                f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.0f} seconds in steps, peak "
                f"memory {last['memory'] / 1e6:,.0f} MB."
            ),
        )
    samples = [row for row in rows if row["kind"] == "sample"]
    if samples:
        document.add(Heading("A sample"), Text(f"After step {samples[-1]['step']:,}, the prompt being its beginning:"))
        document.add(Code(samples[-1]["prompt"] + samples[-1]["text"]))


def _add_limits(
    document: Document, rows: list[dict[str, Any]], config: PreTrainedConfig, evaluation: Evaluation
) -> None:
    trained = [row["tokens"] for row in rows if row["kind"] == "train"]
    if trained:
        longest = max(result.context for result in evaluation.contexts)
        limits = describe_run_limits(tokens=trained[-1], parameters=count_parameters(config).total, longest=longest)
        document.add(Heading("What this cannot show"), Points(limits))


def _add_cost(document: Document, config: PreTrainedConfig, evaluation: Evaluation, folder: Path) -> None:
    parameters = count_parameters(config)
    facts = [f"{parameters.total:,} parameters, {parameters.embedding:,} of them embeddings."]
    if isinstance(config, LongNetConfig):
        for result in evaluation.contexts:
            tokens = result.context
            forward = 2 * parameters.multiplied + attention_flops(config, tokens=tokens) // tokens
            training = step_flops(config, tokens=tokens, sequences=1) // tokens
            facts.append(
                f"At {name_length(tokens)}: {forward:.3e} FLOPs a token forward, {training:.3e} in training, of the "
                f"former {attention_flops(config, tokens=tokens) / tokens / forward:.1%} in attention."
            )
    document.add(Heading("Cost"), Points(facts))
    if evaluation.attention != "dilated":
        return
    pattern: DilationPattern = pattern_of(config)
    tokens = min(max(pattern.segment_lengths), _DRAWN_TOKENS)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    draw_pattern(pattern, folder / "pattern.png", tokens=tokens, num_heads=heads, shown=2, cells=128)
    document.add(Heading("Attention"), Picture(folder / "pattern.png", f"Which keys each query sees: {pattern}."))


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
