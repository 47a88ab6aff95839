"""The commands, and what the command line says of words that it cannot take.

A command lives in a module of its name, which is imported when the command, or its help, is asked for; what it needs of
torch and transformers it imports when it runs.
"""

from __future__ import annotations

import difflib
import dis
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

import cyclopts

from longnet import __version__
from longnet.cli.check import check_words
from longnet.cli.lists import spread_lists


class Command(NamedTuple):
    """A command: where it is, what it does, how it is typed."""

    place: str
    about: str
    example: str


COMMANDS = {
    "show": Command("show:show", "Print what a pattern costs, reaches and keeps; draw it.", "show paper -n 32768"),
    "prepare": Command(
        "prepare:prepare",
        "Turn text into token shards for training, with a validation split.",
        "prepare my-project -o runs/data",
    ),
    "train": Command(
        "train:app",
        "Train a model from a recipe; resume a run to the same bits.",
        "train demo --data.path runs/data -o runs/mine",
    ),
    "evaluate": Command(
        "evaluate:evaluate",
        "Perplexity by context length and position; pass keys by distance.",
        "evaluate runs/mine runs/data --contexts 64,256,1K",
    ),
    "generate": Command("generate:generate", "Continue a text.", "generate runs/mine --prompt 'def '"),
    "compare": Command(
        "compare:app",
        "Train one model with several attentions; report the paper's Table 2.",
        "compare table2-tiny -o runs/table2-tiny",
    ),
    "recall": Command(
        "recall:app",
        "What one model with several attentions recalls, by distance.",
        "recall recall-tiny -o runs/recall-tiny",
    ),
    "info": Command("info:info", "What a recipe, a model or a data folder is, and needs.", "info paper-125m"),
    "stream": Command(
        "stream:stream", "Read files as one sequence of any length, in constant memory.", "stream runs/mine book.txt"
    ),
    "encode": Command(
        "encode:encode",
        "Slides' feature files → embeddings, with GigaPath's slide encoder.",
        "encode slide_encoder.pth slides/*.h5 -o embeddings",
    ),
    "convert": Command(
        "convert:convert",
        "torchscale's checkpoints → folders for from_pretrained, and back.",
        "convert slide_encoder.pth gigapath",
    ),
    "bench": Command(
        "bench:app", "Measure, each figure behind a check that the result is right.", "bench attention --quick"
    ),
}


def make_app() -> cyclopts.App:
    """Return the command line."""
    app = cyclopts.App(
        name="longnet",
        help="LongNet: dilated attention for very long sequences (arXiv:2307.02486).",
        version=__version__,
        config=check_words,
        suppress_keyboard_interrupt=False,  # main says it
        help_epilogue="`longnet --install-completion` teaches the shell to complete these.",
    )
    for name, command in COMMANDS.items():
        app.command(f"longnet.cli.{command.place}", name=name, help=command.about)
    app.register_install_completion_command(add_to_startup=False)
    return app


def run(words: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        ValueError: words that no command takes, and all that a command itself finds wrong.
    """
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise ValueError(_no_command(words[0], COMMANDS))
    app = make_app()
    try:
        words = spread_lists(app, words) if words and words[0] in COMMANDS else words
        app(words, exit_on_error=False, print_error=False)
    except cyclopts.MissingArgumentError as error:
        chain = tuple(error.command_chain or ())
        example = COMMANDS[chain[0]].example if chain else "COMMAND"
        if len(chain) > 1:
            example = " ".join(chain)
        missing = "an argument" if error.argument is None else _name(error.argument)
        raise ValueError(f"{' '.join(chain)} needs {missing}; for example: longnet {example}") from error
    except cyclopts.UnknownCommandError as error:
        group = error.command_chain or ()
        unknown = (error.unused_tokens or [""])[0]
        names = [name for name in (app[group[0]] if group else app) if not name.startswith("-")]
        raise ValueError(_no_command(" ".join([*group, unknown]), names)) from error
    except cyclopts.UnusedCliTokensError as error:
        rest = " ".join(error.unused_tokens or ())
        typed = " ".join(error.command_chain or ())
        raise ValueError(f"{typed} has no place for {rest!r}: longnet {typed} --help shows what it takes") from error
    except cyclopts.CycloptsError as error:
        raise ValueError(str(error)) from error


def _no_command(words: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(words.rpartition(" ")[2], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"there is no command {words!r}: {hint}"


def is_users_mistake(error: BaseException) -> bool:
    """Tell whether an error was raised on purpose, by a `raise` of ours, or comes from the operating system.

    A ValueError that Python or a library raises in the middle of our code is a fault, which nobody else can mend.
    """
    if isinstance(error, OSError):
        return True
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__", "")).startswith("longnet."):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether Python, the CPU's allocator of torch, or a GPU has found too little memory."""
    said = ("can't allocate memory", "out of memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _name(argument: cyclopts.Argument) -> str:
    names = [name for name in argument.names if name.startswith("--")]
    is_positional = argument.field_info.kind in (
        argument.field_info.POSITIONAL_ONLY,
        argument.field_info.POSITIONAL_OR_KEYWORD,
        argument.field_info.VAR_POSITIONAL,
    )
    return argument.field_info.name.upper() if is_positional or not names else names[0]
