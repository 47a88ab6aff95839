"""Lengths and counts in few letters."""


def name_length(tokens: int) -> str:
    """Return 512, 2K, 32K, 1M for lengths in tokens; what is no whole number of K in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def name_count(number: float) -> str:
    """Return a count in short, in powers of ten: 1.5M, 200k, 12."""
    if abs(number) >= 1e12:
        return f"{number:.2g}".replace("e+", "e")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
