"""Signals that end a run where it can be continued."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stop:
    """Takes note of SIGINT and SIGTERM while it is entered; the second one has its usual effect.

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
        self.signal = signal.Signals(number)
        self.__exit__()
