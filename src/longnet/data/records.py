"""Records, each a document: JSON lines, JSON, parquet, data sets on the hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longnet.data.content import BOM, EXTRA, READING, Content, InputError, opened
from longnet.data.corpus import HUB, SourceFile
from longnet.data.documents import Piece, Reading, Skipped, pass_damage, read_text

_SNIFFED = 2**16


def read_json_lines(file: SourceFile, reading: Reading) -> Iterator[Piece | Skipped]:
    """Yield the records of a file of JSON lines."""
    number = 0
    try:
        with opened(file) as content:
            for number, line in enumerate(content.stream, 1):  # the error names it
                if not line.strip():
                    continue
                where = f"{file.path}, line {number}"
                try:
                    record = _parse(line.removeprefix(BOM) if number == 1 else line, where)
                except InputError:
                    if not reading.skip_damaged:
                        raise
                    yield Skipped("damaged")
                    continue
                yield _piece(record, reading.text_field, where, f"{file.name}:{number}", content.position)
    except READING as error:
        yield from pass_damage(file, reading, f" after line {number}", error)


def read_json(file: SourceFile, reading: Reading) -> Iterator[Piece | Skipped]:
    """Yield the records of a JSON file: a list of objects, or in truth JSON lines; any other JSON is taken as text."""
    try:
        with opened(file) as content:
            head = content.stream.peek(_SNIFFED)[:_SNIFFED].removeprefix(BOM).lstrip()
            if head[:1] != b"[" or head[1:].lstrip()[:1] != b"{":
                is_lines = _is_record(head.partition(b"\n")[0], reading.text_field)
                yield from (read_json_lines if is_lines else read_text)(file, reading)
                return
            yield from _list(file, reading, content)
    except READING as error:
        yield from pass_damage(file, reading, "", error)


def _list(file: SourceFile, reading: Reading, content: Content) -> Iterator[Piece | Skipped]:
    try:
        records = _load(content.stream.read().removeprefix(BOM), str(file.path))
    except InputError:
        if not reading.skip_damaged:
            raise
        yield Skipped("damaged")
        return
    for number, record in enumerate(records, 1):
        where, position = f"{file.path}, record {number}", file.size * number // len(records)
        if not isinstance(record, dict):
            raise InputError(f"{where} is not a JSON object but a {type(record).__name__}")
        yield _piece(record, reading.text_field, where, f"{file.name}:{number}", position)


def read_parquet(file: SourceFile, reading: Reading) -> Iterator[Piece | Skipped]:
    """Yield the rows of a parquet file."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"reading {file.path} needs the package pyarrow: {EXTRA}") from error
    field, number = reading.text_field, 0
    try:
        with pq.ParquetFile(file.path) as table:
            fields = [table.schema.column(n).path for n in range(len(table.schema))]  # a.b of a field in another
            if not any(path == field or path.startswith(f"{field}.") for path in fields):
                raise InputError(_no_field(str(file.path), field, fields))
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    position = file.size * number // table.metadata.num_rows
                    yield _piece(row, field, f"{file.path}, row {number}", f"{file.name}:{number}", position)
    except pa.ArrowInvalid as error:
        yield from pass_damage(file, reading, f" after row {number}", EOFError(_line(error)))
    except OSError as error:
        yield from pass_damage(file, reading, f" after row {number}", error)


def read_hub(file: SourceFile, reading: Reading, skip: int) -> Iterator[Piece | Skipped]:
    """Yield the rows of a data set on the hub from the skip-th on; raise OSError where it cannot be reached."""
    name, config, split, *_ = [*str(file.path).removeprefix(HUB).split(":"), "", ""]
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{file.path} needs the package datasets: {EXTRA}") from error
    load: Callable[..., Any] = datasets.load_dataset
    stream: Iterator[dict[str, Any]] | None = None
    for number in itertools.count(skip + 1):
        try:
            if stream is None:
                stream = iter(load(name, config or None, split=split or "train", streaming=True).skip(skip))
            record = next(stream, None)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(
                f"{file.path}: no such data set, or the hub is not reachable ({_line(error)}); "
                f"write hf:OWNER/NAME[:CONFIG[:SPLIT]], or download it and give its files"
            ) from error
        if record is None:
            return
        yield _piece(record, reading.text_field, f"{file.path}, row {number}", f"{file.name}:{number}", 0)


def _load(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply for Python's JSON reader") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    record = _load(line, where)
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object but a {type(record).__name__}")
    return record


def _is_record(line: bytes, field: str) -> bool:
    try:
        return _found(_parse(line, ""), field) is not _ABSENT
    except InputError:
        return False


_ABSENT = object()


def _found(record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, which may lie in another one: "a.b"; _ABSENT where there is none."""
    if field in record:
        return record[field]
    first, dot, rest = field.partition(".")
    inner = record.get(first) if dot else None
    if dot and isinstance(inner, Mapping):
        return _found(inner, rest)
    return None if dot and first in record and inner is None else _ABSENT


def _piece(record: Mapping[str, Any], field: str, where: str, name: str, position: int) -> Piece | Skipped:
    text = _found(record, field)
    if text is _ABSENT:
        raise InputError(_no_field(where, field, list(record)))
    if text is None or text == "":
        return Skipped("empty")
    if not isinstance(text, str):
        within = f", which holds {', '.join(text)}: write {field}.{next(iter(text))}" if isinstance(text, dict) else ""
        what = f"{type(text).__name__}{within}" if within else f"{type(text).__name__}: choose --text-field"
        raise InputError(f"{where}: the field {field!r} is not text but {what}")
    return Piece(name, text.encode("utf-8", "surrogatepass"), True, True, position, where)


def _no_field(where: str, field: str, fields: list[str]) -> str:
    return f"{where}: no field {field!r} among {', '.join(fields) or 'none'}: choose one with --text-field"


def _line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
