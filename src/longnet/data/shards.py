"""Token shards: what `longnet prepare` writes, and reading any run of tokens from it.

A folder of data holds `index.json`, `tokenizer/`, `token_bytes.npy` and, for each split, shards `train-00000.npy`, …
and `train-documents.npy`. Shards are standard `.npy` files, one dimension each, which numpy memory-maps; docs/data.md
describes every field.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

FORMAT = 1
INDEX = "index.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.npy"  # noqa: S105
SPLITS = ("train", "validation")

Tokens = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds the ids of a vocabulary."""
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tokens, which begin `offset` bytes into it."""

    path: Path
    tokens: int
    dtype: np.dtype[Any]
    offset: int

    @classmethod
    def open(cls, path: Path, tokens: int, dtype: np.dtype[Any]) -> Self:
        """Open a shard; raise FileNotFoundError or ValueError where it is not `tokens` tokens of `dtype`."""
        return cls(path, tokens, dtype, _check_array(path, dtype, tokens))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return tokens start to stop.

        One read() for all of them: a fault per page of a memory map costs 3 to 20 times as much on cold random windows,
        and reads ahead what nobody asked for.
        """
        out = np.empty(stop - start, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            left = out.data.cast("B")
            while left:
                count = file.readinto(left)
                if not count:
                    raise ValueError(f"{self.path} ends before token {stop:,}: {_AGAIN}")
                left = left[count:]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split of the data: a stream of tokens, the concatenation of its shards.

    Attributes
    ----------
    name
        "train" or "validation".
    tokens
        Length of the stream.
    bytes
        Bytes of text that its tokens stand for.
    documents
        (documents + 1,) int64: document i is tokens documents[i] to documents[i + 1], its end token included.
    shards
        The files, in order.
    vocab_size
        Ids are below it; None does not ask.
    """

    name: str
    tokens: int
    bytes: int
    documents: npt.NDArray[np.int64]
    shards: Sequence[Shard]
    vocab_size: int | None = None

    @functools.cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(shard.tokens for shard in self.shards)])

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens start to stop of the stream, (stop - start,) int64, across shards.

        Raises IndexError unless 0 ≤ start ≤ stop ≤ tokens, and ValueError for an id that the vocabulary does not have.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a split that holds {self.tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            first, last = int(self._starts[shard]), min(int(self._starts[shard + 1]), stop)
            tokens = self.shards[shard].read(at - first, last - first)
            if self.vocab_size is not None and tokens.max() >= self.vocab_size:
                raise ValueError(
                    f"{self.shards[shard].path} is damaged: it holds id {tokens.max():,} in a vocabulary of "
                    f"{self.vocab_size:,} tokens; {_AGAIN}"
                )
            out[at - start : last - start] = tokens
            at, shard = last, shard + 1
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class TokenData:
    """A folder that `longnet prepare` wrote.

    Attributes
    ----------
    folder
        The folder.
    vocab_size
        Ids are below it.
    end_of_text
        The id that ends every document.
    fingerprint
        Hexadecimal digest of tokenizer and tokens: equal where they are.
    train, validation
        The splits; validation holds no token where the folder was made with `--validation 0`.
    provenance
        Sources, options, versions, date, numbers of files that were skipped.
    """

    folder: Path
    vocab_size: int
    end_of_text: int
    fingerprint: str
    train: Split
    validation: Split
    provenance: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder, checking its structure and the type and size of each file; `verify` checks what they hold.

        Raises FileNotFoundError where it is not a folder of data or a file is missing, and ValueError, naming the file,
        where one is not what the index says.
        """
        folder = Path(folder)
        index = read_index(folder)
        try:
            dtype, vocab_size = np.dtype(index["dtype"]), _count(index, "vocab_size")
            train, validation = (_open_split(folder, name, index["splits"][name], dtype, vocab_size) for name in SPLITS)
            _check_array(folder / TOKEN_BYTES, np.dtype(np.int32), vocab_size)
            data = cls(
                folder, vocab_size, _count(index, "end_of_text"), index["fingerprint"], train, validation,
                index["provenance"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}): {_AGAIN}") from error
        if not (data.tokenizer_folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{data.tokenizer_folder / 'tokenizer.json'} is missing: {_AGAIN}")
        return data

    @property
    def tokenizer_folder(self) -> Path:
        """The Hugging Face tokenizer folder."""
        return self.folder / TOKENIZER

    @property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) int32: bytes of text that each token stands for, 0 for special ones."""
        return np.asarray(np.load(self.folder / TOKEN_BYTES), dtype=np.int32)

    def verify(self) -> None:
        """Compare each file's SHA-256 with the index; raise ValueError that names the first one that differs."""
        for name, expected in checksums(read_index(self.folder)).items():
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name} is missing: {_AGAIN}")
            if sha256(self.folder / name) != expected:
                raise ValueError(f"{self.folder / name} is damaged: its SHA-256 is not that of the index; {_AGAIN}")


def read_index(folder: Path) -> dict[str, Any]:
    """Return what index.json says; raise FileNotFoundError where it is missing, else ValueError."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {INDEX}: not a folder that `longnet prepare` has finished; "
            f"run `longnet prepare PATH… -o {folder}`"
        )
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_AGAIN}") from error
    if not isinstance(index, dict) or not {"format", "splits"} <= index.keys():
        raise ValueError(f"{path} is no index that `longnet prepare` has written: give the folder of prepared data")
    found = index["format"]
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version of longnet reads {FORMAT}: {_AGAIN}")
    return dict(index)


def checksums(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of every file that an index names."""
    sums = dict(index["files"])
    for split in index["splits"].values():
        sums |= {shard["file"]: shard["sha256"] for shard in split["shards"]}
    return sums


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_AGAIN = "prepare the data again with --overwrite, or copy the folder anew"


def _count(entry: Mapping[str, Any], key: str) -> int:
    if type(entry[key]) is not int or entry[key] < 0:
        raise TypeError(f"{key} is {entry[key]!r}, where a number of 0 or more is expected")
    return int(entry[key])


def _open_split(folder: Path, name: str, entry: Mapping[str, Any], dtype: np.dtype[Any], vocab_size: int) -> Split:
    shards = [Shard.open(folder / shard["file"], _count(shard, "tokens"), dtype) for shard in entry["shards"]]
    offsets = folder / entry["offsets"]
    _check_array(offsets, np.dtype(np.int64), _count(entry, "documents") + 1)
    split = Split(name, _count(entry, "tokens"), _count(entry, "bytes"), np.load(offsets), shards, vocab_size)
    if int(split.documents[-1]) != split.tokens:
        raise ValueError(f"{offsets} ends at token {split.documents[-1]:,}, the index says {split.tokens:,}: {_AGAIN}")
    if sum(shard.tokens for shard in shards) != split.tokens:
        raise ValueError(f"{folder / INDEX}: the {name} shards do not add up to {split.tokens} tokens; {_AGAIN}")
    return split


def _check_array(path: Path, dtype: np.dtype[Any], length: int) -> int:
    """Return where a one-dimensional .npy file's rows begin; raise where it is not what was expected."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_AGAIN}")
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): {_AGAIN}") from error
        offset = file.tell()
    size = offset + length * dtype.itemsize
    if shape != (length,) or found != dtype:
        raise ValueError(f"{path} holds {shape} of {found}, the index says ({length},) of {dtype}: {_AGAIN}")
    if path.stat().st_size != size:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes long instead of {size:,}: {_AGAIN}")
    return offset
