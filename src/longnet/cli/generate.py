"""`longnet generate`: text from a model, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import cyclopts


def generate(
    model: Path,
    *,
    prompt: str | None = None,
    file: Annotated[Path | None, cyclopts.Parameter(allow_leading_hyphen=True)] = None,
    tokens: Annotated[int, cyclopts.Parameter(("--tokens", "-n"))] = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    attention: str | None = None,
    device: str = "auto",
) -> None:
    """Continue a text; what the model writes goes to the standard output, character by character.

    Args:
        model: Folder of a run of `longnet train`, or of any Hugging Face causal language model with its
            tokenizer.
        prompt: Text to continue; an empty one begins a document.
        file: File that holds the prompt instead; "-" is the standard input.
        tokens: New tokens, at most; the end of the document ends earlier.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest token.
        top_k: Draw among so many likeliest tokens.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Of the draws: the same seed gives the same text.
        attention: Another attention than the model's: "dilated", "sdpa", "sparse_fixed", ….
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
    """
    from longnet.evaluation.generation import Sampling, generate_text

    if (prompt is None) == (file is None):
        raise ValueError('give --prompt TEXT or --file FILE ("-" for the standard input), one of them')
    sampling = Sampling(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    from longnet.cli.model import load_model
    from longnet.data.tokenizer import open_tokenizer
    from longnet.measurement import take_device

    text = prompt if prompt is not None else _read(file)
    loaded = load_model(model, take_device(device, option="--device"), attention)
    tokenizer = open_tokenizer(loaded.folder)
    generate_text(loaded.model, tokenizer, text, sampling, file=sys.stdout, echo=True)
    print()


def _read(file: Path | None) -> str:
    """Return a prompt as it lies in the file, line ends and all."""
    if file is None or str(file) == "-":
        name, content = "the standard input", sys.stdin.buffer.read()
    elif not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: give --file FILE, or --prompt TEXT")
    else:
        name, content = str(file), file.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start:,} ({error.reason}): recode it, or cut it between two characters"
        ) from error
