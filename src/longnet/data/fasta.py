"""FASTA: sequences of bases or amino acids, each record a document, without headers and line ends."""

from __future__ import annotations

from collections.abc import Iterator

from longnet.data import documents
from longnet.data.content import BOM, READING, InputError, opened
from longnet.data.corpus import SourceFile
from longnet.data.documents import Piece, Reading, Skipped, pass_damage

_LINE = 2**20  # bytes of a line that are held: a genome may lie on one


def read_fasta(file: SourceFile, reading: Reading) -> Iterator[Piece | Skipped]:
    """Yield the records of a FASTA file in pieces of about 4 MiB, letters as the options say.

    Raises InputError for a file that does not begin with ">".
    """
    record, starts, held = 0, True, bytearray()

    def piece(position: int, *, ends: bool) -> Piece | Skipped:
        nonlocal starts
        if ends and starts and not held:
            return Skipped("empty")
        found = Piece(f"{file.name}:{record}", bytes(held), starts, ends, position, f"{file.path}, record {record}")
        held.clear()
        starts = ends
        return found

    try:
        with opened(file) as content:
            reason = content.why_no_text()
            if reason:
                yield Skipped(reason)
                return
            is_new, is_header = True, False
            while line := content.stream.readline(_LINE):
                if is_new:
                    line = line if record else line.removeprefix(BOM)
                    is_header = line.startswith((b">", b";"))  # ";" began comments once
                    if line.startswith(b">"):
                        if record:
                            yield piece(content.position, ends=True)
                        record += 1
                is_new = line.endswith(b"\n")
                if is_header:
                    if b"\r" in line.rstrip(b"\r\n"):
                        raise InputError(
                            f"{file.path} ends lines by CR alone, as old Macs did, which makes all of it a header: "
                            "turn them into newlines, like: tr '\\r' '\\n'"
                        )
                    continue
                if not record and line.strip():
                    raise InputError(f"{file.path} is no FASTA: it does not begin with '>'; call it .txt if it is text")
                held += _letters(line, reading)
                if len(held) >= documents.PIECE_BYTES:
                    yield piece(content.position, ends=False)
            yield piece(content.position, ends=True)
    except READING as error:
        yield from pass_damage(file, reading, f" in record {record}", error)
        yield piece(file.size, ends=True)


def _letters(line: bytes, reading: Reading) -> bytes:
    letters = line.translate(None, b" \t\r\n" + (b"Nn" if reading.fasta_n == "drop" else b""))
    return {"keep": letters, "upper": letters.upper(), "lower": letters.lower()}[reading.fasta_case]
