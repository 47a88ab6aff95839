"""The whole story of a training run, in order: data, model, optimizer, steps, metrics, checkpoints, evaluation.

A run is a pure function of its recipe and its data (on one machine): the batch of a step of (seed, step), the weights
of the batches before. So a checkpoint holds all there is, and a run that was killed continues to the same bits.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import signal
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.evaluation.generation import Sampling, generate_text
from longnet.evaluation.perplexity import evaluate_contexts, unit_starts
from longnet.measurement import find_device, peak_bytes
from longnet.model import LongNetForCausalLM
from longnet.model.cost import training_flops
from longnet.model.versions import checkpoint_layers
from longnet.training.checkpoint import (
    Saving,
    describe_damage,
    has_checkpoints,
    lock_run,
    newest_whole,
    save_checkpoint,
)
from longnet.training.chunked import ChunkedStep, ChunkProgress
from longnet.training.config import Recipe, Tables, differences, to_toml
from longnet.training.metrics import Metrics, Screen, describe, describe_chunk, peak_flops
from longnet.training.optim import gradient_norm, learning_rate, make_optimizer, update
from longnet.training.parallel import Ranks, open_ranks, whole
from longnet.training.state import (
    FORMAT,
    State,
    changed_machine,
    read_record,
    restore_state,
    restore_weights,
    take_snapshot,
    write_snapshot,
)

_SAVE_SECONDS = 60.0  # between two saves of a step in chunks


class Summary(NamedTuple):
    """What a run came to.

    Attributes:
        step: steps finished.
        tokens: trained on.
        loss: of the last step, in nats per token; None where no step counted.
        seconds: spent in steps, those of earlier processes too.
        model_folder: the last checkpoint, a Hugging Face model folder.
        stopped_by: the signal that stopped the run before its last step, None where it is finished.
        rank: of this process; the first one tells the user.
    """

    step: int
    tokens: int
    loss: float | None
    seconds: float
    model_folder: Path
    stopped_by: signal.Signals | None
    rank: int


def train(recipe: Recipe, output: Path, *, resume: bool = False, progress: bool = True) -> Summary:
    """Train a model and leave it, with metrics and checkpoints, in a run folder.

    SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a second one interrupts at once. Seeds
    the random numbers of Python and torch.

    Args:
        recipe: everything that decides the result.
        output: the run's folder, RUN.
        resume: continue from its newest whole checkpoint, or begin where it has none. Damaged ones are named on
            stderr and skipped.
        progress: show progress on stdout.

    Raises:
        ValueError: a recipe, data or folder that does not do; a loss that stays without a finite value.
        OSError: data are missing, or the disk is full.
    """
    with open_ranks(recipe.parallel, find_device(recipe.train.device)) as ranks, contextlib.ExitStack() as stack:
        data = TokenData.open(recipe.data.path)
        tables = recipe.resolve(data)
        windows = Windows(data.train, recipe.train.tokens, seed=recipe.train.seed)
        if data.validation.tokens and not data.validation.bytes:
            raise ValueError(
                f"the validation tokens of {data.folder} stand for no text: its tokenizer knows none of it, perhaps; "
                "prepare with another one"
            )
        if data.validation.tokens or recipe.evaluate.every:
            unit_starts(data.validation, recipe.contexts, recipe.evaluate.tokens)  # refuses what cannot be evaluated
        ranks.on_first(lambda: stack.enter_context(lock_run(output)))
        checkpoint = ranks.on_first(lambda: _starting_point(output, data, tables, ranks, resume=resume))
        random.seed(recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        model = LongNetForCausalLM(recipe.model_config(data)).train()  # made on the CPU: the same weights everywhere
        if checkpoint is not None:
            restore_weights(checkpoint, model)
        if recipe.train.checkpoint_activations:
            checkpoint_layers(model)
        trained = ranks.share_out(model, compiled=recipe.train.compile)
        optimizer = make_optimizer(model, recipe.optim)
        state = State()
        if checkpoint is not None:
            state = restore_state(checkpoint, read_record(checkpoint), model, optimizer, ranks)
        ranks.on_first(lambda: _write_recipe(output / "recipe.toml", tables))
        screen = Screen(steps=recipe.train.steps, step=state.step, wanted=progress, speaks=ranks.is_first)
        metrics = _open_metrics(stack, ranks, output, step=state.step, tensorboard=recipe.train.tensorboard)
        with screen, _Stop() as stop:
            run = _Run(
                recipe, output, ranks, data, tables, windows, model, trained, optimizer, state, screen, metrics, stop,
                checkpoint,
            )  # fmt: skip
            return run.run()


def accumulate_gradients(
    model: nn.Module,
    input_ids: Tensor,
    targets: Tensor,
    *,
    parts: int,
    items: int | None = None,
    autocast: contextlib.AbstractContextManager[object],
) -> Tensor:
    """Add the gradient of the sum of losses over `items` to the weights' `grad`; return that loss.

    Args:
        model: a causal language model that takes shift_labels and num_items_in_batch.
        input_ids: (B, T).
        targets: (B, T); targets[:, t] follows input_ids[:, t].
        parts: into how many runs of sequences B is divided, each going forward and backward by itself.
        items: what the sum is divided by; the targets here when None. Of a batch across ranks it is that of all
            ranks, whose losses and gradients add up to the mean's then.
        autocast: entered for each forward pass.
    """
    items = targets.numel() if items is None else items
    total = torch.zeros((), device=input_ids.device)
    for part_ids, part_targets in zip(input_ids.chunk(parts), targets.chunk(parts), strict=True):
        with autocast:
            loss = model(input_ids=part_ids, shift_labels=part_targets, num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    return total


@dataclass
class _Run:
    recipe: Recipe
    output: Path
    ranks: Ranks
    data: TokenData
    tables: Tables
    windows: Windows
    model: LongNetForCausalLM
    trained: nn.Module  # the model, as a step calls it
    optimizer: torch.optim.Optimizer
    state: State
    screen: Screen
    metrics: Metrics
    stop: _Stop
    checkpoint: Path | None
    stopped_by: signal.Signals | None = None

    def run(self) -> Summary:
        """Take the steps that are left."""
        train, state = self.recipe.train, self.state
        self.device, self.saving = self.ranks.device, Saving()
        self.saved = None if self.checkpoint is None else state.step
        dtype = torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
        self.flops = training_flops(self.model, self.model.config, tokens=train.tokens) * train.batch_sequences
        self.peak = peak_flops(self.device, dtype) if state.step < train.steps else None
        self._announce()
        if state.step:
            self._report()  # what a killed process had not come to
        try:
            self._train()
        except (ValueError, OSError):  # known to all ranks, so that each can write what it has begun to
            with contextlib.suppress(OSError):
                self.saving.wait()
            raise
        return self._summary()

    def _train(self) -> None:
        train, state = self.recipe.train, self.state
        mark = (state.step, state.seconds)  # since when the figures of a line of metrics count
        while state.step < train.steps:
            self.ranks.mark()
            started = time.perf_counter()
            figures = self._step()
            state.seconds += time.perf_counter() - started
            if figures is None:  # stopped within a step in chunks, which goes on from where it stands
                if self.saved != state.step:
                    self._save()
                self.stopped_by = self.stop.signal
                break
            lr, norm = figures
            if state.step % train.log_every == 0 or state.step == train.steps:
                self._log(lr, norm, mark)
                mark = (state.step, state.seconds)
            self.screen.advance(state.step)
            every = self.recipe.checkpoint.every
            signalled, failed = self.ranks.largest(self.stop.signal or 0, int(self.saving.has_failed))
            if failed:
                self.saving.wait()
            if train.chunk_tokens or state.step == train.steps or signalled or (every and state.step % every == 0):
                self._save()
            if signalled and state.step < train.steps:
                self.stopped_by = signal.Signals(signalled)
                break
            self._report()
        self.checkpoint = self.saving.wait() or self.checkpoint
        if train.chunk_tokens and state.step == train.steps:
            shutil.rmtree(self.output / "step", ignore_errors=True)

    def _step(self) -> tuple[float, float] | None:
        """Train on one batch; return the learning rate and the norm of the gradient, None where a signal came first."""
        train, optim, ranks, state = self.recipe.train, self.recipe.optim, self.ranks, self.state
        items = train.batch_sequences * train.tokens
        if train.chunk_tokens is None:
            input_ids, targets = ranks.batch(self.windows, state.step, train.batch_sequences)
            ranks.seed(train.seed, state.step)
            with ranks.sequence():
                total = accumulate_gradients(
                    self.trained, input_ids, targets, parts=train.accumulate, items=items, autocast=self.autocast
                )
        else:
            loss_in_chunks = self._learn_in_chunks(train.chunk_tokens, items)
            if loss_in_chunks is None:
                return None
            total = torch.tensor(loss_in_chunks, device=self.device)
        total, gradient = ranks.mean_loss(total), whole(gradient_norm(self.model))
        loss, norm = torch.stack([total, gradient.to(total)]).tolist()
        lr = learning_rate(optim, state.step, train.steps)
        state.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            update(self.optimizer, lr=lr, clip=optim.clip, norm=gradient)
            state.loss, state.skipped_in_a_row = loss, 0
            state.losses.append(loss)
        else:
            self._skip(loss, norm)
        return lr, norm

    def _learn_in_chunks(self, chunk_tokens: int, items: int) -> float | None:
        train, step = self.recipe.train, self.state.step

        def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return self.windows.batch(step, train.batch_sequences, start=start, stop=stop)

        with ChunkedStep(
            self.trained, read, sequences=train.batch_sequences, tokens=train.tokens, chunk_tokens=chunk_tokens,
            items=items, parts=train.accumulate, autocast=self.autocast, seed=(train.seed, step),
            folder=self.output / "step", about={"step": step, "data": self.data.fingerprint},
        ) as learning:  # fmt: skip
            started = saved = time.perf_counter()
            before: ChunkProgress | None = None
            tokens = 0
            for progress in learning:
                now = time.perf_counter()
                tokens += progress.tokens
                if before is None:
                    before, started, tokens = progress, now, 0
                told = describe_chunk(progress, tokens=tokens, seconds=now - started, since=before.share)
                self.screen.within(step, told)
                is_stopped = self.stop.signal is not None and progress.share < 1
                if is_stopped or now - saved >= _SAVE_SECONDS:
                    learning.save()
                    saved = now
                    self.screen.note(step, told)
                if is_stopped:
                    return None
            return learning.loss

    def _skip(self, loss: float, norm: float) -> None:
        # Neither weights nor moments have been touched: the optimizer was not called.
        train, state = self.recipe.train, self.state
        self.optimizer.zero_grad(set_to_none=True)
        state.skipped += 1
        state.skipped_in_a_row += 1
        found = f"loss {loss}, norm of the gradient {norm}"
        self.metrics.write("skipped", state.step, found=found, skipped=state.skipped)
        self.screen.warn(f"step {state.step} is skipped, the weights stay as they are: {found}")
        if state.skipped_in_a_row >= train.max_skipped:
            raise ValueError(
                f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, up to step {state.step}: "
                "lower optim.lr or optim.clip, lengthen optim.warmup_steps, or use train.dtype = 'float32'"
            )

    def _log(self, lr: float, norm: float, mark: tuple[int, float]) -> None:
        train, state = self.recipe.train, self.state
        steps, seconds = state.step - mark[0], state.seconds - mark[1]
        row = {
            "loss": math.fsum(state.losses) / len(state.losses) if state.losses else None,
            "lr": lr,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "tokens": state.step * train.batch_sequences * train.tokens,
            "skipped": state.skipped,
            "seconds": state.seconds,
            "tokens_per_s": steps * train.batch_sequences * train.tokens / seconds,
            "mfu": None if self.peak is None else steps * self.flops / seconds / self.peak / self.ranks.size,
            "memory": peak_bytes(self.device),
        }
        state.losses.clear()
        self.metrics.write("train", state.step, **row)
        self.screen.show(state.step, describe(row, (train.steps - state.step) * seconds / steps))

    def _save(self) -> None:
        self.saved = self.state.step
        self.ranks.on_first(self.metrics.sync)  # a checkpoint's lines are on disk before it is
        self.saving.wait()  # before there are copies for another one
        model, ranks, step = self.model, self.ranks, self.state.step
        snapshot = take_snapshot(
            self.state, model, self.optimizer, ranks, recipe=self.tables, fingerprint=self.data.fingerprint
        )

        def write(folder: Path) -> None:
            write_snapshot(folder, snapshot, model, ranks, tokenizer=self.data.tokenizer_folder)

        self.saving.start(
            lambda: save_checkpoint(
                self.output, step, write, keep=self.recipe.checkpoint.keep, on_first=ranks.on_first_while_saving
            )
        )

    def _report(self) -> None:
        """Evaluate and write samples where they are due and not done."""
        evaluate, sample, step = self.recipe.evaluate, self.recipe.sample, self.state.step
        is_last = step == self.recipe.train.steps
        is_due = is_last or (evaluate.every and step % evaluate.every == 0)
        if is_due and self.data.validation.tokens and not self.metrics.has("evaluate", step):
            self._evaluate()
        is_due = sample.every and (is_last or step % sample.every == 0)
        if is_due and not self.metrics.has("sample", step):
            self._sample()

    def _evaluate(self) -> None:
        evaluate = self.recipe.evaluate
        with self.autocast, self.ranks.evaluating(self.model):
            results = evaluate_contexts(
                self.model,
                self.data.validation,
                self.recipe.contexts,
                token_bytes=self.data.token_bytes,
                tokens=evaluate.tokens,
                batch_tokens=evaluate.batch_tokens,
                device=self.device,
            )
        rows = [
            {
                "context": result.context,
                "tokens": result.tokens,
                "loss": _finite(result.loss),
                "perplexity": _finite(result.perplexity),
                "bits_per_byte": _finite(result.bits_per_byte),
            }
            for result in results
        ]
        self.metrics.write("evaluate", self.state.step, contexts=rows)
        figures = "  ".join(
            f"{result.context}: {result.perplexity:.3f} ({result.bits_per_byte:.3f} bits/byte)" for result in results
        )
        self.screen.say(f"step {self.state.step}  perplexity by context  {figures}")

    def _sample(self) -> None:
        sample = self.recipe.sample
        tokenizer = AutoTokenizer.from_pretrained(self.data.tokenizer_folder)
        with self.autocast, self.ranks.evaluating(self.model):
            text = generate_text(self.model, tokenizer, sample.prompt, Sampling(tokens=sample.tokens))
        self.metrics.write("sample", self.state.step, prompt=sample.prompt, text=text)
        self.screen.say(f"step {self.state.step}  sample  {sample.prompt!r} → {text!r}")

    def _announce(self) -> None:
        train, state = self.recipe.train, self.state
        parameters = sum(weight.numel() for weight in self.model.parameters())
        self.screen.say(
            f"{parameters:,} parameters, attention {self.recipe.model.attention}, {train.steps:,} steps of "
            f"{train.batch_sequences} × {train.tokens:,} tokens, {train.dtype} on {self._where()}"
        )
        warmup = self.recipe.optim.warmup_steps
        if warmup > train.steps:
            self.screen.say(
                f"optim.warmup_steps = {warmup:,} is longer than the run: all {train.steps:,} steps warm up"
            )
        if state.step:
            what = "is finished" if state.step >= train.steps else "continues"
            self.screen.say(f"{self.output} {what} at step {state.step:,}")

    def _summary(self) -> Summary:
        train, state = self.recipe.train, self.state
        tokens = state.step * train.batch_sequences * train.tokens
        # The last step, a signal and a finished run all leave a checkpoint.
        folder = cast("Path", self.checkpoint)
        return Summary(state.step, tokens, state.loss, state.seconds, folder, self.stopped_by, self.ranks.rank)

    def _where(self) -> str:
        parallel = self.recipe.parallel
        return self.device.type + (f", {parallel.dp} × {parallel.sp} ranks" if parallel.size > 1 else "")


class _Stop:
    """Takes note of SIGINT and SIGTERM while it is entered; the second one has its usual effect."""

    signal: signal.Signals | None = None

    def __enter__(self) -> _Stop:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()


def _open_metrics(stack: contextlib.ExitStack, ranks: Ranks, output: Path, *, step: int, tensorboard: bool) -> Metrics:
    """Open the first rank's files; the other ranks know what is in them, and write nothing."""
    metrics = Metrics(None, step=step, tensorboard=False)

    def opened() -> set[tuple[str, int]]:
        nonlocal metrics
        metrics = stack.enter_context(contextlib.closing(Metrics(output, step=step, tensorboard=tensorboard)))
        return metrics.told

    metrics.told = ranks.on_first(opened)
    return metrics


