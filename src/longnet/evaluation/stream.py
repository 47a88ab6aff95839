"""One sequence of any length, read from files in constant memory: its loss, token by token, by position.

It measures a model on data, as its neighbours here do; the state that makes it possible is `longnet.model.cache`.
"""

from __future__ import annotations

import hashlib
import math
import re
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from longnet.data.corpus import list_corpus
from longnet.data.documents import PLAIN, Reading
from longnet.data.encoding import make_encoder
from longnet.data.reading import Cursor, TokenStream
from longnet.data.shards import sha256
from longnet.data.tokenizer import load_tokenizer
from longnet.data.writer import read_state, write_state
from longnet.evaluation.scoring import refuse_more_positions
from longnet.model import DilatedCache
from longnet.model.versions import CACHE
from longnet.tensors import first_line

_BLOCK_LOGITS = 2**19  # held at a time: 2 MiB in float32, which stay in cache
PEAK_AT = 2**24  # tokens after which the peak memory is noted, to be compared with that at the end


Ids = np.ndarray[Any, np.dtype[np.int64]]


def open_source(
    paths: Sequence[Path | str],
    tokenizer: str | None,
    model_folder: Path,
    vocab_size: int,
    *,
    reading: Reading = PLAIN,
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> TokenStream:
    """Choose how files become tokens: those that `longnet prepare` makes of them, a document's end token among them.

    Args:
        paths: as `longnet prepare` takes them.
        tokenizer: as `longnet prepare` takes it; that of the model when None, and bytes where it has none and knows at
            most 320 tokens.
        model_folder: of the model.
        vocab_size: tokens that the model knows. Where the end token is none of them, no token ends a document.
        reading: how files become documents.
        suffixes: of the files of folders that are taken.
        exclude: patterns of those that are not.

    Raises:
        ValueError: no tokenizer, or one with more tokens than the model; no text.
        OSError: a path that does not exist.
    """
    if tokenizer is None:
        if not (model_folder / "tokenizer.json").is_file() and vocab_size > 320:
            raise ValueError(
                f"there is no tokenizer at {model_folder}: give --tokenizer, a tokenizer.json, its folder, or bytes"
            )
        tokenizer = str(model_folder) if (model_folder / "tokenizer.json").is_file() else "bytes"
    loaded = load_tokenizer(tokenizer)
    known = max(index for token, index in loaded.get_vocab().items() if token != loaded.eos_token) + 1
    if known > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer} has {known:,} tokens, the model knows {vocab_size:,}: give another"
        )
    corpus = list_corpus([str(path) for path in paths], suffixes=suffixes, exclude=exclude)
    return TokenStream(corpus, reading, make_encoder(loaded, end=loaded.eos_token_id < vocab_size))


