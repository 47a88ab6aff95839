"""Writing a folder of data so that a kill at any instant loses nothing that was synced and leaves nothing half-written.

Everything is written in the folder's `.unfinished/`, an array under a name of its own until it is whole; `publish` then
puts the files into the folder, `index.json` last, so that what was there before stays as it was until then.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from longnet.data.shards import (
    FORMAT,
    INDEX,
    SPLITS,
    TOKEN_BYTES,
    TOKENIZER,
    Shard,
    checksums,
    read_index,
    sha256,
    token_dtype,
)
from longnet.durable import sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNFINISHED = ".unfinished"
_OURS = (*(f"{split}-[0-9]*.npy" for split in SPLITS), f"{TOKENIZER}/**/*")
_DIGEST = "digest"
_HEADER_BYTES = 128  # of a one-dimensional .npy file, whatever its length: numpy leaves room for it to grow


class DamagedWorkError(ValueError):
    """What lies in a folder is not what its state says, so that the work cannot go on; what is left of it stays."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, so that the work begun there cannot go on: begin it anew with --overwrite")


class GrowingArray:
    """A one-dimensional .npy file to which rows are added; it cuts itself to a known length, to begin again from there.

    Raises OSError where the disk does not take them.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int = 0) -> None:
        self.path, self.dtype, self.length = path, dtype, length
        path.parent.mkdir(parents=True, exist_ok=True)
        size = _HEADER_BYTES + length * dtype.itemsize
        if length and (not path.is_file() or path.stat().st_size < size):
            raise DamagedWorkError(f"{path} is shorter than when it was last synced")
        self._file: BinaryIO = io.FileIO(path, "r+" if path.exists() else "x+")
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows at the end."""
        data = memoryview(np.ascontiguousarray(rows, dtype=self.dtype).data).cast("B")
        while data:
            data = data[self._file.write(data) :]  # an unbuffered write may take less than all of it
        self.length += len(rows)

    def read(self) -> npt.NDArray[Any]:
        """Return all rows."""
        return np.fromfile(self.path, dtype=self.dtype, offset=_HEADER_BYTES)

    def sync(self) -> None:
        """Wait until the disk holds what was added."""
        os.fsync(self._file.fileno())

    def finish(self, path: Path) -> None:
        """Write the header, sync, and rename the file to `path`."""
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(header, fields)
        if len(header.getvalue()) != _HEADER_BYTES:
            raise AssertionError(f"numpy wrote a header of {len(header.getvalue())} bytes")
        self._file.seek(0)
        self._file.write(header.getvalue())
        self.sync()
        self._file.close()
        self.path.replace(path)
        sync(path.parent)

    def close(self) -> None:
        """Close the file where it is."""
        self._file.close()


class SplitWriter:
    """Shards and document offsets of one split, in a folder where nobody reads yet.

    `state` is what `sync` returned: the writer goes on from there, whatever was written after it.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype[Any], shard_tokens: int, state: Mapping[str, Any] | None = None
    ) -> None:
        state = state or {"tokens": 0, "bytes": 0, "documents": 0, "open_tokens": 0, "offsets": 0, "shards": []}
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.tokens, self.bytes = int(state["tokens"]), int(state["bytes"])
        self._shards: list[dict[str, Any]] = list(state["shards"])
        for shard in self._shards:
            try:
                Shard.open(folder / shard["file"], shard["tokens"], dtype)
            except (ValueError, FileNotFoundError) as error:
                raise DamagedWorkError(f"{folder / shard['file']} is missing or damaged") from error
        with ExitStack() as stack:
            self._shard = self._grow(self._shard_name, dtype, int(state["open_tokens"]))
            stack.callback(self._shard.close)
            self._offsets = self._grow(self._offsets_name, np.dtype(np.int64), int(state["offsets"]))
            stack.pop_all()
        if not self._offsets.length:
            self._offsets.append(np.zeros(1, dtype=np.int64))

    def append(self, tokens: npt.NDArray[Any], ends: Sequence[int] | npt.NDArray[np.int64], text_bytes: int) -> None:
        """Add tokens that stand for `text_bytes` bytes; `ends` are where in them documents end."""
        self._offsets.append(self.tokens + np.asarray(ends, dtype=np.int64))
        self.tokens += len(tokens)
        self.bytes += text_bytes
        while len(tokens):
            room = self.shard_tokens - self._shard.length
            self._shard.append(tokens[:room])
            tokens = tokens[room:]
            if self._shard.length == self.shard_tokens:
                self._finish_shard()
                self._shard = self._grow(self._shard_name, self.dtype, 0)

    @property
    def documents(self) -> int:
        """Documents that have ended."""
        return self._offsets.length - 1

    @property
    def shards(self) -> int:
        """Shards that are whole."""
        return len(self._shards)

    def sync(self) -> dict[str, Any]:
        """Wait until the disk holds everything, and return the state from which a writer can go on."""
        self._shard.sync()
        self._offsets.sync()
        return {
            "tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
            "open_tokens": self._shard.length, "offsets": self._offsets.length, "shards": list(self._shards),
        }  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """Put every file into its place; return the split's entry of the index."""
        if self._shard.length:
            self._finish_shard()
        else:
            self._shard.close()
        self._offsets.finish(self.folder / self._offsets_name)
        return {
            "tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
            "shards": self._shards, "offsets": self._offsets_name,
        }  # fmt: skip

    def close(self) -> None:
        """Close the files where they are."""
        self._shard.close()
        self._offsets.close()

    @property
    def _shard_name(self) -> str:
        return f"{self.name}-{len(self._shards):05}.npy"

    @property
    def _offsets_name(self) -> str:
        return f"{self.name}-documents.npy"

    def _finish_shard(self) -> None:
        path, tokens = self.folder / self._shard_name, self._shard.length
        self._shard.finish(path)
        self._shards.append({"file": path.name, "tokens": tokens, "sha256": sha256(path)})

    def _grow(self, name: str, dtype: np.dtype[Any], length: int) -> GrowingArray:
        path, whole = self.folder / f"{name}.partial", self.folder / name
        if length and not path.exists() and whole.exists():
            whole.replace(path)  # it became whole after the state was saved, and grows again from there
        return GrowingArray(path, dtype, length)


