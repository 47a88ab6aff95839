"""Documents → tokens → the shards of two splits, with a state on the disk from which another process goes on."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import functools
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longnet.data.content import InputError
from longnet.data.corpus import Corpus, describe
from longnet.data.documents import Reading
from longnet.data.duplicates import Duplicates
from longnet.data.encoding import Encoded, encode_in_order, make_encoder
from longnet.data.reading import Batch, iterate_batches
from longnet.data.shards import SPLITS
from longnet.data.tokenizer import check_vocabulary, load_tokenizer, token_bytes, train_bpe
from longnet.data.writer import DamagedWorkError, DataWriter, read_state, save_tokenizer, write_state

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerFast

STATE = "state.json"
_SAVE_SECONDS = 5.0
_WORTH_PROCESSES = 2**23  # bytes, below which starting processes takes longer than they save


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the contents of a folder of data; docs/data.md says what each option does.

    Raises ValueError for a value that is out of range.
    """

    sources: tuple[str, ...]
    tokenizer: str = "bytes"
    train_bpe: int | None = None
    text_field: str = "text"
    suffixes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    validation: float = 0.05
    split_by: Literal["document", "folder"] = "document"
    drop_duplicates: bool = False
    shard_tokens: int = 2**26
    skip_damaged: bool = False
    fasta_case: Literal["keep", "upper", "lower"] = "keep"
    fasta_n: Literal["keep", "drop"] = "keep"

    @property
    def reading(self) -> Reading:
        """How files become documents."""
        return Reading(self.text_field, self.split_by == "folder", self.skip_damaged, self.fasta_case, self.fasta_n)

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"--validation is a share, 0 or more and below 1, got {self.validation}")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens must be at least 1, got {self.shard_tokens}")
        if self.train_bpe is not None:
            if self.tokenizer != "bytes":
                raise ValueError(f"--train-bpe makes a tokenizer of its own: leave --tokenizer {self.tokenizer} away")
            check_vocabulary(self.train_bpe)


@dataclasses.dataclass
class _State:
    """What it takes to go on; everything else is in files, which are cut to the lengths that this knows.

    A unit is what goes to one split as a whole, a document or a folder; its number, 0 to 1, says to which.
    """

    identity: dict[str, Any]
    date: str
    cursor: list[int] = dataclasses.field(default_factory=lambda: [0, 0])  # file, items of it that are done
    position: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    duplicates: int = 0
    replaced: int = 0
    unknown: int = 0
    lowest: list[Any] | None = None  # number and name of the unit whose number is lowest
    highest: list[Any] | None = None
    forced: dict[str, str] = dataclasses.field(default_factory=dict)  # a unit to a split that would else be empty
    trained: bool = False
    compared: int = 0
    writer: dict[str, Any] | None = None


def load_state(work: Path) -> dict[str, Any]:
    """Return the state of unfinished work; FileNotFoundError where there is none, DamagedWorkError for a wrong one."""
    try:
        state = read_state(work / STATE)
    except ValueError as error:
        raise DamagedWorkError(str(error)) from error
    if not isinstance(state.get("identity"), dict):
        raise DamagedWorkError(f"{work / STATE} is damaged")
    return state


