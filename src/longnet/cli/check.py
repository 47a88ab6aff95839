"""Checks that several commands make of their arguments."""

from __future__ import annotations


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for the first option, named as its keyword, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def lengths(name: str, text: str) -> tuple[int, ...]:
    """Read lengths in tokens with commas between, K for 1024: "512,2K,8K".

    Raises:
        ValueError: text of another form, or a length below 1.
    """
    try:
        values = tuple(
            int(part[:-1]) * 1024 if part[-1:] in ("k", "K") else int(part) for part in text.replace(" ", "").split(",")
        )
    except ValueError:
        raise ValueError(
            f"{name} must be lengths in tokens with commas between, like 512,2048,8K, got {text!r}"
        ) from None
    if min(values) < 1:
        raise ValueError(f"{name} must be lengths of at least 1 token, got {text!r}")
    return values
