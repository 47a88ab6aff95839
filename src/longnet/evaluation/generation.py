"""Text from a model, as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from longnet.data.unknown import refuse_lost
from longnet.evaluation.scoring import refuse_more_positions

_COLDEST = 1e-6  # below, the likeliest token is drawn in any case, until logits divided by it overflow
_PREFILL = 8192  # tokens of the prompt that go forward at a time, so that memory does not grow with the prompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        tokens: new ones, at most; the tokenizer's end token ends earlier.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens; None for all.
        top_p: sample among the likeliest tokens that together have this probability; None for all.
        seed: of the random numbers; those of the caller are left as they were.
    """

    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.temperature != 0 and not _COLDEST <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (the likeliest token), or {_COLDEST} or more, got {self.temperature}"
            )
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            given = "top_k" if self.top_k is not None else "top_p"
            raise ValueError(f"{given} chooses among tokens, and temperature 0 takes the likeliest: give one of them")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2^63, got {self.seed}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    file: TextIO | None = None,
    echo: bool = False,
) -> str:
    """Continue a prompt; return the new text, which `file` receives while it comes.

    Args:
        model: a causal language model; its mode (training or not) is left as it was.
        tokenizer: the model's.
        prompt: text to continue; where it is empty, a document begins.
        sampling: how.
        file: where to write whole characters as soon as they are known, flushed.
        echo: write the prompt there first, once nothing is wrong with it.

    Raises:
        ValueError: an empty prompt, and a tokenizer without end token; a prompt that the tokenizer would leave a
            character out of.
    """
    refuse_lost(tokenizer, prompt, "the prompt")
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        if tokenizer.eos_token_id is None:
            raise ValueError("the prompt is empty, and the tokenizer has no end token to begin with: give a prompt")
        ids = [tokenizer.eos_token_id]  # it ends the document before
    refuse_more_positions(model, len(ids) + sampling.tokens - 1)
    if echo and file is not None:
        file.write(prompt)
        file.flush()
    input_ids = torch.tensor([ids], device=model.device)
    text = StreamedText(tokenizer, file)
    ends = {} if tokenizer.eos_token_id is None else {"eos_token_id": tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=text,
                max_new_tokens=sampling.tokens,
                pad_token_id=pad,
                **ends,
                **_choice(sampling),
            )
    finally:
        model.train(was_training)
    return text.text


class StreamedText(BaseStreamer):
    """Decodes tokens one by one; characters that several tokens make up wait until they are whole.

    transformers' TextStreamer waits for whole words and prints; this one gives every character as soon as it is known.

    Args:
        tokenizer: what decodes; special tokens are left out.
        file: receives the text, flushed; None to keep it only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None) -> None:
        self.text = ""
        self._tokenizer, self._file = tokenizer, file
        self._is_prompt = True
        # Tokens before `_told` are in the text. Those from `_kept` on are decoded again with the next ones: what a
        # token reads as may depend on the one before.
        self._ids: list[int] = []
        self._kept = self._told = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, the first time, or the next token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        if not self._decode(self._kept, None).endswith("�"):
            self._tell()

    def end(self) -> None:
        """Tell what was waiting."""
        self._tell()

    def _tell(self) -> None:
        new = self._decode(self._kept, None)[len(self._decode(self._kept, self._told)) :]
        if new:
            self._kept, self._told = self._told, len(self._ids)
        self.text += new
        if self._file is not None:
            self._file.write(new)
            self._file.flush()

    def _decode(self, start: int, stop: int | None) -> str:
        text = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _choice(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": 0 if sampling.top_k is None else sampling.top_k,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
    }
