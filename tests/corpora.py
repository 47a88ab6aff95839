"""Small folders of token data."""

import random
from pathlib import Path

import numpy as np

from longnet.data.tokenizer import load_tokenizer, token_bytes
from longnet.data.writer import DataWriter

WORDS = ["segment", "rate", "branch", "token", "key", "query", "\n"]


def write_words(folder: Path) -> Path:
    """Write byte tokens of words that repeat, so that there is something to learn; return the folder."""
    tokenizer = load_tokenizer("bytes")
    rng = random.Random(0)
    with DataWriter(folder, tokenizer, token_bytes(tokenizer)) as writer:
        for name, documents in (("train", 20), ("validation", 6)):
            for _ in range(documents):
                text = " ".join(rng.choice(WORDS) for _ in range(120)).encode()
                ids = np.array([*text, tokenizer.eos_token_id], dtype=np.uint16)
                writer.splits[name].append(ids, ends=[len(ids)], text_bytes=len(text))
        writer.finish(provenance={"made by": "a test"})
    return folder
