"""Files to documents, never a whole file at once: plain text here, records and FASTA beside."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from longnet.data.content import READING, InputError, is_damage, opened
from longnet.data.corpus import SourceFile

PIECE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files become documents; docs/data.md says what each option does."""

    text_field: str = "text"
    by_folder: bool = False
    skip_damaged: bool = False
    fasta_case: Literal["keep", "upper", "lower"] = "keep"
    fasta_n: Literal["keep", "drop"] = "keep"


PLAIN = Reading()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of a document: all of it, or a part of about 4 MiB.

    Attributes
    ----------
    unit
        What goes to one split as a whole: the document's name, or its folder's.
    text
        Bytes as they lie in the file; UTF-8 where it comes from a record, or from UTF-16.
    starts, ends
        Whether the document starts, and ends, with this piece.
    position
        How far into the file this is, in bytes as they lie on the disk.
    source
        The path, and which record of it: what errors name.
    """

    unit: str
    text: bytes
    starts: bool
    ends: bool
    position: int
    source: str


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something in a file that is no document, for a reason such as "binary"."""

    reason: str


def read_pieces(file: SourceFile, reading: Reading = PLAIN, *, skip: int = 0) -> Iterator[Piece | Skipped]:
    """Yield the documents of a file in order, from the skip-th item on, in constant memory but for one record.

    Records are units of their own, with `by_folder` too. Raises InputError that names file and line of what cannot be
    read, ValueError that names the library that is missing, OSError for what may pass.
    """
    from longnet.data import fasta, records

    if file.kind == "hub":
        yield from records.read_hub(file, reading, skip)
        return
    readers = {
        "jsonl": records.read_json_lines, "json": records.read_json, "parquet": records.read_parquet,
        "fasta": fasta.read_fasta, "text": read_text,
    }  # fmt: skip
    yield from itertools.islice(readers[file.kind](file, reading), skip, None)


def read_text(file: SourceFile, reading: Reading) -> Iterator[Piece | Skipped]:
    """Yield a file of plain text in pieces, or what it is instead."""
    unit = file.folder if reading.by_folder else file.name
    position, starts, held = 0, True, b""
    try:
        with opened(file) as content:
            reason = content.why_no_text()
            if reason:
                yield Skipped(reason)
                return
            held = content.stream.read(PIECE_BYTES)
            if not held:
                yield Skipped("empty")
                return
            while True:
                more = content.stream.read(PIECE_BYTES) if len(held) >= PIECE_BYTES else b""
                cut = _cut(held) if more else len(held)
                position = content.position if file.compression else position + cut
                yield Piece(unit, held[:cut], starts, not more, position, str(file.path))
                if not more:
                    return
                held, starts = held[cut:] + more, False
    except READING as error:
        yield from pass_damage(file, reading, "", error)
        if held:
            yield Piece(unit, held, starts, ends=True, position=file.size, source=str(file.path))


def pass_damage(file: SourceFile, reading: Reading, where: str, error: BaseException) -> Iterator[Skipped]:
    """Count a file's damage where the user wants that; else raise InputError, or the error itself if it may pass."""
    if not is_damage(error):
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file.path)  # a read that fails does not say of what
        raise error
    if not reading.skip_damaged:
        raise InputError(
            f"{file.path} is damaged{where} ({error}): copy it anew, or skip what is damaged with --skip-damaged"
        ) from error
    yield Skipped("damaged")


def _cut(text: bytes) -> int:
    """Return where to end a piece: after its last line, or else between two characters of UTF-8."""
    line = text.rfind(b"\n") + 1
    if line:
        return line
    end = len(text)
    while end > len(text) - 4 and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if text[end - 1] >= 0xC0 else len(text)
