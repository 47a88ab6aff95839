"""One exact training step on a sequence longer than memory. Not in the paper.

The sequence is read chunk by chunk without a graph, then learned from in reverse: each chunk is computed once more,
with a graph, and sent back together with the gradients that later chunks owe its keys and values
(`longnet.attention.chunks`). What is kept of the past is the state of open segments; what a chunk overwrites there
goes to a log on disk. Loss and gradients are those of one pass over the whole sequence.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import PreTrainedModel

from longnet.attention.chunks import Chunk, Tape
from longnet.attention.dilated import document_bounds, padding_bounds
from longnet.model import LongNetForCausalLM
from longnet.model.loss import IGNORED
from longnet.model.patterns import heads_of, kind_of
from longnet.model.sequence_parallel import positions_of_slice, within_chunk
from longnet.training.chunk_schedule import order_of, rows_of, spans_of, tape_of, whole_rows
from longnet.training.row_log import RowLog
from longnet.training.step_save import digest, gradients_of, put_gradients, tensor_of, write_save

T = TypeVar("T")

Span = tuple[int, int]  # first chunk, one past the last

Reader = Callable[[int, int], tuple[Tensor, Tensor]]


class ChunkProgress(NamedTuple):
    """How far a step has come.

    Attributes:
        is_learning: the chunk was computed with a graph; else it was read.
        tokens: of the chunk, in all rows.
        chunk: which one, from 0.
        chunks: of the sequence.
        share: of the step's work that is done, where learning from a chunk counts as three readings.
    """

    is_learning: bool
    tokens: int
    chunk: int
    chunks: int
    share: float


def chunked_gradients(
    model: nn.Module,
    input_ids: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    items: int | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    autocast: contextlib.AbstractContextManager[object] | None = None,
    folder: Path | None = None,
) -> float:
    """Add the gradient of the mean loss to the weights' `grad`, chunk by chunk; return that loss.

    Loss and gradients are those of one pass over the whole sequences, but for rounding; memory is that of a chunk, and
    of the pattern's open segments.

    Args:
        model: `LongNetForCausalLM`, or any causal language model of transformers whose attention is "dilated".
        input_ids: (B, T) of any integer dtype, on any device; a chunk at a time goes to the model's.
        targets: (B, T); targets[:, t] follows input_ids[:, t], and is not asked for where it is −100.
        chunk_tokens: tokens of a chunk.
        items: what the sum of losses is divided by; the targets asked for when None.
        padding_mask: (B, T) bool, as in `dilated_attention`.
        cu_seqlens: (n + 1,), as in `dilated_attention`.
        autocast: entered for each forward pass.
        folder: where the log lies; a temporary folder when None.

    Raises:
        ValueError: a model or arguments that do not do, or a log that does not fit on the disk.
        OSError: the log cannot be written.
    """
    rows, tokens = input_ids.shape
    bounds = None
    if padding_mask is not None:
        bounds = padding_bounds(padding_mask)
    elif cu_seqlens is not None:
        bounds = document_bounds(cu_seqlens, tokens)
    if items is None:
        items = sum(int((part != IGNORED).sum()) for part in torch.split(targets, 2**20, dim=1))
    with ChunkedStep(
        model, lambda start, stop: (input_ids[:, start:stop], targets[:, start:stop]), sequences=rows, tokens=tokens,
        chunk_tokens=chunk_tokens, items=items, bounds=bounds, autocast=autocast, folder=folder,
    ) as step:  # fmt: skip
        for _ in step:
            pass
        return step.loss


class ChunkedStep:
    """A step that goes on chunk by chunk as it is iterated, and can be saved, killed and continued in between.

        with ChunkedStep(model, read, …, folder=folder) as step:
            for progress in step:
                step.save()
        optimizer.step()

    Made anew with the same folder, it continues from its last save to the same bits. Where the log is missing, or
    shorter than was saved, the chunks that are still to be learned from are read anew, so that a copy of the save alone
    is enough to go on from.

    Args:
        model: as in `chunked_gradients`.
        read: gives input_ids and targets (B, stop − start) of the tokens start … stop − 1.
        sequences: B.
        tokens: T.
        chunk_tokens: tokens of a chunk.
        items: what the sum of losses is divided by.
        parts: into how many runs of sequences B is divided, one after the other.
        bounds: (n, 3) int64, (batch row, start, stop) of each run of real tokens; None where all are real.
        autocast: entered for each forward pass.
        seed: of dropout, which is then the same in both passes, and after a restart; None leaves the random state.
        folder: for the log and what `save` writes, this rank's own; None for a temporary one, and no saving.
        group: of ranks that each learn from other sequences of as many tokens, with weights that FSDP2 shares out: they
            save, and continue, from the same chunk. None for one process.
        about: what else the step depends on, of JSON's types: a save that says otherwise is not continued.
        is_over: says of a save's `about` that its step will not be continued: it is deleted. Any other is refused.

    Attributes:
        loss: so far; of the whole once the iteration has ended.
        reread: chunks that will be read once more, since the log was lost.

    Raises:
        ValueError: a model or arguments that do not do, a folder that holds another step, or a log that does not fit on
            the disk.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Reader,
        *,
        sequences: int,
        tokens: int,
        chunk_tokens: int,
        items: int,
        parts: int = 1,
        bounds: Tensor | None = None,
        autocast: contextlib.AbstractContextManager[object] | None = None,
        seed: tuple[int, ...] | None = None,
        folder: Path | None = None,
        group: dist.ProcessGroup | None = None,
        about: dict[str, Any] | None = None,
        is_over: Callable[[dict[str, Any]], bool] = lambda _: False,
    ) -> None:
        if min(sequences, tokens, chunk_tokens, items) < 1 or sequences % parts:
            raise ValueError(
                f"a step in chunks needs numbers of at least 1, and parts that divide the sequences, got {sequences} "
                f"sequences of {tokens} tokens, chunks of {chunk_tokens}, {items} items, {parts} parts"
            )
        self.model, self.read, self.items, self.parts, self.seed = model, read, items, parts, seed
        self.group = group
        self.autocast = contextlib.nullcontext() if autocast is None else autocast
        self.inner = _model_within(model)
        self.device = next(model.parameters()).device
        self.rows = sequences // parts
        bounds = whole_rows(sequences, tokens) if bounds is None else bounds.cpu()
        if self.rows > 1 and not torch.equal(bounds[:, 0], torch.arange(sequences)):
            raise ValueError(
                f"several documents in one sequence need parts of one sequence, got {len(bounds)} documents in "
                f"{sequences} sequences and {parts} parts: set parts={sequences}"
            )
        config = self.inner.config.get_text_config(decoder=True)
        self.heads = heads_of(config)[0]
        self.tapes = [
            tape_of(config, rows_of(bounds, part * self.rows, (part + 1) * self.rows), tokens, chunk_tokens)
            for part in range(parts)
        ]
        self.schedule = [
            (part, span, chunk, is_learning)
            for part, tape in enumerate(self.tapes)
            for span in spans_of(tape)
            for chunk, is_learning in order_of(*span)
        ]
        schedules = self._told_by_all(self.schedule)
        if any(other != schedules[0] for other in schedules):
            raise ValueError("ranks that learn in chunks together need sequences that are cut alike: the same bounds")
        self.loss, self.done, self.reread = 0.0, 0, 0
        self._saved = 0  # what `done` was when there was nothing to save
        self._opened: tuple[int, Span] | None = None  # part and span that the log is of
        self._losses = 0  # of logs: each new one has another name, so that no older save relies on it
        self._stops: dict[tuple[int, Span], int] = {}  # of a span that is read anew: from this chunk on it is learned
        self._temporary = tempfile.TemporaryDirectory(prefix="longnet-step-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary is not None else cast("Path", folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log: RowLog | None = None
        self._whole: Path | None = None  # what was saved last
        self._about = {**(about or {}), "tokens": tokens, "chunk": chunk_tokens, "rows": sequences, "parts": parts,
                       "items": items, "seed": seed, "ranks": len(schedules)}  # fmt: skip
        if folder is not None:
            self._about["weights"] = digest(self.inner)
            self._resume(is_over)
        self._refuse_full_disk(heads_of(config)[1])

    def __enter__(self) -> ChunkedStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log; a temporary one goes."""
        if self._log is not None:
            self._log.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def discard(self) -> None:
        """Delete what the step has left on disk: it counts, and will not be continued."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[ChunkProgress]:
        """Go on, and tell after each chunk.

        Raises:
            OSError: the log cannot be written; what was saved is whole.
        """
        work = [3 if learns else 1 for *_, learns in self.schedule]
        due = [index for index in range(self.done, len(self.schedule)) if self._is_due(*self.schedule[index])]
        left = sum(work[index] for index in due)
        for index in due:
            part, span, chunk_index, is_learning = self.schedule[index]
            tape = self.tapes[part]
            if self._opened != (part, span):
                self._open(part, span)
            chunk = Chunk(tape, chunk_index, is_learning=is_learning)
            self._restore_and_learn(chunk, part, span) if is_learning else self._read(chunk, part, span)
            self.done = index + 1
            left -= work[index]
            yield ChunkProgress(
                is_learning, self.rows * (chunk.stop - chunk.start), chunk_index, tape.chunks, 1 - left / sum(work)
            )

    def save(self) -> None:
        """Write where the step stands, whole or not at all: `ChunkedStep` with this folder goes on from there.

        Every rank must call it after the same chunk. What was saved before goes once all ranks have saved. Without a
        chunk since, nothing is written.

        Raises:
            ValueError: a step in a temporary folder.
            OSError: a rank cannot write; what was saved before stays.
        """
        if self._temporary is not None:
            raise ValueError("a step without a folder of its own cannot be saved: give one")
        if self.done == self._saved:
            return
        path = self.folder / f"step-{self.done}.safetensors"
        error = None
        try:
            self._write(path)
        except OSError as found:
            error = found
        told = next((told for told in self._told_by_all(None if error is None else str(error)) if told), None)
        if error is not None or told is not None:
            if self._whole != path:
                path.unlink(missing_ok=True)
            raise OSError(told) from error
        self._whole, self._saved = path, self.done
        for left in (*self.folder.glob("rows-*.log"), *self.folder.glob("step-*")):
            if left != path and (self._log is None or left != self._log.path):
                left.unlink()

    def _write(self, path: Path) -> None:
        part, span, *_ = self.schedule[self.done - 1]
        tape, tensors = self.tapes[part], {}
        if self._log is not None:
            self._log.sync()
        for name, x in (("states", tape.states), ("owed", tape.owed)):
            if x is not None and x.numel():
                tensors[name] = x.contiguous().cpu()
        self._share_out()
        about = {**self._about, "reread": [self._losses, self._stop_of(part, span)]} if self._losses else self._about
        metadata = {"about": json.dumps(about), "done": str(self.done), "loss": self.loss.hex()}
        write_save(path, {**tensors, **gradients_of(self.inner)}, metadata)

    def _resume(self, is_over: Callable[[dict[str, Any]], bool]) -> None:
        saved, other = {}, None
        own = json.loads(json.dumps(self._about))
        for path in self.folder.glob("step-*.safetensors"):
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata()
            about = json.loads(metadata["about"])
            about.pop("reread", None)
            if about == own:
                saved[int(metadata["done"])] = path
            elif not is_over(about):
                differences = sorted(key for key in about.keys() | own.keys() if about.get(key) != own.get(key))
                other = f"{self.folder} holds part of another step, of other {', '.join(differences)}"
        told = self._told_by_all((other, [0, *saved]))
        if refused := next((other for other, _ in told if other is not None), None):
            raise ValueError(f"{refused}: go on with it as it was begun, or delete the folder")
        # A rank that was killed while it saved has one save less than the others, or one more.
        self.done = max(set.intersection(*(set(done) for _, done in told)))
        if not self.done:
            for left in (*self.folder.glob("rows-*.log"), *self.folder.glob("step-*")):
                left.unlink()
            return
        self._whole = saved[self.done]
        self._load(self._whole)

    def _load(self, path: Path) -> None:
        part, span, chunk, is_learning = self.schedule[self.done - 1]
        tape = self.tapes[part]
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata()
            self.loss = float.fromhex(metadata["loss"])
            self._losses, self._stops[part, span] = json.loads(metadata["about"]).get("reread", (0, span[1]))
            tape.states, tape.owed = (tensor_of(file, name, self.device) for name in ("states", "owed"))
            put_gradients(self.inner, file)
        self._log, self._opened = self._log_of(part, span), (part, span)
        is_lost = False
        if tape.states is not None:
            self._log.offsets = self._offsets(tape, span)
            is_lost = not self._log.reaches(chunk + (not is_learning))
        if any(self._told_by_all(is_lost)):
            self._losses, self._opened = self._losses + 1, None
            if is_learning:
                self._stops[part, span] = chunk  # from here on has been learned
            self.done = self.schedule.index((part, span, span[0], False))
            self.reread = self._stop_of(part, span) - 1 - span[0]
        self._saved = self.done

    def _told_by_all(self, value: T) -> list[T]:
        """Return what each rank says, in their order."""
        if self.group is None:
            return [value]
        told: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(told, value, group=self.group)
        return told

    def _share_out(self) -> None:
        """Leave of each weight this rank's share, as it is after a backward pass: a pass without has gathered some."""
        for module in self.inner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _stop_of(self, part: int, span: Span) -> int:
        """Return one past the last chunk of a span that is still to be learned from when it is read."""
        return self._stops.get((part, span), span[1])

    def _is_due(self, part: int, span: Span, chunk: int, is_learning: bool) -> bool:
        return chunk < self._stop_of(part, span) - (not is_learning)

    def _open(self, part: int, span: Span) -> None:
        if self._log is not None:
            self._log.close()
            if self._temporary is not None:
                self._log.path.unlink(missing_ok=True)
        self._log, self._opened = self._log_of(part, span), (part, span)
        self.tapes[part].forget()

    def _log_of(self, part: int, span: Span) -> RowLog:
        path = self.folder / f"rows-{part}-{span[0]}{f'-{self._losses}' if self._losses else ''}.log"
        return RowLog(path, torch.cuda if self.device.type == "cuda" else None)

    def _offsets(self, tape: Tape, span: Span) -> dict[int, tuple[int, int]]:
        """Return where the log holds what each chunk overwrote, and how many rows."""
        states = tape.read_states
        row = 2 * states.shape[5] * states.element_size()
        counts = tape.rows_given(self.heads)[slice(*span)].tolist()
        starts = itertools.accumulate(counts, initial=0)
        return {index: (start * row, count)
                for index, start, count in zip(range(*span), starts, counts, strict=False)}  # fmt: skip

    def _read(self, chunk: Chunk, part: int, span: Span) -> None:
        ids, _ = self._tokens(chunk, part)
        with torch.no_grad(), within_chunk(chunk), self._seeded(chunk, part), self.autocast:
            self.model(**self._inputs(chunk, ids), logits_to_keep=1)
        log = cast("RowLog", self._log)
        if not log.offsets:
            log.offsets = self._offsets(chunk.tape, span)
        log.write(chunk.index, chunk.replaced())

    def _restore_and_learn(self, chunk: Chunk, part: int, span: Span) -> None:
        tape = chunk.tape
        if chunk.index < self._stop_of(part, span) - 1:
            states = tape.read_states
            rows = cast("RowLog", self._log).read(chunk.index, states.shape[5], states.dtype)
            chunk.restore(rows.to(self.device))
        ids, targets = self._tokens(chunk, part)
        with within_chunk(chunk), self._seeded(chunk, part):
            with self.autocast:
                loss = self._loss(chunk, ids, targets)
            chunk.backward(loss)
        self.loss += loss.item()

    def _loss(self, chunk: Chunk, ids: Tensor, targets: Tensor) -> Tensor:
        inputs = self._inputs(chunk, ids)
        if _finds_its_place(self.inner):
            loss: Tensor = self.model(**inputs, shift_labels=targets, num_items_in_batch=self.items).loss
            return loss
        logits = self.model(**inputs).logits
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / self.items

    def _inputs(self, chunk: Chunk, ids: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if not _finds_its_place(self.inner):
            inputs["position_ids"] = positions_of_slice(chunk.slices, ids.shape[1], ids.device)
        return inputs

    def _tokens(self, chunk: Chunk, part: int) -> tuple[Tensor, Tensor]:
        rows = slice(part * self.rows, (part + 1) * self.rows)
        ids, targets = self.read(chunk.start, chunk.stop)
        return ids[rows].to(self.device, torch.int64), targets[rows].to(self.device, torch.int64)

    @contextlib.contextmanager
    def _seeded(self, chunk: Chunk, part: int) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        words = np.random.SeedSequence([*self.seed, part, chunk.index]).generate_state(1, np.uint64)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(words[0]))
            yield

    def _refuse_full_disk(self, head_dim: int) -> None:
        row = 2 * head_dim * max(2, next(self.model.parameters()).element_size())
        needed, given = 0, [tape.rows_given(self.heads) for tape in self.tapes]
        for part, span in dict.fromkeys((part, span) for part, span, *_ in self.schedule[self.done :]):
            rows = int(given[part][span[0] : self._stop_of(part, span)].sum())
            there = self._log.path.stat().st_size if self._log and self._opened == (part, span) else 0
            needed = max(needed, row * rows - there)
        disk, free = (socket.gethostname(), self.folder.stat().st_dev), shutil.disk_usage(self.folder).free
        told = self._told_by_all((disk, needed, free, str(self.folder)))
        for disk, _, free, folder in told:
            wanted = sum(other for there, other, *_ in told if there == disk)
            if wanted > free:
                tape = self.tapes[0]
                raise ValueError(
                    f"the log of a step of {tape.tokens:,} tokens in chunks of {tape.chunk_tokens:,} takes "
                    f"{wanted / 1e9:.3g} GB, and {folder} has {free / 1e9:.3g} GB: make room"
                    f"{'' if self._whole else ', or take longer chunks'}"
                )


def _model_within(model: nn.Module) -> PreTrainedModel:
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or kind_of(inner.config) != "dilated":
        raise ValueError(
            'to learn in chunks takes a causal language model of transformers whose attention is "dilated", see '
            f"longnet.use_dilated_attention; got {type(model if inner is None else inner).__name__}"
        )
    if getattr(inner.config.get_text_config(decoder=True), "output_router_logits", False):
        raise ValueError(
            "the auxiliary loss of routers is a mean over the whole sequence, which a step in chunks does not make: "
            "set config.output_router_logits = False to learn without it"
        )
    if not _finds_its_place(inner) and "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(f"{type(inner).__name__} takes no position_ids, so chunks cannot tell it where they lie")
    return inner


def _finds_its_place(model: PreTrainedModel) -> bool:
    """Say whether a model knows of chunks by itself, as LongNet does: its positions, and its loss."""
    return isinstance(model, LongNetForCausalLM)
