"""The whole story of a training run, in order: data, model, optimizer, steps, metrics, checkpoints, evaluation.

A run is a pure function of its recipe, its data and the weights that it begins with (on one machine): the batch of a
step of (seed, step), the weights of the batches before. So a checkpoint holds all there is, and a run that was killed
continues to the same bits.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from longnet.attention.backends import dispatch
from longnet.data.loader import Windows
from longnet.data.shards import TokenData
from longnet.data.tokenizer import open_tokenizer
from longnet.data.unknown import refuse_lost
from longnet.evaluation.generation import Sampling, generate_text
from longnet.evaluation.perplexity import evaluate_contexts, unit_starts
from longnet.measurement import peak_bytes, refuse_beyond_memory, take_device
from longnet.model import LongNetForCausalLM
from longnet.model.budget import count_parameters
from longnet.model.configuration import LongNetConfig
from longnet.model.cost import training_flops
from longnet.model.patterns import heads_of
from longnet.model.versions import checkpoint_layers
from longnet.training.beginning import initial_model, pin_init, read_recipe, starting_point, write_recipe
from longnet.training.checkpoint import Saving, delete_superseded, lock_run, save_checkpoint
from longnet.training.config import Recipe, Tables
from longnet.training.gradients import accumulate_gradients, learn_in_chunks
from longnet.training.metrics import Metrics, Screen, describe, peak_flops
from longnet.training.optim import gradient_norm, learning_rate, make_optimizer, update
from longnet.training.parallel import Ranks, open_ranks, whole
from longnet.training.signals import Stop
from longnet.training.state import State, read_record, restore_state, restore_weights, take_snapshot, write_snapshot


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
    with open_ranks(recipe.parallel, take_device(recipe.train.device)) as ranks, contextlib.ExitStack() as stack:
        data = TokenData.open(recipe.data.path)
        given = recipe
        recipe = ranks.on_first(lambda: pin_init(given, read_recipe(output / "recipe.toml")))
        tables = recipe.resolve(data)
        _refuse_backend(recipe, recipe.model_config(data), ranks.device)
        windows = Windows(data.train, recipe.train.tokens, seed=recipe.train.seed)
        if data.validation.tokens and not data.validation.bytes:
            raise ValueError(
                f"the validation tokens of {data.folder} stand for no text: its tokenizer knows none of it, perhaps; "
                "prepare with another one"
            )
        if data.validation.tokens or recipe.evaluate.every:
            unit_starts(data.validation, recipe.contexts, recipe.evaluate.tokens)  # refuses what cannot be evaluated
        if recipe.sample.every and recipe.sample.prompt:
            refuse_lost(open_tokenizer(data.tokenizer_folder), recipe.sample.prompt, "sample.prompt")
        _refuse_size(recipe, recipe.model_config(data), ranks)
        ranks.on_first(lambda: stack.enter_context(lock_run(output)))
        checkpoint = ranks.on_first(lambda: starting_point(output, data, tables, ranks, resume=resume))
        random.seed(recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        # Made on the CPU: the same weights everywhere. A checkpoint's are put in their place.
        source = recipe.train.init_from if checkpoint is None else None
        model = initial_model(recipe.model_config(data), data, source).train()
        if checkpoint is not None:
            restore_weights(checkpoint, model)
        if recipe.train.checkpoint_activations:
            checkpoint_layers(model)
        trained = ranks.share_out(model, compiled=recipe.train.compile, in_chunks=recipe.train.chunk_tokens is not None)
        optimizer = make_optimizer(model, recipe.optim)
        state = State()
        if checkpoint is not None:
            state = restore_state(checkpoint, read_record(checkpoint), model, optimizer, ranks)
        ranks.on_first(lambda: write_recipe(output / "recipe.toml", tables))
        screen = Screen(steps=recipe.train.steps, step=state.step, wanted=progress, speaks=ranks.is_first)
        metrics = _open_metrics(stack, ranks, output, step=state.step, tensorboard=recipe.train.tensorboard)
        with screen, Stop() as stop:
            run = _Run(
                recipe, output, ranks, data, tables, windows, model, trained, optimizer, state, screen, metrics, stop,
                checkpoint,
            )  # fmt: skip
            return run.run()


def _refuse_size(recipe: Recipe, config: LongNetConfig, ranks: Ranks) -> None:
    """Raise ValueError where no such machine can hold the model, or the layers' inputs of a batch."""
    train = recipe.train
    weights = 4 * count_parameters(config).total
    refuse_beyond_memory(weights, "the model, which begins on the CPU,", "fewer or narrower layers, fewer tokens")
    if ranks.size == 1:
        sequences = train.batch_sequences // train.accumulate
        kept = 1 if train.checkpoint_activations else config.num_hidden_layers
        inputs = sequences * (train.chunk_tokens or train.tokens) * config.hidden_size * (2 * kept)
        refuse_beyond_memory(
            4 * weights + inputs, "training (weights, gradients, Adam, the layers' inputs)",
            "a smaller model, fewer tokens or sequences, or more parts with train.accumulate", ranks.device,
        )  # fmt: skip


def _refuse_backend(recipe: Recipe, config: LongNetConfig, device: torch.device) -> None:
    dtype = torch.bfloat16 if recipe.train.dtype == "bfloat16" else torch.float32
    dispatch.is_fused(recipe.train.backend, device, dtype, heads_of(config)[1])  # raises where it cannot run


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
    stop: Stop
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
            if isinstance(figures, signal.Signals):  # within a step in chunks, which goes on from where it stands
                if self.saved != state.step:
                    self._save()
                self.stopped_by = figures
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
        if state.step == train.steps:  # no later checkpoint deletes what a kill after the last one has left
            self.ranks.on_first(lambda: delete_superseded(self.output, state.step, self.recipe.checkpoint.keep))
            self.ranks.on_first(lambda: shutil.rmtree(self.output / "step", ignore_errors=True))

    def _step(self) -> tuple[float, float] | signal.Signals:
        """Train on one batch; return the learning rate and the norm of the gradient, or the signal that came first."""
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
            found = learn_in_chunks(
                self.trained, self.windows, train, state.step, ranks=ranks, autocast=self.autocast,
                folder=self.output / "step", about={"data": self.data.fingerprint},
                screen=self.screen, stop=self.stop,
            )  # fmt: skip
            if isinstance(found, signal.Signals):
                return found
            total = torch.tensor(found, device=self.device)
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
        tokenizer = open_tokenizer(self.data.tokenizer_folder)
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
        if train.init_from is not None and not state.step:
            self.screen.say(f"begins with the weights of {train.init_from}")
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


def _open_metrics(stack: contextlib.ExitStack, ranks: Ranks, output: Path, *, step: int, tensorboard: bool) -> Metrics:
    """Open the first rank's files; the other ranks know what is in them, and write nothing."""
    metrics = Metrics(None, step=step, tensorboard=False)

    def opened() -> set[tuple[str, int]]:
        nonlocal metrics
        metrics = stack.enter_context(contextlib.closing(Metrics(output, step=step, tensorboard=tensorboard)))
        return metrics.told

    metrics.told = ranks.on_first(opened)
    return metrics


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