def assemble(
    options: Options,
    corpus: Corpus,
    work: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    workers: int,
    progress: bool,
) -> None:
    """Leave a whole folder of data in `work`, going on from the state there; without a tokenizer train one first."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        while True:
            assembly = _Assembly(options, corpus, work, bar)
            if assembly.run(tokenizer or assembly.train_tokenizer(options.train_bpe or 0), workers):
                return


class _Assembly:
    def __init__(self, options: Options, corpus: Corpus, work: Path, bar: Progress) -> None:
        self._options, self._corpus, self._work, self._bar = options, corpus, work, bar
        saved = load_state(work)
        try:
            self._state = _State(**{"date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), **saved})
        except TypeError as error:
            raise DamagedWorkError(f"{work / STATE} is not of this version of longnet") from error

    def train_tokenizer(self, size: int) -> PreTrainedTokenizerFast:
        """Train a vocabulary on the train split, or load the one that was trained before the stop."""
        folder = self._work / "trained"
        if not self._state.trained:
            save_tokenizer(train_bpe(self._training_text(), size), folder)
            # Without the units that it has seen: duplicates were among them.
            self._state = _State(self._state.identity, self._state.date, forced=self._state.forced, trained=True)
            self._save()
        return load_tokenizer(folder)

    def run(self, tokenizer: PreTrainedTokenizerFast, workers: int) -> bool:
        """Write and finish both splits, or return False: one stayed empty, and the state now says to begin again."""
        options, state = self._options, self._state
        sizes = token_bytes(tokenizer)
        encoder = make_encoder(tokenizer, compare=options.drop_duplicates)
        worth = (options.drop_duplicates or encoder.tokenizer is not None) and (
            self._total is None or self._total > _WORTH_PROCESSES
        )
        task = self._bar.add_task("tokens", total=self._total, completed=state.position)

        def open_writer() -> DataWriter:
            return DataWriter(self._work, tokenizer, sizes, shard_tokens=options.shard_tokens, state=state.writer)

        try:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(open_writer())
                seen = stack.enter_context(Duplicates(self._work, state.compared)) if options.drop_duplicates else None
                saved = time.monotonic()
                encoded = stack.enter_context(
                    contextlib.closing(encode_in_order(self._batches(), encoder, workers if worth else 1))
                )
                for batch, tokens in encoded:
                    shards = writer.shards
                    self._write(batch, tokens, writer, seen)
                    self._bar.update(task, completed=state.position)
                    if writer.shards > shards or time.monotonic() - saved > _SAVE_SECONDS:
                        self._save(writer, seen)
                        saved = time.monotonic()
                self._save(writer, seen)
                if self._forced(writer):
                    return False
                writer.finish(self._provenance())
        except OSError:
            with contextlib.suppress(OSError):
                open_writer().close()  # cuts the files to what the saved state knows: a full disk has room again
            raise
        finally:
            self._bar.remove_task(task)
        return True

    @property
    def _total(self) -> int | None:
        return None if any(file.kind == "hub" for file in self._corpus.files) else self._corpus.size

    def _batches(self) -> Iterator[Batch]:
        return iterate_batches(self._corpus, self._options.reading, self._state.cursor)

    def _write(self, batch: Batch, encoded: Encoded, writer: DataWriter, seen: Duplicates | None) -> None:
        if encoded.lost is not None:
            raise InputError(encoded.lost)
        state = self._state
        parts: dict[str, list[Any]] = {name: [] for name in SPLITS}
        ends: dict[str, list[int]] = {name: [] for name in SPLITS}
        lengths = dict.fromkeys(SPLITS, 0)
        start = 0
        for piece, count, compared in zip(batch.pieces, encoded.counts, encoded.compared, strict=True):
            stop = start + count
            if seen is not None and compared is not None and seen.add(*compared):
                state.duplicates += 1
            else:
                name = self._split(piece.unit)
                parts[name].append(encoded.tokens[start:stop])
                lengths[name] += count
                if piece.ends:
                    ends[name].append(lengths[name])
            start = stop
        for name, split in writer.splits.items():
            if parts[name]:
                tokens = np.concatenate(parts[name])
                split.append(tokens, ends[name], int(writer.token_bytes[tokens].sum(dtype=np.int64)))
        state.cursor, state.position = batch.cursor, batch.position
        state.replaced += encoded.replaced
        state.unknown += encoded.unknown
        state.skipped = dict(batch.skipped + collections.Counter(state.skipped))

    def _split(self, unit: str) -> str:
        """Return the split of a unit, noting the units with the lowest and the highest number."""
        number, state = _number(unit), self._state
        found = [number, unit]
        state.lowest, state.highest = min(state.lowest or found, found), max(state.highest or found, found)
        return state.forced.get(unit, "validation" if number < self._options.validation else "train")

    def _forced(self, writer: DataWriter) -> bool:
        """Return whether a split is empty that need not be; the state then begins anew, a unit forced into it."""
        state, options = self._state, self._options
        if state.lowest is None or state.highest is None:
            left_out = self._corpus.skipped + collections.Counter(state.skipped)
            raise InputError(f"no text in {' '.join(options.sources)}{describe(left_out)}: give other paths")
        if sum(split.tokens for split in writer.splits.values()) == writer.documents:
            raise InputError(
                f"the tokenizer {options.tokenizer} makes no token of any text in {' '.join(options.sources)}: "
                "give another one"
            )
        if not options.validation or all(split.tokens for split in writer.splits.values()):
            return False
        if state.lowest[1] == state.highest[1]:
            whole = "lies in one folder" if options.split_by == "folder" and writer.documents > 1 else "is one document"
            raise InputError(
                f"the corpus {whole}, {state.lowest[1]!r}: a validation split needs a second one; give more text, "
                f"--split-by document, or --validation 0"
            )
        empty = next(name for name, split in writer.splits.items() if not split.tokens)
        unit = (state.lowest if empty == "validation" else state.highest)[1]
        self._state = _State(state.identity, state.date, forced={unit: empty})
        self._save()
        return True

    def _training_text(self) -> Iterator[str]:
        task = self._bar.add_task("vocabulary", total=self._total)
        for batch in self._batches():
            self._bar.update(task, completed=batch.position)
            yield from (p.text.decode(errors="replace") for p in batch.pieces if self._split(p.unit) == "train")
        self._bar.remove_task(task)

    def _save(self, writer: DataWriter | None = None, seen: Duplicates | None = None) -> None:
        self._state.writer = writer.sync() if writer else None
        self._state.compared = seen.sync() if seen else 0
        write_state(dataclasses.asdict(self._state), self._work / STATE)

    def _provenance(self) -> dict[str, Any]:
        state = self._state
        packages = ("longnet-torch", "numpy", "tokenizers", "transformers")
        return {
            "sources": list(self._options.sources),
            "tokenizer": f"bpe {self._options.train_bpe}" if self._options.train_bpe else self._options.tokenizer,
            "date": state.date,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "files": len(self._corpus.files),
            "file_bytes": self._corpus.size,
            "skipped": dict(sorted((self._corpus.skipped + collections.Counter(state.skipped)).items())),
            "duplicates": state.duplicates,
            "not_utf8": state.replaced,
            "unknown": state.unknown,
            "identity": state.identity,
        }


@functools.lru_cache(maxsize=2**12)
def _number(unit: str) -> float:
    """Return a number from 0 to 1 that a name alone decides."""
    name = unit.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) / 2**64
