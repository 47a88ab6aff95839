"""The log of a step in chunks: on disk, the rows of the state that each chunk has overwritten."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class RowLog:
    """Rows that chunks have overwritten, each chunk's at its place.

    Rows on a GPU are copied on a stream of their own into one of two pinned buffers, while the next chunk is computed,
    and go to the disk once the next chunk's rows are on their way; `sync`, `read` and `close` leave none behind.

    Args:
        path: of the file; what it holds stays.
        streams: `torch.cuda` where rows lie on a GPU; None writes at once.

    Attributes:
        offsets: by chunk, where its rows begin, in bytes, and how many there are.
    """

    def __init__(self, path: Path, streams: ModuleType | None = None) -> None:
        self.path = path
        self.offsets: dict[int, tuple[int, int]] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._streams = streams
        self._stream: Any = None
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._on_the_way: tuple[int, Tensor, Any] | None = None  # offset, pinned bytes, when they are there

    def write(self, index: int, rows: Tensor) -> None:
        """Take over a chunk's rows (n, 2, D), in memory that nobody writes to from then on.

        Raises:
            ValueError: other than were counted.
            OSError: the disk is full, of this chunk's rows or of earlier ones; what was synced is whole.
        """
        offset, count = self.offsets[index]
        if len(rows) != count:
            raise ValueError(f"chunk {index} overwrote {len(rows)} rows, where {count} were counted")
        data = rows.contiguous().view(torch.uint8).reshape(-1)
        if self._streams is None:
            self._write(offset, data.cpu())
            return
        if self._stream is None:
            self._stream = self._streams.Stream(rows.device)  # which need not be the current device
        buffer = self._buffers.pop(0)  # the other one is on the way
        if len(buffer) < len(data):
            buffer = torch.empty(len(data), dtype=torch.uint8, pin_memory=self._streams is torch.cuda)
        self._buffers.append(buffer)
        there = self._streams.Event()
        self._stream.wait_stream(self._streams.current_stream(rows.device))  # which computes the rows
        with self._streams.stream(self._stream):
            buffer[: len(data)].copy_(data, non_blocking=True)
            there.record(self._stream)
        data.record_stream(self._stream)  # its memory is nobody else's before it is copied
        self._land()
        self._on_the_way = offset, buffer[: len(data)], there

    def reaches(self, index: int) -> bool:
        """Say whether the file is as long as the rows of all chunks before this one."""
        return os.fstat(self._file).st_size >= self.offsets[index][0]

    def read(self, index: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Return a chunk's rows (n, 2, D) on the CPU.

        Raises:
            OSError: the file ends before them.
        """
        self._land()
        offset, count = self.offsets[index]
        rows = torch.empty(count, 2, head_dim, dtype=dtype)
        data = memoryview(rows.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]
        while data:
            came = os.preadv(self._file, [data], offset)
            if not came:
                raise OSError(f"{self.path} ends before the rows of chunk {index}: it is damaged")
            data, offset = data[came:], offset + came
        return rows

    def sync(self) -> None:
        """Return once all rows are on disk, to stay."""
        self._land()
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; rows that were not synced may be lost."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _land(self) -> None:
        """Write what is on the way, once it is there."""
        if self._on_the_way is None:
            return
        offset, data, there = self._on_the_way
        there.synchronize()
        self._write(offset, data)
        self._on_the_way = None

    def _write(self, offset: int, data: Tensor) -> None:
        left = memoryview(data.numpy())  # type: ignore[arg-type]
        try:
            while left:
                written = os.pwrite(self._file, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; make room and resume") from error
