"""Everything that spreads training over processes; the model knows nothing of it.

torchrun starts dp × sp processes, the *ranks*. Rank r has place r // sp on the axis dp, which divides the sequences
of a step, and place r % sp on the axis sp, which divides each sequence. Weights, gradients and moments are shared out
over all of them (FSDP2). A run in one process takes the same calls, which do nothing then.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from longnet.data.loader import Windows
from longnet.model import LongNetForCausalLM
from longnet.model.sequence_parallel import sequence_parallel
from longnet.training.config import ParallelConfig
from longnet.training.watch import TOLD, Watch

T = TypeVar("T")

_LAUNCH = "torchrun --nproc-per-node {} -m longnet train …"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train one model, as one of them sees them.

    Attributes:
        config: the axes.
        device: where this rank computes.
        rank: this one.
        axes: mesh with the axes dp and sp; None where there is one process, as the following ones.
        shards: mesh of all ranks on one axis, over which weights are shared out.
        saving: mesh of all ranks on the CPU with a gloo group of its own: a checkpoint is written while training goes
            on, and neither waits for the other.
        watch: stops this process where a rank hangs.
    """

    config: ParallelConfig
    device: torch.device
    rank: int = 0
    axes: DeviceMesh | None = None
    shards: DeviceMesh | None = None
    saving: DeviceMesh | None = None
    watch: Watch | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.config.size

    @property
    def is_first(self) -> bool:
        """Whether this rank writes metrics and speaks to the user."""
        return self.rank == 0

    def mark(self) -> None:
        """Say that this rank goes on."""
        if self.watch is not None:
            self.watch.mark()

    def on_first(self, function: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
        """Return, on every rank, what a function gives on the first one, which alone runs it; or raise what it raises.

        Args:
            function: whose result, and errors about files and values, can be pickled.
            group: of all ranks; the default one when None.
        """
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except (ValueError, OSError, SafetensorError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=group)
        if told[1] is not None:
            raise told[1]
        return cast("T", told[0])

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all ranks that train, None where there is one process."""
        return None if self.size == 1 else dist.group.WORLD

    def on_first_while_saving(self, function: Callable[[], T]) -> T:
        """Do as `on_first`, in the thread that saves."""
        return self.on_first(function, group=self.saving_group)

    @property
    def saving_group(self) -> dist.ProcessGroup | None:
        """The group of `saving`, None where there is one process."""
        return None if self.saving is None else self.saving.get_group()

    def largest(self, *values: int) -> list[int]:
        """Return the largest value of all ranks, for each argument."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def batch(self, windows: Windows, step: int, sequences: int) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the batch of a step: inputs and targets, (sequences / dp, its slice's tokens).

        The slices are of equal length, or shorter by one token; only this part is read.
        """
        dp, sp = self.config.dp, self.config.sp
        start, stop = (windows.tokens * place // sp for place in (self.rank % sp, self.rank % sp + 1))
        ids, targets = windows.batch(step, sequences, rank=self.rank // sp, ranks=dp, start=start, stop=stop)
        return ids.to(self.device), targets.to(self.device)

    def sequence(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model sees a sequence of which this rank holds a slice."""
        if self.axes is None or self.config.sp == 1:
            return contextlib.nullcontext()
        return sequence_parallel(self.axes["sp"])

    def mean_loss(self, loss: Tensor) -> Tensor:
        """Return the loss of all sequences, from that of the sequences of this rank over the number of all targets."""
        if self.size == 1:
            return loss
        total = loss.double() / self.config.sp  # the ranks of a sequence have the same loss, that of all its tokens
        dist.all_reduce(total)
        return total

    def seed(self, seed: int, step: int) -> None:
        """Make the dropout of a step a function of (seed, step, rank), which a restart on these axes repeats."""
        if self.size > 1:
            words = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]))

    def share_out(self, model: LongNetForCausalLM, *, compiled: bool, in_chunks: bool = False) -> nn.Module:
        """Move a model to the device, each rank keeping its share of the weights; return what a step calls.

        The gradients of the ranks are added up: each has the gradient of its part of the mean loss.

        Args:
            model: on the CPU, the same on all ranks.
            compiled: compile the model, or its layers where more than a plain call goes on around them.
            in_chunks: a step sees a chunk at a time.
        """
        if self.shards is None:
            nn.Module.to(model, self.device)
            if compiled and not in_chunks:
                # The same module with a faster call; evaluation, of many shapes, calls the plain one.
                return cast("nn.Module", torch.compile(model))
        if compiled:  # what FSDP and chunks do around each layer is not to be traced
            compile_layers(model, in_chunks=in_chunks)
        if self.shards is not None:
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=self.shards)
                shared = cast("FSDPModule", module)
                shared.set_gradient_divide_factor(1.0)
                shared.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        return model

    @contextlib.contextmanager
    def evaluating(self, model: LongNetForCausalLM) -> Iterator[None]:
        """Make parts of the model callable by themselves, as evaluation and generation do, on all ranks alike."""
        self.mark()
        root = None if self.shards is None else cast("FSDPModule", model)
        if root is not None:
            root.unshard()  # its own weights: embeddings, head and last norm; a layer fetches its own when it is called
        try:
            with torch.compiler.set_stance("force_eager"):  # shapes vary
                yield
        finally:
            if root is not None:
                root.reshard()
        self.mark()

    def copy_to_cpu(self, value: Tensor) -> Tensor:
        """Return a copy of this rank's share of a tensor on the CPU, which knows its place in the whole."""
        local = value.to_local() if isinstance(value, DTensor) else value
        local = local.detach().to("cpu", copy=True).contiguous()
        if not isinstance(value, DTensor):
            return local
        return DTensor.from_local(
            local, self.saving, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )


@contextlib.contextmanager
def open_ranks(config: ParallelConfig, device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, until the context ends.

    Where a rank fails, one line is told: the first rank that comes to tell raises the error, the others raise
    SystemExit(2).

    Raises:
        ValueError: dp × sp is another number than that of the processes, or torchrun has not started them.
        ConnectionError: another rank is gone, or never came.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if size != config.size:
        _refuse(config, rank, size)
    if size == 1:
        with warnings.catch_warnings():  # torch's checkpoints warn where there is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield Ranks(config=config, device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=config.timeout_seconds)
    try:
        store = _meet(_connect(limit), rank, size)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"rank {rank} could not meet the {size - 1} others: {reason}") from error
    try:
        clone = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        with Watch(clone, rank, size, config.timeout_seconds) as watch:
            yield _start(config, device, rank, store, watch)
            dist.barrier()  # one that leaves early closes connections
            dist.destroy_process_group()
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_lost_connection(error):
            raise
        if store.compare_set(TOLD, "", str(rank)) != str(rank).encode():
            raise SystemExit(2) from error
        if isinstance(error, RuntimeError):
            reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # no place, no advice
            raise ConnectionError(f"rank {rank} has lost another rank, which torchrun names: {reason}") from error
        raise


def compile_layers(model: LongNetForCausalLM, *, in_chunks: bool = False) -> None:
    """Have torch.compile compile the layers of a model, each by itself, in place.

    Args:
        model: whose layers share their code, and what is compiled of it.
        in_chunks: a step sees a chunk at a time, of one length but for the last. Dropout is drawn as PyTorch draws it,
            since both passes over a chunk must draw alike, and only one of them has a graph.
    """
    for layer in model.model.layers:
        if in_chunks:
            layer.compile(dynamic=False, options={"fallback_random": True})
        else:
            layer.compile()


def whole(value: Tensor) -> Tensor:
    """Return a tensor of which each rank has a share, with all ranks' shares; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _start(config: ParallelConfig, device: torch.device, rank: int, store: Store, watch: Watch) -> Ranks:
    limit = timedelta(seconds=2 * config.timeout_seconds)  # the watch comes first, since it can name a rank
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=config.size, timeout=limit
    )
    group = dist.new_group(backend="gloo", timeout=limit)
    return Ranks(
        config=config,
        device=device,
        rank=rank,
        axes=init_device_mesh(device.type, (config.dp, config.sp), mesh_dim_names=("dp", "sp")),
        shards=init_device_mesh(device.type, (config.size,)),
        saving=DeviceMesh.from_group(group, "cpu"),
        watch=watch,
    )


def _refuse(config: ParallelConfig, rank: int, size: int) -> NoReturn:
    if rank:
        raise SystemExit(2)  # the first rank says it
    this = f"one of {size} processes" if size > 1 else "the only process"
    raise ValueError(
        f"parallel.dp × parallel.sp = {config.dp} × {config.sp} = {config.size}, but this is {this}: start "
        f"{_LAUNCH.format(config.size)}, or choose dp and sp whose product is {size}"
    )


def _connect(limit: timedelta) -> TCPStore:
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ValueError(
            f"WORLD_SIZE is set, but MASTER_ADDR and MASTER_PORT are not: start {_LAUNCH.format('N')}"
        ) from None
    return TCPStore(host, port, is_master=False, timeout=limit)


def _meet(store: Store, rank: int, size: int) -> PrefixStore:
    """Return a store that no earlier attempt of this job has written to, the same for all ranks.

    torchrun keeps one store over restarts, with the addresses of dead processes in it, and its number of restarts
    differs between nodes (https://github.com/pytorch/pytorch/issues/108158). So each rank says hello with a word of
    its own, and the first one answers each word it finds with the name of the attempt.
    """
    word = str(uuid.uuid4())
    if rank:
        store.set(f"hello/{rank}", word)
        attempt = store.get(f"welcome/{word}").decode()
        store.add(f"{attempt}/met", 1)
        return PrefixStore(attempt, store)
    greeted: set[bytes] = set()
    while store.add(f"{word}/met", 0) < size - 1:
        for other in range(1, size):
            hello = store.get(f"hello/{other}")
            if hello not in greeted:
                greeted.add(hello)
                store.set(f"welcome/{hello.decode()}", word)
        time.sleep(0.01)
    return PrefixStore(word, store)


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)
