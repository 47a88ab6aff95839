"""What a table of counts knows of a text, for models to be measured against: `python benchmarks/markov.py DATA`.

A Markov chain of each order, of the training split's counts with one added, scores the first tokens of the validation
split. A row an order, in nats a token.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longnet.data.shards import TokenData

Tokens = NDArray[np.int64]


def contexts(tokens: Tokens, order: int, symbols: int) -> Tokens:
    """Return the number of the `order` tokens before each from the one at `order` on."""
    places = symbols ** np.arange(order - 1, -1, -1, dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, order)[:-1] @ places


def loss(train: Tokens, scored: Tokens, order: int, symbols: int) -> float:
    """Return the mean nats of the tokens that have `order` before them."""
    counts = np.bincount(contexts(train, order, symbols) * symbols + train[order:], minlength=symbols ** (order + 1))
    table = counts.reshape(-1, symbols) + 1
    before = contexts(scored, order, symbols)
    return float(-np.log(table[before, scored[order:]] / table.sum(1)[before]).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that longnet prepare wrote, of few different tokens")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 5, 7], help="tokens before (%(default)s)")
    parser.add_argument("--tokens", type=int, default=458_752, help="of the validation split (%(default)s)")
    asked = parser.parse_args()
    data = TokenData.open(asked.data)
    train, scored = (
        np.asarray(split.read(0, min(split.tokens, most)), dtype=np.int64)
        for split, most in ((data.train, data.train.tokens), (data.validation, asked.tokens + 1))
    )
    found, numbers = np.unique(np.concatenate([train, scored]), return_inverse=True)
    train, scored = np.split(numbers.astype(np.int64), [len(train)])
    for order in asked.orders:
        row = {"data": data.fingerprint[:12], "order": order, "tokens": len(scored) - order, "symbols": len(found)}
        print(json.dumps({**row, "loss": loss(train, scored, order, len(found))}))
