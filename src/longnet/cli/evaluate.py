"""`longnet evaluate`: how a model fares by context length, by position, and by distance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from longnet.cli.check import at_least_one, check_file, check_folder, refuse_unused
from longnet.cli.lists import LIST

if TYPE_CHECKING:
    from rich.console import Console

    from longnet.evaluation.record import Evaluation


def evaluate(
    model: Path,
    data: Path,
    *,
    contexts: Annotated[tuple[int, ...], LIST] = (),
    tokens: int = 2**18,
    passkey: bool = False,
    distances: Annotated[tuple[int, ...], LIST] = (),
    trials: int | None = None,
    attention: str | None = None,
    batch_tokens: int = 2**15,
    device: str = "auto",
    output: Annotated[Path | None, cyclopts.Parameter(("--output", "-o"))] = None,
    report: Path | None = None,
) -> None:
    """Score the same validation tokens with windows of each context length, and say whether context helps.

    Args:
        model: Folder of a run of `longnet train`, or of any Hugging Face causal language model.
        data: Folder that `longnet prepare` wrote.
        contexts: Context lengths, like 512,2048,8K or 512 2048 8K, each a divisor of the longest; they may
            exceed the length of training. When left out: an eighth of the training length, a half, the whole.
        tokens: Validation tokens that every context scores, at most.
        passkey: Ask, too, for a number told so many tokens before.
        distances: Those distances; doublings from 64 up to the longest context when left out.
        trials: Prompts of each distance; 20 if not given.
        attention: Evaluate with another attention than the model's: "dilated", "sdpa", "sparse_fixed", ….
        batch_tokens: Tokens in a batch, at most, unless one window has more.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        output: Folder for evaluation.json and its pictures: perplexity, difference, position, passkey and gain,
            each an .svg.
        report: HTML file about the model and the evaluation, everything inside it.
    """
    from rich.console import Console

    from longnet.cli.model import load_model
    from longnet.data.shards import TokenData
    from longnet.data.tokenizer import open_tokenizer, refuse_other_vocabulary
    from longnet.evaluation.passkey import doubling_distances, iterate_passkey, make_prompts
    from longnet.evaluation.perplexity import iterate_contexts, unit_starts
    from longnet.evaluation.record import Evaluation
    from longnet.evaluation.scoring import refuse_more_positions
    from longnet.measurement import provenance, take_device
    from longnet.model.patterns import kind_of

    if output is not None:
        check_folder(output)
    if report is not None:
        check_file(report)
    if not passkey:
        refuse_unused("goes with --passkey: give both", distances=distances, trials=trials)
    trials = 20 if trials is None else trials
    at_least_one(tokens=tokens, trials=trials, batch_tokens=batch_tokens)
    for length in contexts:
        at_least_one(contexts=length)
    for length in distances:
        at_least_one(distances=length)
    place = take_device(device, option="--device")
    loaded = load_model(model, place, attention)
    token_data = TokenData.open(data)
    refuse_other_vocabulary(loaded.folder, int(loaded.model.config.vocab_size), data, token_data.vocab_size)
    asked = contexts or _contexts(loaded.training_length)
    # What cannot be is refused before anything is computed.
    unit_starts(token_data.validation, asked, tokens)
    tokenizer = open_tokenizer(token_data.tokenizer_folder)
    far: tuple[int, ...] = ()
    if passkey:
        far = distances or doubling_distances(max(asked))
    for distance in far:
        (prompt,) = make_prompts(tokenizer, token_data.validation, distance, trials=1)
        refuse_more_positions(loaded.model, len(prompt.told) + len(prompt.key))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with console.status("scoring …"):
        results = list(
            iterate_contexts(
                loaded.model, token_data.validation, asked,
                token_bytes=token_data.token_bytes, tokens=tokens, batch_tokens=batch_tokens, device=place,
            )
        )  # fmt: skip
        keys = list(
            iterate_passkey(
                loaded.model, tokenizer, token_data.validation, far,
                trials=trials, batch_tokens=batch_tokens, device=place,
            )
        )  # fmt: skip
    if not all(math.isfinite(result.loss) for result in results):
        raise ValueError(f"the loss of {model} on these tokens is not finite: its weights or its attention overflow")
    evaluation = Evaluation(
        str(model), str(data), kind_of(loaded.model.config), loaded.training_length, results, keys,
        {**provenance(place), "data_fingerprint": token_data.fingerprint},
    )  # fmt: skip
    _show(evaluation, console)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(evaluation.as_json())
        pictures = evaluation.draw(output)
        console.print(f"{output / 'evaluation.json'}; {', '.join(str(path) for path in pictures.values())}")
    if report is not None:
        from longnet.comparison.run_report import write_run_report

        write_run_report(loaded.run, loaded.model.config, evaluation, report)
        console.print(f"report: {report.resolve()}")


def _contexts(training_length: int | None) -> tuple[int, ...]:
    if training_length is None:
        raise ValueError("the model does not say at what length it was trained: give --contexts, like 512,2048,8K")
    return tuple(sorted({max(1, training_length // part) for part in (8, 2, 1) if training_length % part == 0}))


def _show(evaluation: Evaluation, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from longnet.comparison.run_report import context_table, passkey_table

    for part in [context_table(evaluation), *([passkey_table(evaluation)] if evaluation.passkey else [])]:
        table = Table(title=part.caption, box=box.SIMPLE_HEAD, title_justify="left")
        for name in part.head:
            table.add_column(name, justify="right")
        for row in part.rows:
            table.add_row(*row)
        console.print(table)
    for sentence in (evaluation.headline(), *evaluation.sentences()):
        console.print(sentence)
