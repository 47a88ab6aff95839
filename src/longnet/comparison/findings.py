"""What a comparison shows, in sentences made from its figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from longnet.comparison.cell import CellResult
from longnet.comparison.systems import kind_of, order_of, title_of
from longnet.evaluation.perplexity import Difference, paired_difference
from longnet.evaluation.record import judge, successive, with_error
from longnet.plots.names import name_length

_PAPER_TOKENS = 300_000 * 500_000  # arXiv:2307.02486 §4.1: 300K steps of 0.5M tokens


def describe_headline(cells: Sequence[tuple[str, int, Mapping[int, float]]]) -> str:
    """Say which cell has the lowest perplexity at each context, and how near LongNet comes where it is another's.

    Args:
        cells: system, training length, and perplexity by context, of each cell.
    """
    said = []
    for context in sorted({context for _, _, scores in cells for context in scores}):
        ranked = sorted(cells, key=lambda cell: cell[2][context])
        best = ranked[0]
        own = next((cell for cell in ranked if kind_of(cell[0]) == "dilated"), best)
        places = _places(best[2][context], own[2][context])
        words = f"{name_length(context)}: {_trained(best, context, places)}"
        if kind_of(best[0]) != "dilated" and own is not best:
            words += f" (best LongNet: {_trained(own, context, places)})"
        said.append(words)
    return f"Lowest perplexity at each context: {'; '.join(said)}."


def _trained(cell: tuple[str, int, Mapping[int, float]], context: int, places: int) -> str:
    system, length, scores = cell
    return f"{scores[context]:.{places}f}, {title_of(system)} trained at {name_length(length)}"


def _places(best: float, own: float) -> int:
    """Return how many decimals tell two perplexities apart, one at least, or three below 10: of four letters, say."""
    first = 1 if best >= 10 else 3
    return next((places for places in range(first, 5) if f"{best:.{places}f}" != f"{own:.{places}f}"), first)


def describe_contexts(results: Sequence[CellResult]) -> list[str]:
    """Say of each cell whether its perplexity falls with the context, within its training length and beyond."""
    said = []
    for result in results:
        parts = []
        for short, long, step in successive(result.contexts):
            beyond = ", beyond its training length" if long.context > result.length else ""
            lengths = f"{name_length(short.context)} → {name_length(long.context)}{beyond}"
            parts.append(f"{lengths}: {judge(step)} ({with_error(step)})")
        if parts:
            said.append(f"{result.cell.title}: loss from context {'; '.join(parts)}.")
    return said


def describe_use_of_context(results: Sequence[CellResult]) -> list[str]:
    """Say for which systems more context, as far as it was trained, lowers the loss."""
    said = []
    for attention in _systems(results):
        title = title_of(attention)
        steps = [
            (result, judge(step))
            for result in results
            if result.attention == attention
            for _, long, step in successive(result.contexts)
            if long.context <= result.length
        ]
        if not steps:
            continue
        falls = sum(verdict == "falls" for _, verdict in steps)
        rises = sum(verdict == "rises" for _, verdict in steps)
        said.append(
            f"{title}: within the training length, {falls} of {len(steps)} steps to a longer context lower the loss by "
            f"more than two standard errors, {rises} raise it."
        )
    return said


def describe_systems(results: Sequence[CellResult]) -> list[str]:
    """Compare LongNet with the others at each length that both were trained at, on the same windows."""
    said = []
    for result in results:
        if kind_of(result.attention) != "dilated":
            continue
        for other in results:
            if kind_of(other.attention) == "dilated" or other.length != result.length:
                continue
            context = _own_context(result)
            step = paired_difference(result.at(context), other.at(context))
            flops = result.flops["counted"] / other.flops["counted"]
            said.append(
                f"Trained at {name_length(result.length)} and scored at {name_length(context)}, "
                f"{title_of(result.attention)}'s loss against the {title_of(other.attention)}'s: {with_error(step)} "
                f"nats per token, {_in_words(step)}, at {flops:.3f} × its FLOPs."
            )
    return said


def describe_lengths(results: Sequence[CellResult], contexts: Sequence[int]) -> list[str]:
    """Say whether training at a longer length pays at the longest context, system by system."""
    said, longest = [], contexts[-1]
    for attention in _systems(results):
        title = title_of(attention)
        own = sorted((result for result in results if result.attention == attention), key=lambda result: result.length)
        for short, long in itertools.pairwise(own):
            step = paired_difference(long.at(longest), short.at(longest))
            said.append(
                f"{title} scored at {name_length(longest)}: training at {name_length(long.length)} instead of "
                f"{name_length(short.length)} changes the loss by {with_error(step)}, {_in_words(step)}."
            )
    return said


def describe_limits(results: Sequence[CellResult], init_from: str | None = None) -> list[str]:
    """Say what so short a training on so little data, from the weights in `init_from` perhaps, cannot show."""
    first = results[0]
    units = len(first.contexts[0].by_unit)
    tokens, parameters = first.tokens, first.parameters["total"]
    said = [
        f"Each cell has seen {tokens:,} tokens, {tokens / parameters:.1f} a parameter"
        + (f", beside those that the weights of {init_from} had seen" if init_from is not None else "")
        + "; the paper's models saw "
        f"{_PAPER_TOKENS / tokens:,.0f} times as many. Which system is better after long training does not follow.",
        f"One seed ({first.seed}): the standard errors are over {units} windows of validation text and say nothing of "
        "how much another seed would change.",
        f"The validation windows hold {first.contexts[0].tokens:,} tokens of the same sources as the training text; "
        "neighbouring windows may come from one document.",
    ]
    longest = max(result.length for result in results)
    if longest < 32_768:
        said.append(
            f"No cell was trained beyond {name_length(longest)} tokens, where the paper's longest was 32K; the cost of "
            "dense attention grows with the length, and so does what LongNet saves."
        )
    still = [result.cell.title for result in results if _is_falling(result)]
    if still:
        said.append(f"The training loss was still falling at the end in {', '.join(still)}.")
    return said


def describe_run_limits(*, tokens: int, parameters: int, longest: int) -> list[str]:
    """Say what one run cannot show: so many training tokens, parameters, and tokens of the longest context."""
    return [
        f"The model has seen {tokens:,} tokens, {tokens / parameters:.1f} a parameter; the paper's models saw "
        f"{_PAPER_TOKENS / tokens:,.0f} times as many. What a long context is worth after long training does not "
        "follow.",
        f"Nothing follows for contexts beyond {name_length(longest)}, the longest that was scored.",
        "One run, one seed: the standard errors are over windows of validation text and say nothing of how much "
        "another seed would change.",
    ]


def _systems(results: Sequence[CellResult]) -> list[str]:
    """Return the systems there are, in the order of SYSTEMS."""
    return sorted({result.attention for result in results}, key=order_of)


def _own_context(result: CellResult) -> int:
    within = [part.context for part in result.contexts if part.context <= result.length]
    return within[-1] if within else result.contexts[0].context


def _in_words(step: Difference) -> str:
    verdict = judge(step)
    if verdict == "does not clearly change":
        return "no clear difference"
    return "lower" if verdict == "falls" else "higher"


def _is_falling(result: CellResult) -> bool:
    """Tell whether the last tenth of the losses is below the tenth before by more than 1 %."""
    losses = [loss for _, loss in result.losses]
    part = max(1, len(losses) // 10)
    if len(losses) < 2 * part:
        return False
    last, before = sum(losses[-part:]) / part, sum(losses[-2 * part : -part]) / part
    return last < 0.99 * before
