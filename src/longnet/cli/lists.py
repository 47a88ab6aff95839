"""One way of writing lists on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import cyclopts

LIST = cyclopts.Parameter(consume_multiple=True, negative=())  # an option that takes several values
_PART = re.compile(r"\d+:\d+(?:,\d+:\d+)*[^,]*|[^,]+")  # the commas of a pattern, 64:1,512:8, are its own


def spread_lists(app: cyclopts.App, words: Sequence[str]) -> list[str]:
    """Return a command line in which options that take several values have them as words of their own.

    `--contexts 64,256` and `--contexts 64 256` are the same everywhere, and 8K is 8192 wherever an option asks for
    integers, one or several; 1M is 1,048,576.
    """
    chain, apps, rest = app.parse_commands(words)
    if apps[-1].default_command is None or any(word.startswith("-") for word in chain):  # --help
        return list(words)
    arguments = [
        (name, argument)
        for argument in apps[-1].assemble_argument_collection(parse_docstring=False)
        for name in argument.names
        if name.startswith("-")
    ]
    lists = {name for name, argument in arguments if is_list(argument.hint)}
    integers = {name for name, argument in arguments if leaves(argument.hint) == {int}}
    current: str | None = None
    spread = list(words[: len(words) - len(rest)])
    for word in rest:
        name, equals, value = word.partition("=")
        if re.match(r"-(?![\d.])", word):
            current = name if name in lists | integers else None
            spread += [name] if equals and current else [word]
            values = [value] if equals and current else []
        else:
            values = [word]
        for text in values:
            parts = _PART.findall(text) if current in lists and text.strip() else [text]
            spread += [_plain(part) if current in integers else part for part in parts]
            current = current if current in lists else None
    return spread


def _plain(number: str) -> str:
    size = {"k": 2**10, "m": 2**20}.get(number[-1:].lower(), 1)
    return str(int(number[:-1]) * size) if re.fullmatch(r"\d+[kKmM]", number, re.ASCII) else number


def is_list(hint: Any) -> bool:
    """Tell whether an option takes several values."""
    return get_origin(hint) in (tuple, list) or any(get_origin(part) in (tuple, list) for part in get_args(hint))


def leaves(hint: Any) -> set[Any]:
    """Return the types of the values that a hint is made of, None left out."""
    parts = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    return {hint} if not parts or get_origin(hint) is Literal else set().union(*(leaves(part) for part in parts))
