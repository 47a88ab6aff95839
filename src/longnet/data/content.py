"""What a file holds: decompressed, in UTF-8, and what it is where it is no text."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longnet.data.corpus import SourceFile

EXTRA = "pip install 'longnet-torch[data]'"
_BLOCK = 2**16
BOM = codecs.BOM_UTF8  # with which some editors begin a file
_TESTED_FOR_NUL = 8000  # git's rule for what is binary
_BINARY = {
    b"PK\x03\x04": "zip archives", b"\x1f\x8b": "gzip files not named .gz", b"BZh": "bzip2 files not named .bz2",
    b"\xfd7zXZ\0": "xz files not named .xz", b"\x28\xb5\x2f\xfd": "Zstandard files not named .zst",
    b"7z\xbc\xaf": "7z archives", b"Rar!": "rar archives", b"%PDF-": "PDF files", b"SQLite format 3\0": "SQLite files",
    b"PAR1": "parquet files not named .parquet", b"ARROW1": "Arrow files", b"\x89HDF": "HDF5 files",
    b"\x93NUMPY": "numpy files", b"\x89PNG": "pictures", b"\xff\xd8\xff": "pictures", b"GIF8": "pictures",
    b"\x7fELF": "programs",
}  # fmt: skip
_WIDE = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


READING = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading may raise


class InputError(ValueError):
    """Something is wrong in what is read, and stays so until it is mended there; unlike an OSError, which may pass."""


class Content:
    """A file that is open for reading: decompressed, and in UTF-8 where a mark at its begin says UTF-16 or UTF-32.

    Attributes
    ----------
    stream
        The content.
    position
        How far reading has come, in bytes as they lie on the disk.
    """

    def __init__(self, raw: io.FileIO, stream: io.BufferedReader) -> None:
        self.stream, self._raw = stream, raw

    @property
    def position(self) -> int:
        """Return it."""
        return self._raw.tell()  # a block ahead, at most

    def why_no_text(self) -> str | None:
        """Return what the content is, in the plural, where it is no text, without reading on."""
        head = self.stream.peek(_TESTED_FOR_NUL)[:_TESTED_FOR_NUL]
        if head[257:262] == b"ustar":
            return "tar archives"
        known = next((what for mark, what in _BINARY.items() if head.startswith(mark)), None)
        return known or ("binary" if b"\0" in head else None)


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[Content]:
    """Open a file.

    Raises ValueError where a library is missing. Reading may raise READING; `is_damage` says what kind of error it is.
    """
    with Path(file.path).open("rb", buffering=0) as raw, contextlib.ExitStack() as stack:
        stream = stack.enter_context(io.BufferedReader(_OPENERS[file.compression](raw), _BLOCK))
        head = stream.peek(4)[:4] if file.size else b""
        coding = next((name for mark, name in _WIDE if head.startswith(mark)), None)
        if coding is not None:
            stream = stack.enter_context(io.BufferedReader(_Blocks(_recoded(stream, coding)), _BLOCK))
        yield Content(raw, stream)


def is_damage(error: BaseException) -> bool:
    """Tell an error that lies in what a file holds from one of the disk or the network, which may pass."""
    if isinstance(error, OSError):
        return error.errno is None  # so do the decompressors say it; the system's errors have a number
    return isinstance(error, READING)


class _Blocks(io.RawIOBase):
    """A file whose content an iterator gives."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._held = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._held = block
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _recoded(stream: io.BufferedReader, coding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(coding)()
    try:
        while block := stream.read(_BLOCK):
            yield decoder.decode(block).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise EOFError(f"its mark says {coding.upper()}, and it is not: {error}") from error


def _zstandard(raw: io.FileIO) -> _Blocks:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"reading {raw.name} needs the package zstandard: {EXTRA}") from error
    return _Blocks(_frames(raw, zstandard))


def _frames(raw: io.FileIO, zstandard: Any) -> Iterator[bytes]:
    """Yield what Zstandard frames hold; unlike the library's own stream this notices that the last one is cut off."""
    frame = None
    while content := raw.read(_BLOCK):
        while content:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(content)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            content = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is cut off")


_OPENERS: dict[str, Callable[[io.FileIO], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
