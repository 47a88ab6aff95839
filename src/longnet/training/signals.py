"""Signals that end a run where it can be continued."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

_TOGETHER = 0.5  # seconds


class Stop:
    """Takes note of SIGINT and SIGTERM while it is entered; a second request has its usual effect.

    One request may come in several ways: from the terminal and from torchrun, from a job's scheduler, which tells every
    process, and from the process that began this one. What comes within half a second of the first is the same.

    Attributes:
        signal: the one that came, None so far.
    """

    signal: signal.Signals | None = None

    def __enter__(self) -> Stop:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() > self._since + _TOGETHER:
            self.__exit__()
            signal.raise_signal(number)
