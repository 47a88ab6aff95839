"""The entry point of `longnet`: what becomes of mistakes, of faults and of Ctrl-C.

Importing this imports next to nothing, so that Ctrl-C in the first second is caught here, too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from types import FrameType

_STOPPED = "longnet: stopped by Ctrl-C"


def main() -> None:
    """Run the command line.

    A mistake of the user's, which our own code raises or the operating system reports, is one line on stderr and exit
    status 2, as is too little memory; Ctrl-C one line and 130. Anything else is a fault of ours, and shows where it
    happened. A warning is one line, too.
    """
    formatwarning = warnings.formatwarning
    warnings.formatwarning = _in_a_line
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from longnet.cli import commands

        try:
            commands.run(sys.argv[1:])
        except (ValueError, TypeError, OSError) as error:
            if not commands.is_users_mistake(error):
                raise
            print(f"longnet: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            if not commands.is_out_of_memory(error):
                raise
            print(
                "longnet: out of memory: give fewer tokens at a time (--batch-tokens, --batch-tiles, --chunk, "
                "--tokens, train.accumulate), a smaller model, or a larger machine",
                file=sys.stderr,
            )
            sys.exit(2)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        sys.exit(130)
    finally:
        warnings.formatwarning = formatwarning
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return what is shown of a warning; where in the code it arose is of use to those who mend libraries alone."""
    where = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    return f"longnet: warning: {message}{where}\n"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Take Ctrl-C: while something is imported, end at once, since libraries catch whatever is raised there.

    Half a module is left behind then, or none of it, and what is told is an ImportError of a stranger's.
    """
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{_STOPPED}\n".encode())
            os._exit(130)
        at = at.f_back
    signal.default_int_handler(number, frame)
