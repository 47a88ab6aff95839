"""One sequence of any length, read from files in constant memory: its loss, token by token, by position.

It measures a model on data, as its neighbours here do; the state that makes it possible is `longnet.model.cache`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from longnet.model import DilatedCache
from longnet.model.versions import CACHE

_BLOCK_BYTES = 2**20  # of text, cut at a line's end, that go through a tokenizer at a time
_BLOCK_LOGITS = 2**19  # held at a time: 2 MiB in float32, which stay in cache
PEAK_AT = 2**24  # tokens after which the peak memory is noted, to be compared with that at the end


@dataclass
class Cursor:
    """Where reading goes on: a file, a place in it in bytes, and tokens to skip from there."""

    file: int = 0
    offset: int = 0
    skip: int = 0


Ids = np.ndarray[Any, np.dtype[np.int64]]


class Source(Protocol):
    """Tokens of a list of files, one after the other; `tokens` of them, if that is known before they are read."""

    files: list[Path]
    sizes: list[int]
    fingerprint: str
    tokens: int | None

    def read(self, cursor: Cursor, tokens: int) -> tuple[Ids, Cursor]:
        """Return the next tokens, fewer only at the end, and where to go on."""


class ByteSource:
    """Bytes as they lie; a token is a byte."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = list_files(paths)
        self.sizes = [path.stat().st_size for path in self.files]
        self.fingerprint = _fingerprint(self.files, self.sizes, "bytes")
        self.tokens: int | None = sum(self.sizes)

    def read(self, cursor: Cursor, tokens: int) -> tuple[Ids, Cursor]:
        """Return the next bytes as tokens, fewer only at the end, and where to go on."""
        parts: list[bytes] = []
        file, offset = cursor.file, cursor.offset
        while tokens and file < len(self.files):
            with self.files[file].open("rb") as opened:
                opened.seek(offset)
                parts.append(opened.read(min(tokens, self.sizes[file] - offset)))
            tokens, offset = tokens - len(parts[-1]), offset + len(parts[-1])
            if offset >= self.sizes[file] or not parts[-1]:
                file, offset = file + 1, 0
        return np.frombuffer(b"".join(parts), np.uint8).astype(np.int64), Cursor(file, offset)


class TokenSource:
    """Text through a tokenizer, a mebibyte at a time, cut where a line ends; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
        self.files, self._tokenizer = list_files(paths), tokenizer
        self.sizes = [path.stat().st_size for path in self.files]
        self.fingerprint = _fingerprint(self.files, self.sizes, tokenizer.to_str())
        self.tokens: int | None = None
        self._held: tuple[tuple[int, int], list[int], int] = ((-1, 0), [], 0)

    def read(self, cursor: Cursor, tokens: int) -> tuple[Ids, Cursor]:
        """Return the next tokens, fewer only at the end, and where to go on."""
        parts: list[int] = []
        file, offset, skip = cursor.file, cursor.offset, cursor.skip
        while len(parts) < tokens and file < len(self.files):
            ids, size = self._block(file, offset)
            taken = ids[skip : skip + tokens - len(parts)]
            parts, skip = parts + taken, skip + len(taken)
            if skip == len(ids):
                offset, skip = offset + size, 0
                if offset >= self.sizes[file] or not size:
                    file, offset = file + 1, 0
        return np.asarray(parts, np.int64), Cursor(file, offset, skip)

    def _block(self, file: int, offset: int) -> tuple[list[int], int]:
        if self._held[0] != (file, offset):
            with self.files[file].open("rb") as opened:
                opened.seek(offset)
                data = opened.read(_BLOCK_BYTES)
            if offset + len(data) < self.sizes[file]:
                data = data[: data.rfind(b"\n") + 1] or data
            ids = self._tokenizer.encode(data.decode(errors="replace"), add_special_tokens=False).ids
            self._held = (file, offset), ids, len(data)
        return self._held[1], self._held[2]


def open_source(paths: Sequence[Path], tokenizer: str | None, model_folder: Path, vocab_size: int) -> Source:
    """Choose how files become tokens.

    Args:
        paths: files, and folders whose files are taken, recursively, in the order of their paths.
        tokenizer: "bytes", or a tokenizer.json or a folder with one; that of the model when None, and bytes where it
            has none and knows at most 320 tokens.
        model_folder: of the model.
        vocab_size: tokens that the model knows.

    Raises:
        ValueError: no tokenizer, or one with more tokens than the model.
        OSError: a path that does not exist, or no file at all.
    """
    place = model_folder if tokenizer is None else Path(tokenizer)
    file = place / "tokenizer.json" if place.is_dir() else place
    if tokenizer == "bytes" or (tokenizer is None and not file.is_file() and vocab_size <= 320):
        if vocab_size < 256:
            raise ValueError(f"the model knows {vocab_size} tokens, which are fewer than bytes: give --tokenizer")
        return ByteSource(paths)
    if not file.is_file():
        raise ValueError(f"there is no tokenizer at {file}: give --tokenizer, a tokenizer.json, its folder, or bytes")
    loaded = Tokenizer.from_file(str(file))
    if loaded.get_vocab_size() > vocab_size:
        raise ValueError(f"the tokenizer has {loaded.get_vocab_size()} tokens, the model knows {vocab_size}")
    if vocab_size >= 256 and loaded.encode(_SAMPLE, add_special_tokens=False).ids == list(_SAMPLE.encode()):
        return ByteSource(paths)
    return TokenSource(paths, loaded)


_SAMPLE = "".join(map(chr, range(128))) + "ÀÉïöß€中😀"  # a tokenizer that gives its bytes gives bytes


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, those of folders recursively in the order of their paths; links are not followed.

    Raises:
        OSError: a path that does not exist, or no file at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file {path}")
    if not files:
        raise FileNotFoundError(f"no file in {', '.join(map(str, paths))}")
    return files


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
    source: Source,
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
        tokens: read so many; all when None.
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
    output.mkdir(parents=True, exist_ok=True)
    saved_at = sums.tokens
    limit = source.tokens if tokens is None else tokens
    is_last = False
    while not is_last and (limit is None or sums.tokens < limit):
        began, cpu_began = time.perf_counter(), time.process_time()
        held = 0 if pending is None else 1
        wanted = chunk + 1 - held if limit is None else min(chunk + 1, limit - sums.tokens) - held
        new, cursor = source.read(cursor, wanted)
        ids = new if pending is None else np.concatenate([[pending], new])
        is_last = len(ids) <= chunk
        if not len(ids):
            break
        fed = ids if is_last else ids[:-1]
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
    partial = state.with_suffix(".partial")
    with partial.open("w") as opened:
        json.dump(about, opened)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(state)
    for other in state.parent.glob("cache-*.safetensors*"):
        if other != file:
            other.unlink()


def _load(state: Path, key: dict[str, Any], model: Any) -> tuple[Sums, Cursor, int | None, DilatedCache]:
    about = json.loads(state.read_text())
    changed = [name for name, value in key.items() if about["key"].get(name) != value]
    if changed:
        raise ValueError(f"{state} is of another {' and '.join(changed)}: give them as before, or another folder")
    cache = DilatedCache.load(state.with_name(about["cache"]), model.config, device=next(model.parameters()).device)
    return Sums(**about["sums"]), Cursor(**about["cursor"]), about["pending"], cache


def _fingerprint(files: Sequence[Path], sizes: Sequence[int], way: str) -> str:
    digest = hashlib.sha256(way.encode())
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path}\0{size}\0".encode())
    return digest.hexdigest()


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
