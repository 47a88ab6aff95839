"""The gradients of one step: a batch at once, in parts, or chunk by chunk."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longnet.data.loader import Windows
from longnet.training.chunked import ChunkedStep, ChunkProgress
from longnet.training.config import TrainConfig
from longnet.training.metrics import Screen, describe_chunk
from longnet.training.parallel import Ranks
from longnet.training.signals import Stop

_SAVE_SECONDS = 60.0  # between two saves of a step in chunks


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


def learn_in_chunks(
    model: nn.Module,
    windows: Windows,
    config: TrainConfig,
    step: int,
    *,
    ranks: Ranks,
    autocast: contextlib.AbstractContextManager[object],
    folder: Path,
    about: dict[str, Any],
    screen: Screen,
    stop: Stop,
) -> float | signal.Signals:
    """Do as `accumulate_gradients` on the batch of a step, chunk by chunk; return this rank's share of the loss.

    Where a signal comes to any rank the step is saved, and the signal returned: called again, it goes on from there.

    Args:
        model: as the loop calls it.
        windows: of the training tokens.
        config: with the length of chunks.
        step: which batch.
        ranks: of the run; each learns from its own sequences.
        autocast: entered for each forward pass.
        folder: of the run's step; each rank has its own in it.
        about: what else the step depends on.
        screen: for progress.
        stop: signals of this process.
    """

    def read(start: int, until: int) -> tuple[Tensor, Tensor]:
        return windows.batch(
            step, config.batch_sequences, rank=ranks.rank, ranks=ranks.config.dp, start=start, stop=until
        )

    if config.chunk_tokens is None:
        raise ValueError("a step in chunks needs train.chunk_tokens, got None")
    with ChunkedStep(
        model, read, sequences=config.batch_sequences // ranks.config.dp, tokens=config.tokens,
        chunk_tokens=config.chunk_tokens, items=config.batch_sequences * config.tokens, parts=config.accumulate,
        autocast=autocast, seed=(config.seed, step, ranks.rank), folder=folder / f"rank-{ranks.rank}",
        group=ranks.group, about={**about, "step": step}, is_over=lambda other: other["step"] != step,
    ) as learning:  # fmt: skip
        if learning.reread:
            screen.warn(f"the log of step {step + 1} is missing or too short: {learning.reread:,} chunks are read anew")
        started = saved = time.perf_counter()
        before: ChunkProgress | None = None
        tokens = 0
        for progress in learning:
            ranks.mark()
            now = time.perf_counter()
            tokens += progress.tokens
            if before is None:
                before, started, tokens = progress, now, 0
            told = describe_chunk(progress, tokens=tokens, seconds=now - started, since=before.share)
            screen.within(step, told)
            signalled, is_due = ranks.largest(stop.signal or 0, int(ranks.is_first and now - saved >= _SAVE_SECONDS))
            is_stopped = signalled and progress.share < 1
            if is_stopped or is_due:
                learning.save()
                saved = now
                screen.note(step, told)
            if is_stopped:
                return signal.Signals(signalled)
        return learning.loss
