"""What counts and repeats tell of a text, for models to be measured against: `python benchmarks/markov.py DATA`.

The first tokens of the validation split are scored behind the training split's, in nats a token: by a Markov chain of
each order, of the training split's counts with one added; and by a copier, which, where the last tokens have stood
before, expects what followed there the last time, as often as that held in the training split for repeats as far away.
What it gains on the chain of order 5 is what one who copies so, and finds every repeat, has of such a distance.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longnet.data.shards import TokenData

Tokens = NDArray[np.int64]
Losses = NDArray[np.float64]
ORDERS = (1, 2, 3, 5, 7)
FALLBACK = 5


def contexts(tokens: Tokens, order: int, symbols: int) -> Tokens:
    """Return the number of the `order` tokens before each from the one at `order` on."""
    places = symbols ** np.arange(order - 1, -1, -1, dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, order)[:-1] @ places


def losses(tokens: Tokens, known: int, order: int, symbols: int) -> Losses:
    """Return the nats of each token after the first `known`, of whose counts the chain is made."""
    train = tokens[:known]
    counts = np.bincount(contexts(train, order, symbols) * symbols + train[order:], minlength=symbols ** (order + 1))
    table = counts.reshape(-1, symbols) + 1
    before = contexts(tokens[known - order :], order, symbols)
    found: Losses = -np.log(table[before, tokens[known:]] / table.sum(1)[before])
    return found


def copies(
    tokens: Tokens, known: int, length: int, symbols: int, edges: list[int], chain: Losses
) -> Iterator[dict[str, Any]]:
    """Yield what repeats of `length` tokens tell, by their distance from one edge to the next.

    Args:
        tokens: (n,) numbers below `symbols`.
        known: so many come before those that are scored.
        length: tokens of a repeat.
        symbols: different ones.
        edges: of distances: further than one, up to the next.
        chain: (n − known,) nats of each token that is scored, where nothing is copied.
    """
    last = contexts(tokens, length, symbols)
    order = np.argsort(last, kind="stable")
    is_repeat = last[order[1:]] == last[order[:-1]]
    distance = np.zeros(len(last), dtype=np.int64)
    distance[order[1:][is_repeat]] = (order[1:] - order[:-1])[is_repeat]
    at = np.arange(length, len(tokens))
    is_right = (distance > 0) & (tokens[at] == tokens[at - distance])
    for low, high in pairwise(edges):
        is_there = (distance > low) & (distance <= high)
        before = is_right[is_there & (at < known)]
        chance = (before.sum() + 1) / (len(before) + symbols)
        there, right = is_there[at >= known], is_right[at >= known]
        copied = -np.log(np.where(right, chance, (1 - chance) / (symbols - 1)))
        gain = np.where(there, chain - copied, 0)
        yield {"copies": length, "further_than": low, "up_to": high, "share": float(there.mean()),
               "right": float(right[there].mean()) if there.any() else None, "gain": float(gain.mean())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that longnet prepare wrote, of few different tokens")
    parser.add_argument("--orders", type=int, nargs="+", default=ORDERS, help="tokens before (%(default)s)")
    parser.add_argument("--copies", type=int, nargs="*", default=(16, 20, 24), help="tokens of a repeat (%(default)s)")
    parser.add_argument(
        "--edges", type=int, nargs="+", default=(0, 1024, 65536, 2**40), help="of distances (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=458_752, help="of the validation split (%(default)s)")
    asked = parser.parse_args()
    data = TokenData.open(asked.data)
    train = data.train.read(0, data.train.tokens)
    scored = data.validation.read(0, min(data.validation.tokens, asked.tokens))
    found, numbers = np.unique(np.concatenate([train, scored]), return_inverse=True)
    tokens, symbols, known = numbers.astype(np.int64), len(found), len(train)
    too_long = [
        length for length in (*(order + 1 for order in asked.orders), *asked.copies) if symbols**length >= 2**63
    ]
    if too_long:
        parser.error(f"{too_long[0]} of {symbols} different tokens are more than 2^63: take fewer")
    head = {"data": data.fingerprint[:12], "tokens": len(scored), "symbols": symbols}
    for order in asked.orders:
        print(json.dumps({**head, "order": order, "loss": float(losses(tokens, known, order, symbols).mean())}))
    chain = losses(tokens, known, FALLBACK, symbols) if asked.copies else np.zeros(len(scored))
    for length in asked.copies:
        for row in copies(tokens, known, length, symbols, list(asked.edges), chain):
            print(json.dumps({**head, **row}))


if __name__ == "__main__":
    main()
