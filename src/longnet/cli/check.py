"""Checks that several commands make of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts


def _path(_: Any, tokens: Sequence[cyclopts.Token]) -> Path:
    if not tokens[0].value.strip():
        raise ValueError(f"{tokens[0].keyword or 'a path'} is empty: an unset variable of the shell, perhaps")
    return Path(tokens[0].value)


GivenPath = Annotated[Path, cyclopts.Parameter(converter=_path)]  # "" would be the current folder


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for the first option, named as its keyword, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
