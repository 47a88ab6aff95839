"""Texts to tokens, in this process or in several, in the order in which they came."""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from longnet.data import duplicates
from longnet.data.documents import Piece
from longnet.data.shards import token_dtype
from longnet.data.tokenizer import gives_bytes, vocab_size
from longnet.data.unknown import complaint, find_lost, unknown_id, watched

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of some pieces of text, one after the other.

    Attributes
    ----------
    tokens
        The ids.
    counts
        How many of them each piece has, its end token included.
    replaced
        Pieces that were not UTF-8 where the tokenizer needs it: the bytes in question became U+FFFD.
    compared
        For each whole document its digest and MinHash signature, where they were asked for; None for parts of one.
    unknown
        Tokens that stand for text that the tokenizer has none for.
    lost
        A complaint about text that it leaves out; the tokens are then not those of the pieces.
    """

    tokens: npt.NDArray[Any]
    counts: list[int]
    replaced: int
    compared: list[tuple[bytes, npt.NDArray[np.uint32]] | None]
    unknown: int = 0
    lost: str | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns pieces of text into tokens.

    Attributes
    ----------
    tokenizer
        What the `tokenizers` library saves, or None for bytes: those are their ids, and need not be UTF-8.
    end
        The id that ends every document, None for none. The text cannot hold it: what looks like a special token is
        encoded as text.
    dtype
        Of the ids.
    compare
        Whether digests and signatures of the documents are wanted.
    """

    tokenizer: str | None
    end: int | None
    dtype: str
    compare: bool

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Encode some pieces."""
        if self.tokenizer is None:
            rows = [np.frombuffer(piece.text, dtype=np.uint8) for piece in pieces]
            replaced, unknown, lost = 0, 0, None
        else:
            rows, replaced, unknown, lost = self._ids(pieces)
        end = np.array([] if self.end is None else [self.end], dtype=self.dtype)
        parts = [
            part for row, piece in zip(rows, pieces, strict=True) for part in (row, *([end] if piece.ends else []))
        ]
        return Encoded(
            np.concatenate([np.empty(0, dtype=self.dtype), *parts], dtype=self.dtype),
            [len(row) + piece.ends * len(end) for row, piece in zip(rows, pieces, strict=True)],
            replaced,
            [
                (duplicates.digest(piece.text), duplicates.signature(piece.text))
                if self.compare and piece.starts and piece.ends
                else None
                for piece in pieces
            ],
            unknown,
            lost,
        )

    def _ids(self, pieces: Sequence[Piece]) -> tuple[list[npt.NDArray[Any]], int, int, str | None]:
        strings, replaced = [], 0
        for piece in pieces:
            try:
                strings.append(piece.text.decode())
            except UnicodeDecodeError:
                strings.append(piece.text.decode(errors="replace"))
                replaced += 1
        loaded = _loaded(self.tokenizer or "")
        encodings = loaded.tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        if loaded.ids is not None:
            rows = [loaded.ids[row] for row in rows]
            for row, string, piece in zip(rows, strings, pieces, strict=True):
                lost = find_lost(loaded.tokenizer, loaded.ids, string) if (row < 0).any() else None
                if lost is not None:
                    part = "" if piece.starts else f" (in the {len(piece.text):,} bytes up to {piece.position:,})"
                    return [row[:0].astype(self.dtype) for row in rows], 0, 0, complaint(lost, piece.source + part)
        unknown = 0 if loaded.unknown is None else sum(int((row == loaded.unknown).sum()) for row in rows)
        return [row.astype(self.dtype) for row in rows], replaced, unknown, None


def make_encoder(tokenizer: PreTrainedTokenizerFast, *, end: bool = True, compare: bool = False) -> Encoder:
    """Return what encodes documents with a tokenizer; without `end` no token follows them."""
    plain = gives_bytes(tokenizer)
    return Encoder(
        None if plain else tokenizer.backend_tokenizer.to_str(),
        tokenizer.eos_token_id if end else None,
        token_dtype(vocab_size(tokenizer)).name,
        compare,
    )


class _Loaded(NamedTuple):
    """What encodes, and the tokenizer's ids (`watched`); that of its unknown token."""

    tokenizer: Tokenizer
    ids: npt.NDArray[np.int64] | None
    unknown: int | None


@functools.lru_cache(maxsize=1)
def _loaded(saved: str) -> _Loaded:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(saved)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Loaded(*watched(tokenizer), unknown_id(tokenizer))


class _Batch(Protocol):
    @property
    def pieces(self) -> Sequence[Piece]: ...


B = TypeVar("B", bound=_Batch)


def encode_in_order(batches: Iterable[B], encoder: Encoder, workers: int) -> Generator[tuple[B, Encoded]]:
    """Yield each batch with its tokens, in order, a few batches ahead in `workers` processes.

    Raises OSError where a process dies.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encoder.encode(batch.pieces)
        return
    # Fresh processes: a fork of one with threads (the progress bar, the tokenizer's own) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(encoder,))
    waiting: collections.deque[tuple[B, Future[Encoded]]] = collections.deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.pieces)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process died, perhaps for want of memory: the same command with fewer --workers goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process, left there by the pool's initializer


def _start(encoder: Encoder) -> None:
    """Make ready a worker process, which ends with its parent, even one that was killed."""
    global _encoder  # noqa: PLW0603
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(pieces: Sequence[Piece]) -> Encoded:
    return _encoder.encode(pieces)