def _starting_point(output: Path, data: TokenData, tables: Tables, ranks: Ranks, *, resume: bool) -> Path | None:
    """Return the checkpoint to continue from, None to begin; refuse what would mix two runs."""
    if not has_checkpoints(output):
        _refuse_to_overwrite(output / "recipe.toml", tables)
        return None
    if not resume:
        raise ValueError(
            f"{output} holds the checkpoints of a run: continue it with --resume, or choose another folder"
        )
    found = newest_whole(output)
    screen = Screen(steps=0, step=0, wanted=False)
    if found.whole is None:
        raise ValueError(
            f"no checkpoint of {output} is whole ({describe_damage(found.damaged)}): take another folder to begin anew"
        )
    if found.damaged:
        screen.warn(f"damaged: {describe_damage(found.damaged)}; {found.whole.name} is used instead")
    record = read_record(found.whole)
    if record["format"] != FORMAT:
        raise ValueError(
            f"{found.whole} has format {record['format']}, and this version of longnet continues format {FORMAT}: "
            "continue it with the version that wrote it, or begin another run"
        )
    if record["data"] != data.fingerprint:
        raise ValueError(f"{output} was trained on other data than {data.folder}: resume it with its own")
    changed = differences(record["recipe"], tables)
    if changed:
        before, now = record["recipe"], tables
        pairs = [key.partition(".")[::2] for key in changed]
        told = ", ".join(f"{t}.{k} ({before[t].get(k)} → {now[t].get(k)})" for t, k in pairs)
        raise ValueError(
            f"{output} cannot be resumed with another recipe: {told}; set these back, or begin another run"
        )
    if record["progress"]["step"] > tables["train"]["steps"]:
        raise ValueError(f"{output} has finished {record['progress']['step']} steps already: raise train.steps")
    _refuse_to_overwrite(output / "recipe.toml", tables)
    moved = changed_machine(record, ranks)
    if moved:
        screen.warn(f"{output} continues on another machine ({', '.join(moved)}): rounding may differ from here on")
    return found.whole


def _write_recipe(path: Path, tables: Tables) -> None:
    if not path.exists() or _read_recipe(path) != tables:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(to_toml(tables), encoding="utf-8")
        partial.replace(path)


def _read_recipe(path: Path) -> Tables | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None


def _refuse_to_overwrite(path: Path, tables: Tables) -> None:
    """Raise ValueError where a run would write its recipe over one that a user has written."""
    if not path.exists():
        return
    there = _read_recipe(path)
    is_of_a_run = there is not None and to_toml(there) == path.read_text(encoding="utf-8")  # nobody else writes so
    if there != tables and not is_of_a_run:
        raise ValueError(
            f"{path} is yours, and the run would write its own over it: give another folder with --output, or move it"
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
