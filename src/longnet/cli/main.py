"""The `longnet` command. A mistake of the user's is one line on stderr and exit status 2.

A command lives in a module of its name, which is imported when the command, or help, is asked for; what it needs of
torch and transformers it imports when it runs.
"""

from __future__ import annotations

import sys

import cyclopts

app = cyclopts.App(name="longnet", help="LongNet: dilated attention for very long sequences (arXiv:2307.02486).")
app.command("longnet.cli.show:show", help="Print what a pattern costs, reaches and keeps; draw it.")
app.command("longnet.cli.prepare:prepare", help="Turn text into token shards for training, with a validation split.")
app.command("longnet.cli.train:app", name="train", help="Train a model from a recipe; resume a run to the same bits.")
app.command("longnet.cli.evaluate:evaluate", help="Perplexity by context length and position; pass keys by distance.")
app.command("longnet.cli.generate:generate", help="Continue a text.")
app.command(
    "longnet.cli.compare:app", name="compare", help="Train one model with three attentions; report the paper's Table 2."
)
app.command("longnet.cli.info:info", help="What a recipe, a model or a data folder is, and needs.")
app.command("longnet.cli.stream:stream", help="Read files as one sequence of any length, in constant memory.")
app.command("longnet.cli.bench:app", name="bench", help="Measure, each figure behind a check that the result is right.")


def main() -> None:
    """Run the command line; the entry point of `longnet`."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except (cyclopts.CycloptsError, ValueError, OSError) as error:
        print(f"longnet: {error}", file=sys.stderr)
        sys.exit(2)
