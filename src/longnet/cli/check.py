"""Checks that several commands make of their arguments."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from cyclopts import App, ArgumentCollection

from longnet.cli.lists import is_list, leaves


def check_words(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse words that cyclopts takes for something else; it asks this once it has the command line.

    It rounds 3.5 to an integer, and takes `--optim 3` for the first key of the table. "" would be the current folder.

    Raises:
        ValueError: such a word.
    """
    for argument in arguments:
        kinds = leaves(argument.hint)
        for token in argument.tokens:
            name = token.keyword or argument.field_info.name.upper()
            if dataclasses.is_dataclass(argument.hint):
                raise ValueError(f"{name} is a table: give one of its keys, as in {name}.key value")
            if kinds == {Path} and not token.value.strip():
                raise ValueError(f"{name} is empty: an unset variable of the shell, perhaps")
            if kinds == {int} and not re.fullmatch(r"[+-]?\d+", token.value.strip(), re.ASCII):
                what = (
                    "a list of integers, like 512,2048,8K" if is_list(argument.hint) else "an integer, like 512 or 8K"
                )
                raise ValueError(f"{name} must be {what}, got {token.value}")
            if kinds == {int} and int(token.value) >= 2**63:
                raise ValueError(f"{name} must be 0 or more and below 2^63, got {token.value}")


def check_folder(path: Path) -> None:
    """Refuse, before any work, a folder to write that cannot be one.

    Raises:
        ValueError: it is something else, or lies where nothing can be written.
    """
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110  # pathlib raises for a link to itself
        raise ValueError(f"the folder {path} cannot be written: it is a link to nothing; give another name")
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"the folder {path} cannot be written: {there} is there, and no folder; give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {path} cannot be written: {there} is not yours to write in; give another one")


def check_file(path: Path) -> None:
    """Refuse, before any work, a file to write that cannot be one; as check_folder."""
    if path.is_dir():
        raise ValueError(f"the file {path} cannot be written: it is a folder; give the name of a file")
    check_folder(path.parent)


def refuse_unused(why: str, **options: object) -> None:
    """Raise ValueError for the first option, named as its keyword, that was given where it would change nothing."""
    for name, value in options.items():
        if not (value is None or value is False or value == ()):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for the first option, named as its keyword, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
