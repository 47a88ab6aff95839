"""Documents that are the same, or nearly: MinHash over shingles of bytes, compared through locality-sensitive hashing.

A shingle is 24 bytes in a row, runs of white space counted as one blank; two documents are near-duplicates when they
share at least 0.8 of their shingles (their Jaccard index), estimated from 120 minima (Broder 1997). Bytes instead of
words or tokens make it the same for every language and tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from longnet.data.writer import GrowingArray

THRESHOLD = 0.8
HASHES = 120
_BANDS = 24  # of 5 minima: a pair at 0.8 meets in one with probability 1 - (1 - 0.8⁵)²⁴ = 0.9999, at 0.4 with 0.22
_SHINGLE = 24
_SAMPLE = np.uint64(7)  # of the shingles the eighth whose hash ends in three 0 bits: the same ones in every document
_FEWEST = 32  # sampled shingles, below which only exact duplicates are found
_MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def digest(text: bytes) -> bytes:
    """Return 16 bytes that are equal for equal texts."""
    return hashlib.blake2b(text, digest_size=16).digest()


def signature(text: bytes) -> npt.NDArray[np.uint32]:
    """Return the minima of a text's shingles under each hash, (HASHES,); for too short a text all are 0."""
    letters = np.frombuffer(b" ".join(text.split()), dtype=np.uint8)
    sampled = [_shingles(letters[at : at + 2**18 + _SHINGLE - 1]) for at in range(0, len(letters), 2**18)]
    shingles = np.unique(np.concatenate([*sampled, np.empty(0, dtype=np.uint64)]))
    if len(shingles) < _FEWEST:
        return np.zeros(HASHES, dtype=np.uint32)
    multipliers, addends = _functions()
    minima = np.full(HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for at in range(0, len(shingles), 2**12):  # in parts that a cache holds
        hashes = (multipliers * shingles[at : at + 2**12] + addends) >> np.uint64(32)
        np.minimum(minima, hashes.min(axis=1).astype(np.uint32), out=minima)
    return minima


@functools.cache
def _functions() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return odd multipliers and addends of the hash functions, (HASHES, 1) each, the same ones for ever."""
    words = np.random.PCG64(0x5EED).random_raw(2 * HASHES).reshape(2, HASHES, 1)
    return words[0] | np.uint64(1), words[1]


def _shingles(letters: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the sampled hashes of all windows of _SHINGLE letters."""
    if len(letters) < _SHINGLE:
        return np.empty(0, dtype=np.uint64)
    words = np.lib.stride_tricks.sliding_window_view(letters, 8).copy().view("<u8")[:, 0]
    count = len(letters) - _SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for part, mix in enumerate(_MIX):
        hashes += words[8 * part : 8 * part + count] * np.uint64(mix)
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(_MIX[1])
    hashes ^= hashes >> np.uint64(32)
    return np.asarray(hashes[hashes & _SAMPLE == 0], dtype=np.uint64)


class Duplicates:
    """The documents seen so far; about 4 KB each, the one part of a preparation that grows with the corpus.

    They are kept in `folder` too; with the `count` that `sync` returned the next process goes on from there.
    """

    def __init__(self, folder: Path, count: int = 0) -> None:
        self._seen: set[bytes] = set()
        self._minima: list[npt.NDArray[np.uint32]] = []
        self._tables: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]
        self._files = (
            GrowingArray(folder / "digests.partial", np.dtype(np.uint8), 16 * count),
            GrowingArray(folder / "minima.partial", np.dtype(np.uint32), HASHES * count),
        )
        digests, minima = self._files[0].read().reshape(-1, 16), self._files[1].read().reshape(-1, HASHES)
        for known, row in zip(digests, minima, strict=True):
            self._remember(known.tobytes(), row)

    def add(self, known: bytes, minima: npt.NDArray[np.uint32]) -> bool:
        """Return whether a document, by digest and signature, repeats one that was added; add it where it does not."""
        if known in self._seen:
            return True
        if minima.any():
            others = {other for key, table in self._rows(minima) for other in table.get(key, ())}
            if any(np.mean(self._minima[other] == minima) >= THRESHOLD for other in others):
                return True
        self._remember(known, minima)
        self._files[0].append(np.frombuffer(known, dtype=np.uint8))
        self._files[1].append(minima)
        return False

    def sync(self) -> int:
        """Wait until the disk holds everything; return how many documents it is."""
        for file in self._files:
            file.sync()
        return len(self._seen)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _remember(self, known: bytes, minima: npt.NDArray[np.uint32]) -> None:
        self._seen.add(known)
        if minima.any():
            for key, table in self._rows(minima):
                table.setdefault(key, []).append(len(self._minima))
            self._minima.append(minima)

    def _rows(self, minima: npt.NDArray[np.uint32]) -> Iterator[tuple[bytes, dict[bytes, list[int]]]]:
        """Yield each band of a signature with the table that it is looked up in."""
        for band, table in zip(minima.reshape(_BANDS, -1), self._tables, strict=True):
            yield band.tobytes(), table
