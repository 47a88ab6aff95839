"""Ends a process whose job stands still, and says which rank does not go on."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch.distributed import Store  # type: ignore[attr-defined]

TOLD = "told"  # in the store: which rank tells the user what has ended the job
_LOOKS = 20  # at the others, within the time that a rank may take


class _Beat(NamedTuple):
    beats: int
    marks: int
    place: str


class Watch:
    """A thread that tells the store that this process lives, and looks at the others where its own work stands still.

    A stopped process (SIGSTOP, a frozen machine) has no thread that runs, so that its beats end; one that hangs
    elsewhere still beats, and its beats say where. A collective that waits for either shows neither, and waits on.
    Where no mark has come for `seconds`, the watch prints a line that names the rank, and ends the process with
    status 1.

    Args:
        store: of all ranks, by a connection of its own: one that waits would make the watch wait.
        rank: this one.
        size: number of ranks.
        seconds: between two marks, at most.
    """

    def __init__(self, store: Store, rank: int, size: int, seconds: float) -> None:
        self._store, self._rank, self._size, self._seconds = store, rank, size, seconds
        self._marks, self._since = 0, time.monotonic()
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def mark(self) -> None:
        """Say that this process goes on."""
        self._marks += 1
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self.mark()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        count, before = 0, None
        while not self._end.wait(self._seconds / _LOOKS):
            stood = time.monotonic() - self._since
            count += 1
            try:
                self._store.set(self._key(self._rank), f"{count} {self._marks} {self._place()}")
                if stood < self._seconds / 2:
                    before = None
                elif before is None:
                    before = self._beats()
                elif stood > self._seconds:
                    why = _culprits(before, self._beats(), self._seconds)
                    self._store.compare_set(TOLD, "", str(self._rank))  # who loses this rank need not say so
                    self._stop(why)
            except RuntimeError as error:  # torchrun is gone, and with it its store
                self._stop(f"torchrun's store does not answer: {str(error).splitlines()[0]}")

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _beats(self) -> list[_Beat]:
        beats = []
        for rank in range(self._size):
            has_one = self._store.check([self._key(rank)])
            count, marks, place = self._store.get(self._key(rank)).decode().split(" ") if has_one else ("0", "0", "?")
            beats.append(_Beat(int(count), int(marks), place))
        return beats

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame, limit=1) if frame is not None else []
        return f"{Path(stack[-1].filename).name}:{stack[-1].lineno}".replace(" ", "") if stack else "?"

    def _stop(self, why: str) -> None:
        if self._end.is_set():  # the run has ended meanwhile
            return
        print(f"longnet: rank {self._rank} stops: {why}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # the main thread waits in a collective, which no exception reaches


def _culprits(before: list[_Beat], now: list[_Beat], seconds: float) -> str:
    """Say, from beats of all ranks half of `seconds` ago and now, which ranks do not go on."""
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if old.beats == new.beats]
    if silent:
        return f"{_named(silent)} not answered for {seconds / 2:g} s or more: stopped, or its machine is lost"
    fewest = min(beat.marks for beat in now)
    behind = [rank for rank, beat in enumerate(now) if beat.marks == fewest]
    places = ", ".join(f"rank {rank} at {now[rank].place}" for rank in behind)
    if len(behind) < len(now):
        return f"{_named(behind)} not gone on for {seconds:g} s: {places}"
    return f"no rank has gone on for {seconds:g} s: {places}"


def _named(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"
