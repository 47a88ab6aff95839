"""A corpus from any place on, in batches of pieces of text, and their tokens: those that `longnet prepare` writes."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from longnet.data.content import InputError
from longnet.data.corpus import Corpus, describe
from longnet.data.documents import Piece, Reading, Skipped, read_pieces
from longnet.data.encoding import Encoder

BATCH_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pieces of text, what was skipped between them, and where in the corpus the next batch begins.

    Attributes
    ----------
    cursor
        A file, by its number, and how many items of it are read.
    position
        Bytes of the files up to there.
    """

    pieces: list[Piece]
    skipped: collections.Counter[str]
    cursor: list[int]
    position: int


def iterate_batches(corpus: Corpus, reading: Reading, cursor: Sequence[int] = (0, 0)) -> Iterator[Batch]:
    """Yield the corpus from a cursor on, in batches of about a megabyte; the last one may be empty."""
    first, done = cursor
    before = sum(file.size for file in corpus.files[:first])
    pieces: list[Piece] = []
    skipped: collections.Counter[str] = collections.Counter()
    size = 0
    for number, file in enumerate(corpus.files[first:], first):
        skip = done if number == first else 0
        for item, found in enumerate(read_pieces(file, reading, skip=skip), skip + 1):
            if isinstance(found, Skipped):
                skipped[found.reason] += 1
                continue
            pieces.append(found)
            size += len(found.text)
            if size >= BATCH_BYTES:
                yield Batch(pieces, skipped, [number, item], before + found.position)
                pieces, skipped, size = [], collections.Counter(), 0
        before += file.size
    yield Batch(pieces, skipped, [len(corpus.files), 0], before)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where reading goes on: a batch, by the file and the item with which it begins, and tokens of it that are read."""

    file: int = 0
    item: int = 0
    skip: int = 0


class TokenStream:
    """The tokens of a corpus, one after the other, as `longnet prepare` with the same options puts them into shards.

    Attributes
    ----------
    corpus, reading, encoder
        What decides the tokens.
    fingerprint
        A digest of these: equal where the tokens are.
    position
        Bytes of the files up to the end of the batch that was read last.
    skipped
        What has been left out so far, with the reasons.
    """

    def __init__(self, corpus: Corpus, reading: Reading, encoder: Encoder) -> None:
        self.corpus, self.reading, self.encoder = corpus, reading, encoder
        way = f"{corpus.digest()} {reading} {encoder.end} {encoder.tokenizer}"
        self.fingerprint = hashlib.blake2b(way.encode(), digest_size=16).hexdigest()
        self.position, self.skipped = 0, corpus.skipped.copy()
        self._began_at_start = True
        self._batches: Iterator[Batch] = iter(())
        self._held: tuple[Cursor, npt.NDArray[Any], Cursor] | None = None

    def read(self, cursor: Cursor, tokens: int) -> tuple[npt.NDArray[np.int64], Cursor]:
        """Return the next tokens, fewer only at the end, and where to go on.

        Raises InputError where there is not one token in all, and for text that the tokenizer would leave out.
        """
        parts: list[npt.NDArray[Any]] = []
        wanted = tokens
        while wanted and cursor.file < len(self.corpus.files):
            ids, following = self._batch(Cursor(cursor.file, cursor.item))
            taken = ids[cursor.skip : cursor.skip + wanted]
            parts.append(taken)
            wanted -= len(taken)
            skip = cursor.skip + len(taken)
            cursor = following if skip == len(ids) else dataclasses.replace(cursor, skip=skip)
            if skip == len(ids) == 0 and following.file == len(self.corpus.files) and self._began_at_start:
                names = ", ".join(str(file.path) for file in self.corpus.files[:3])
                raise InputError(f"no text in {names}{describe(self.skipped)}: give other files")
        return np.concatenate([np.empty(0, np.int64), *parts]), cursor

    def _batch(self, start: Cursor) -> tuple[npt.NDArray[Any], Cursor]:
        """Return the tokens of the batch that begins there, and where the next one begins."""
        if self._held is None or self._held[0] != start:
            if self._held is None or self._held[2] != start:
                self._batches = iterate_batches(self.corpus, self.reading, (start.file, start.item))
            self._began_at_start = start == Cursor()
            batch = next(self._batches)
            self.position = batch.position
            self.skipped += batch.skipped
            encoded = self.encoder.encode(batch.pieces)
            if encoded.lost is not None:
                raise InputError(encoded.lost)
            self._held = start, encoded.tokens, Cursor(*batch.cursor)
        return self._held[1], self._held[2]
