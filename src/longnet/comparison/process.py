"""A process for one piece of work: it ends with its parent, and is told once when the parent is told to stop."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Stop:
    """While entered, takes SIGINT and SIGTERM and passes them on as one SIGTERM to the process at work.

    Attributes:
        is_asked: one has come.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._process: Any = None

    def __enter__(self) -> Self:
        """Begin to handle the signals."""
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, work: Callable[..., int], *arguments: Any) -> int:
        """Run `work`, a function of a module, in a fresh process; return what it returns, below 0 for a signal."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])  # torch and transformers are imported once, not by each
        self._process = context.Process(target=_run, args=(work, arguments))
        self._process.start()
        ended = _handle_of(self._process.pid)
        self._process.join()
        if ended is not None:  # a signal to all processes ends the forkserver, which alone tells `join` of an end
            multiprocessing.connection.wait([ended])
            os.close(ended)
        return int(self._process.exitcode)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.is_asked and self._process is not None and self._process.is_alive():
            self._process.terminate()
        self.is_asked = True


def _handle_of(pid: int) -> int | None:
    """Return a file descriptor that can be read once a process has ended; None where it has, or the system has none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _run(work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent, which tells this process once; the session, and its priority, is one
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    raise SystemExit(work(*arguments))


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)  # whatever instant this is, the newest checkpoint is whole
