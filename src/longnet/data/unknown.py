"""Text that a tokenizer has no token for.

Without an unknown token a BPE model leaves it out and says nothing, and others raise what does not say where.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_LOST = "\U0010ffff\U0010fffelost"  # begins with what is no character, so that no text holds it
_SHOWN = 40  # characters of a word, at most


class Lost(NamedTuple):
    """What would be left out.

    Attributes:
        text: a character, or the word that it is in.
        offset: characters before it.
    """

    text: str
    offset: int


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that stands for what a model has no token for; None where it has no such one."""
    from tokenizers import models

    model = tokenizer.model
    if isinstance(model, models.Unigram):
        found: int | None = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return found
    name = getattr(model, "unk_token", None)
    return None if name is None else model.token_to_id(name)


def watched(tokenizer: Tokenizer) -> tuple[Tokenizer, npt.NDArray[np.int64] | None]:
    """Return a tokenizer that notices what another one would leave out, and the other one's id for each of its ids.

    That is -1 for what would be left out. The same tokenizer, and None, where that is nothing.
    """
    if unknown_id(tokenizer) is not None or _knows_bytes(tokenizer):
        return tokenizer, None
    saved = json.loads(tokenizer.to_str())
    model = saved["model"]
    if isinstance(model["vocab"], list):
        model["unk_id"] = len(model["vocab"])
        model["vocab"].append([_LOST, 0.0])
    else:
        model["unk_token"] = _LOST
        model["vocab"][_LOST] = 1 + max(model["vocab"].values(), default=-1)
    watching = type(tokenizer).from_str(json.dumps(saved))  # gives added tokens other ids
    watching.encode_special_tokens = tokenizer.encode_special_tokens
    watching.no_truncation()
    watching.no_padding()
    theirs = tokenizer.get_vocab()
    ids = np.full(1 + max(watching.get_vocab().values()), -1, dtype=np.int64)
    for token, index in watching.get_vocab().items():
        ids[index] = theirs.get(token, -1)
    return watching, ids


def find_lost(watching: Tokenizer, ids: npt.NDArray[np.int64] | None, text: str) -> Lost | None:
    """Return what comes first in a text of what would be left out of it; takes what `watched` returns."""
    if ids is None:
        return None
    encoding = watching.encode(text, add_special_tokens=False)
    for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        if ids[index] < 0:
            return Lost(text[start:stop], start)
    return None


def refuse_lost(tokenizer: PreTrainedTokenizerBase, text: str, what: str) -> None:
    """Raise ValueError, naming `what` the text is, where a tokenizer would leave a character of it out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # those written in Python have unknown tokens, all of them
    lost = None if backend is None else find_lost(*watched(backend), text)
    if lost is not None:
        raise ValueError(complaint(lost, what))


def complaint(lost: Lost, what: str) -> str:
    """Return the line that says what of which text would be lost, and what to do."""
    code = f" (U+{ord(lost.text):04X})" if len(lost.text) == 1 else ""
    return (
        f"{what}: at character {lost.offset + 1:,} the tokenizer has no token for {lost.text[:_SHOWN]!r}{code}, and "
        "none for unknown text, so that it would be lost: take one that knows every byte or has an unknown token, or "
        "change the text"
    )


def _knows_bytes(tokenizer: Tokenizer) -> bool:
    """Tell a BPE tokenizer that has a token for every byte, and makes bytes of what it does not know."""
    from tokenizers import pre_tokenizers

    model = tokenizer.model
    if getattr(model, "byte_fallback", False):
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    parts = [json.loads(part.__getstate__()) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part]
    if "ByteLevel" not in {kind for part in parts for kind in _types(part)}:
        return False
    ends = getattr(model, "continuing_subword_prefix", None), getattr(model, "end_of_word_suffix", None)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return not any(ends) and all(model.token_to_id(letter) is not None for letter in alphabet)


def _types(part: dict[str, Any]) -> set[str]:
    inner = [*part.get("normalizers", []), *part.get("pretokenizers", [])]
    return {part["type"]}.union(*(_types(other) for other in inner))
