"""Checks that several commands make of their arguments."""

from __future__ import annotations


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for the first option, named as its keyword, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
