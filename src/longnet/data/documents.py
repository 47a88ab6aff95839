"""Files to documents, never a whole file at once: plain text, JSON lines, parquet, data sets on the hub."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longnet.data.corpus import HUB, SourceFile

PIECE_BYTES = 2**22
_TESTED_FOR_NUL = 8000  # git's rule for what is binary
_EXTRA = "pip install 'longnet-torch[data]'"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of a document: all of it, or a part of about 4 MiB.

    Attributes
    ----------
    unit
        What goes to one split as a whole: the document's name, or its folder's.
    text
        Bytes as they lie in the file; UTF-8 where it comes from a record.
    starts, ends
        Whether the document starts, and ends, with this piece.
    position
        How far into the file this is, in bytes as they lie on the disk.
    """

    unit: str
    text: bytes
    starts: bool
    ends: bool
    position: int


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something in a file that is no document, for a reason such as "binary"."""

    reason: str


def read_pieces(
    file: SourceFile, *, text_field: str = "text", by_folder: bool = False, skip: int = 0
) -> Iterator[Piece | Skipped]:
    """Yield the documents of a file in order, from the skip-th item on, in constant memory but for one record.

    Records are units of their own, with `by_folder` too. Raises ValueError that names file and line of what cannot be
    read, or the library that is missing.
    """
    if file.kind == "hub":
        yield from _hub(file, text_field, skip)
        return
    items = {".parquet": _parquet, "text": _text}.get(file.kind, _json_lines)(file, text_field, by_folder)
    yield from itertools.islice(items, skip, None)


def _text(file: SourceFile, _: str, by_folder: bool) -> Iterator[Piece | Skipped]:
    unit = file.folder if by_folder else file.name
    with Path(file.path).open("rb") as stream:
        held = stream.read(PIECE_BYTES)
        if not held:
            yield Skipped("empty")
            return
        if b"\0" in held[:_TESTED_FOR_NUL]:
            yield Skipped("binary")
            return
        position, starts = 0, True
        while True:
            more = stream.read(PIECE_BYTES) if len(held) >= PIECE_BYTES else b""
            cut = _cut(held) if more else len(held)
            position += cut
            yield Piece(unit, held[:cut], starts, not more, position)
            if not more:
                return
            held, starts = held[cut:] + more, False


def _cut(text: bytes) -> int:
    """Return where to end a piece: after its last line, or else between two characters of UTF-8."""
    line = text.rfind(b"\n") + 1
    if line:
        return line
    end = len(text)
    while end > len(text) - 4 and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if text[end - 1] >= 0xC0 else len(text)


def _json_lines(file: SourceFile, text_field: str, _: bool) -> Iterator[Piece | Skipped]:
    path = Path(file.path)
    damage = (EOFError, OSError, zlib.error, *([_zstandard(file).ZstdError] if file.kind == ".jsonl.zst" else []))
    with path.open("rb") as raw:
        lines = _lines(raw, file)
        for number in itertools.count(1):
            try:
                line = next(lines, None)
            except damage as error:
                raise ValueError(f"{path} is damaged after line {number - 1} ({error}): copy it anew") from error
            if line is None:
                return
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is not a JSON object but a {type(record).__name__}")
            yield _record(record, text_field, where, f"{file.name}:{number}", raw.tell())


def _lines(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    if file.kind == ".jsonl.gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield from stream
    elif file.kind == ".jsonl.zst":
        held = b""
        for content in _frames(raw, file):
            *lines, held = (held + content).split(b"\n")
            yield from lines
        yield held
    else:
        yield from raw


def _frames(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    """Yield what Zstandard frames hold; unlike the library's own stream this notices that the last one is cut off."""
    frame = None
    while content := raw.read(2**16):
        while content:
            frame = frame or _zstandard(file).ZstdDecompressor().decompressobj()
            yield frame.decompress(content)
            content = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is cut off")


def _zstandard(file: SourceFile) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"reading {file.path} needs the package zstandard: {_EXTRA}") from error
    return zstandard


def _parquet(file: SourceFile, text_field: str, _: bool) -> Iterator[Piece | Skipped]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"reading {file.path} needs the package pyarrow: {_EXTRA}") from error
    try:
        with pq.ParquetFile(file.path) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise ValueError(_no_field(str(file.path), text_field, fields))
            rows, number = table.metadata.num_rows, 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    where, name = f"{file.path}, row {number}", f"{file.name}:{number}"
                    yield _record({text_field: text}, text_field, where, name, file.size * number // rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path} is not a whole parquet file ({_line(error)}): copy it anew") from error


def _hub(file: SourceFile, text_field: str, skip: int) -> Iterator[Piece | Skipped]:
    name, config, split, *_ = [*str(file.path).removeprefix(HUB).split(":"), "", ""]
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{file.path} needs the package datasets: {_EXTRA}") from error
    load: Callable[..., Any] = datasets.load_dataset
    stream: Iterator[dict[str, Any]] | None = None
    for number in itertools.count(skip + 1):
        try:
            if stream is None:
                stream = iter(load(name, config or None, split=split or "train", streaming=True).skip(skip))
            record = next(stream, None)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{file.path}: no such data set, or the hub is not reachable ({_line(error)}); "
                f"write hf:OWNER/NAME[:CONFIG[:SPLIT]], or download it and give its files"
            ) from error
        if record is None:
            return
        yield _record(record, text_field, f"{file.path}, row {number}", f"{file.name}:{number}", 0)


def _record(record: dict[str, Any], field: str, where: str, name: str, position: int) -> Piece | Skipped:
    if field not in record:
        raise ValueError(_no_field(where, field, list(record)))
    text = record[field]
    if text is None or text == "":
        return Skipped("empty")
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {field!r} is not text but {type(text).__name__}: choose --text-field")
    return Piece(name, text.encode("utf-8", "surrogatepass"), starts=True, ends=True, position=position)


def _no_field(where: str, field: str, fields: list[str]) -> str:
    return f"{where}: no field {field!r} among {', '.join(fields) or 'none'}: choose one with --text-field"


def _line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