@dataclass
class Sums:
    """What a stream adds up: it is all that is needed to go on, beside the cache.

    Attributes:
        tokens: read and fed to the model.
        bins: per doubling bin of the position of the token that predicts, [predictions, loss, squared loss].
        seconds: of work, saving excluded.
        peak_bytes: most memory that the process has held.
        peak_bytes_early: the same after 2²⁴ tokens.
    """

    tokens: int = 0
    bins: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    peak_bytes_early: int | None = None

    def add(self, position: int, losses: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Add the losses of predictions made at `position` and after."""
        stop = position + len(losses)
        while position < stop:
            index = position.bit_length()  # bin 0 is position 0, bin n is 2^(n − 1) … 2^n − 1
            while len(self.bins) <= index:
                self.bins.append([0, 0.0, 0.0])
            part, losses = np.split(losses, [min(stop, 1 << index) - position])
            total = self.bins[index]
            total[0], total[1] = total[0] + len(part), total[1] + float(part.sum())
            total[2] += float((part * part).sum())
            position += len(part)

    @property
    def loss(self) -> float:
        """Nats per token so far."""
        count = sum(part[0] for part in self.bins)
        return sum(part[1] for part in self.bins) / count if count else math.nan

    def by_position(self) -> list[dict[str, float]]:
        """Return loss, its standard error and perplexity of each bin [from, to) of positions."""
        rows = []
        for index, (count, total, squares) in enumerate(self.bins):
            mean = total / count
            error = math.sqrt(max(0.0, squares / count - mean * mean) / count)
            first = 0 if index == 0 else 1 << (index - 1)
            rows.append({
                "from": first, "to": first + int(count), "loss": mean, "standard_error": error,
                "perplexity": math.exp(min(mean, 700.0)),
            })  # fmt: skip
        return rows


@torch.inference_mode()
def stream(
    model: Any,
    source: TokenStream,
    output: Path,
    *,
    chunk: int = 65_536,
    tokens: int | None = None,
    save_every: int = 2**26,
    resume: bool = False,
) -> Iterator[Sums]:
    """Read one sequence, yielding the sums after every chunk; they are saved in `output`, with the cache, now and then.

    Exact: the losses are those of one forward pass over the whole sequence, whatever the chunk.

    Args:
        model: a causal language model of transformers with "dilated" attention.
        source: of the tokens.
        output: folder of the saved state.
        chunk: tokens of one forward pass; memory grows with it, and with nothing else.
        tokens: feed so many; all when None.
        save_every: tokens between two saves, and one is made at the end.
        resume: go on from the state in `output`, if there is one.

    Raises:
        ValueError: a state of another model, source or chunk; a loss that is not finite; a model whose logits are not
            its head's output.
    """
    config = model.config
    key = {"source": source.fingerprint, "model": _model_key(model), "chunk": chunk}
    sums, cursor, pending, cache = Sums(), Cursor(), None, DilatedCache(config)
    state = output / "state.json"
    if resume and state.exists():
        sums, cursor, pending, cache = _load(state, key, model)
    elif not resume and state.exists():
        raise ValueError(f"{output} holds a state: go on with --resume, or give another folder")
    _check_head(model)
    saved_at = sums.tokens
    limit = tokens
    is_last = False
    while not is_last and (limit is None or sums.tokens < limit):
        began, cpu_began = time.perf_counter(), time.process_time()
        held = 0 if pending is None else 1
        wanted = chunk if limit is None else min(chunk, limit - sums.tokens)
        new, cursor = source.read(cursor, wanted + 1 - held)  # one more, which the last one predicts
        ids = new if pending is None else np.concatenate([[pending], new])
        is_last = len(ids) <= wanted
        if not len(ids):
            break
        if is_last and not sums.tokens and len(ids) == 1:
            raise ValueError("there is one token, and none after it to predict: give more text")
        fed = ids if is_last else ids[:-1]
        refuse_more_positions(model, sums.tokens + len(fed))
        output.mkdir(parents=True, exist_ok=True)  # a wrong folder shows before the work, not after
        losses = _losses(model, cache, fed, ids[1:])
        if not np.isfinite(losses).all():
            place = sums.tokens + int(np.flatnonzero(~np.isfinite(losses))[0])
            raise ValueError(f"the loss is not finite at token {place:,}")
        sums.add(sums.tokens, losses)
        pending = None if is_last else int(ids[-1])
        passed = sums.tokens
        sums.tokens += len(fed)
        sums.seconds += time.perf_counter() - began
        sums.cpu_seconds += time.process_time() - cpu_began
        sums.peak_bytes = max(sums.peak_bytes, peak_bytes())
        if passed < PEAK_AT <= sums.tokens:
            sums.peak_bytes_early = sums.peak_bytes
        is_last = is_last or sums.tokens == limit
        if is_last or sums.tokens - saved_at >= save_every:
            _save(state, key, sums, cursor, pending, cache)
            saved_at = sums.tokens
        yield sums


def _losses(model: Any, cache: DilatedCache, ids: Ids, targets: Ids) -> np.ndarray[Any, np.dtype[np.float64]]:
    device = next(model.parameters()).device
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inputs = torch.from_numpy(ids)[None].to(device)
    hidden: Tensor = decoder(input_ids=inputs, use_cache=True, **{CACHE: cache}).last_hidden_state[0]
    wanted = torch.from_numpy(targets).to(device)
    losses = []
    rows = max(1, _BLOCK_LOGITS // head.weight.shape[0])
    for states, answers in zip(torch.split(hidden[: len(targets)], rows), torch.split(wanted, rows), strict=True):
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(functional.cross_entropy(logits, answers, reduction="none"))
    if not losses:
        return np.zeros(0)
    return torch.cat(losses).cpu().numpy().astype(np.float64)


def _check_head(model: Any) -> None:
    ids = torch.arange(16, device=next(model.parameters()).device)[None] % model.config.vocab_size
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} does more than its head to get logits; such models cannot be streamed"
        )


def _model_key(model: Any) -> str:
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {parameter.double().sum().item()!r}".encode())
    return digest.hexdigest()


def _save(
    state: Path, key: dict[str, Any], sums: Sums, cursor: Cursor, pending: int | None, cache: DilatedCache
) -> None:
    # The cache first, under a name of its own; what names it is replaced in one step. Killed anywhere, one whole pair
    # is left.
    file = state.with_name(f"cache-{sums.tokens}.safetensors")
    cache.save(file)
    about = {"key": key, "sums": asdict(sums), "cursor": asdict(cursor), "pending": pending, "cache": file.name}
    write_state({**about, "sha256": sha256(file)}, state)
    for other in state.parent.glob("cache-*.safetensors*"):
        if other != file:
            other.unlink()


def _load(state: Path, key: dict[str, Any], model: Any) -> tuple[Sums, Cursor, int | None, DilatedCache]:
    try:
        about = read_state(state)
        changed = [name for name, value in key.items() if about["key"].get(name) != value]
        file = state.with_name(about["cache"])
        if not file.is_file() or about.get("sha256") not in (None, sha256(file)):
            raise ValueError(f"{file} is missing or damaged")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{state} cannot be gone on from ({first_line(error)}): begin anew with another folder, or remove it"
        ) from error
    if changed:
        raise ValueError(
            f"{state} is of another {' and '.join(changed)}: give them as before, files unchanged, or another folder"
        )
    cache = DilatedCache.load(file, model.config, device=next(model.parameters()).device)
    return Sums(**about["sums"]), Cursor(**about["cursor"]), about["pending"], cache


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