class DataWriter:
    """Both splits of a folder of data, the tokenizer beside them.

    Written to `folder` itself; `longnet prepare` hands in a folder of its own and publishes that when it is whole.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        token_bytes: npt.NDArray[np.int32],
        *,
        shard_tokens: int = 2**26,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.tokenizer, self.token_bytes = folder, tokenizer, token_bytes
        self.dtype = token_dtype(len(token_bytes))
        self._goes_on = state is not None
        self.splits: dict[str, SplitWriter] = {}
        with ExitStack() as stack:
            for name in SPLITS:
                of_split = state[name] if state else None
                self.splits[name] = SplitWriter(folder, name, self.dtype, shard_tokens, of_split)
                stack.callback(self.splits[name].close)
            stack.pop_all()

    def sync(self) -> dict[str, Any]:
        """Wait until the disk holds everything, and return the state from which a writer can go on."""
        return {name: split.sync() for name, split in self.splits.items()}

    @property
    def shards(self) -> int:
        """Shards that are whole."""
        return sum(split.shards for split in self.splits.values())

    @property
    def documents(self) -> int:
        """Documents that have ended."""
        return sum(split.documents for split in self.splits.values())

    def finish(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Put every file into its place, index.json last; return the index."""
        entries = {name: split.finish() for name, split in self.splits.items()}
        save_tokenizer(self.tokenizer, self.folder / TOKENIZER)
        with write_whole(self.folder / TOKEN_BYTES) as file:
            np.save(file, self.token_bytes)
        names = [TOKEN_BYTES, *(entry["offsets"] for entry in entries.values())]
        saved = (path for path in sorted((self.folder / TOKENIZER).rglob("*")) if path.is_file())
        names += [path.relative_to(self.folder).as_posix() for path in saved]
        index = {
            "format": FORMAT, "dtype": self.dtype.name, "vocab_size": len(self.token_bytes),
            "end_of_text": self.tokenizer.eos_token_id, "fingerprint": self._fingerprint(entries), "splits": entries,
            "files": {name: sha256(self.folder / name) for name in names}, "provenance": dict(provenance),
        }  # fmt: skip
        write_json(index, self.folder / INDEX)
        return index

    def _fingerprint(self, entries: Mapping[str, Any]) -> str:
        digest = hashlib.sha256((self.folder / TOKENIZER / "tokenizer.json").read_bytes())
        for name, entry in entries.items():
            digest.update(f"{name} {entry['tokens']} {self.dtype.name}".encode())
            for shard in entry["shards"]:
                path = self.folder / shard["file"]
                if self._goes_on and sha256(path) != shard["sha256"]:
                    raise DamagedWorkError(f"{path} is damaged")
                tokens = Shard.open(path, shard["tokens"], self.dtype)
                for start in range(0, tokens.tokens, 2**20):
                    digest.update(tokens.read(start, min(start + 2**20, tokens.tokens)).data)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files where they are."""
        for split in self.splits.values():
            split.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when it is whole and synced, and not at all where writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say what it had no room for
        raise
    sync(path.parent)


@contextmanager
def write_whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which appears under its name when it is whole, and not at all where filling fails.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors tells of a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        raise
    sync(path.parent)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a Hugging Face tokenizer, and wait until the disk holds it."""
    tokenizer.save_pretrained(folder)
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def publish(folder: Path) -> None:
    """Move what a finished writer left in the folder's `.unfinished/` into it; after a kill, the same again."""
    work = folder / UNFINISHED
    index = read_index(work)
    names = checksums(index)
    (folder / INDEX).unlink(missing_ok=True)
    for name in names:
        if (work / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).replace(folder / name)
    written = [path for pattern in _OURS for path in folder.glob(pattern)]
    for path in written:
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()
    sync(folder)
    (work / INDEX).replace(folder / INDEX)
    sync(folder)
    shutil.rmtree(work)


def write_json(value: object, path: Path) -> None:
    """Write indented JSON through `write_whole`."""
    with write_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write what work goes on from, with a digest by which `read_state` knows it."""
    write_json({**state, _DIGEST: _digest(state)}, path)


def read_state(path: Path) -> dict[str, Any]:
    """Return what `write_state` wrote; raise FileNotFoundError where there is none, ValueError where it is damaged."""
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} is damaged") from error
    if not isinstance(state, dict) or state.pop(_DIGEST, None) not in (None, _digest(state)):
        raise ValueError(f"{path} is damaged")
    return state


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()
