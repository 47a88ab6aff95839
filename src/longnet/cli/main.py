"""The entry point of `longnet`: what becomes of mistakes, of faults and of Ctrl-C.

Importing this imports next to nothing, so that Ctrl-C in the first second is caught here, too.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line.

    A mistake of the user's, which our own code raises or the operating system reports, is one line on stderr and exit
    status 2, as is too little memory; Ctrl-C one line and 130. Anything else is a fault of ours, and shows where it
    happened.
    """
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
                "longnet: out of memory: give fewer tokens at a time (--batch-tokens, --chunk, --tokens, "
                "train.accumulate), a smaller model, or a larger machine",
                file=sys.stderr,
            )
            sys.exit(2)
    except KeyboardInterrupt:
        print("longnet: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
