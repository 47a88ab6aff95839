"""`longnet bench distributed`: a training step of one sequence across processes, against that of one process.

Weak scaling: every rank holds as many tokens as the one process does alone, so the time should not grow. Nothing is
timed before loss and gradients of the ranks have agreed with those of one process on the whole sequence, and the bytes
of their exchanges with the closed form.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longnet.attention.pattern import DilationPattern
from longnet.attention.sequence_parallel import counted_exchanges
from longnet.bench.attention import GateError
from longnet.bench.model import random_model
from longnet.measurement import peak_bytes, ratio, seconds
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.sequence_parallel import sequence_parallel

Row = dict[str, Any]

_CPU = torch.device("cpu")
_LIMIT = 1e-5  # relative, of the loss and of each weight's gradient


@dataclass(frozen=True)
class Settings:
    """What `longnet bench distributed` measures.

    Attributes:
        ranks: processes of one thread each; as many cores must be free.
        tokens_per_rank: of a slice. The default is no multiple of a segment: every branch is cut.
        segment_length: of the first branch; the others double up to four slices.
        hidden_size: C; heads have 64 channels.
        layers: of the model, whose weights are random.
        repeats: counted rounds; figures are medians.
    """

    ranks: int = 2
    tokens_per_rank: int = 16_000
    segment_length: int = 1024
    hidden_size: int = 256
    layers: int = 2
    repeats: int = 5

    @property
    def pattern(self) -> DilationPattern:
        """The branches."""
        return DilationPattern.geometric(self.segment_length, 4 * self.tokens_per_rank)


QUICK = Settings(tokens_per_rank=5000, segment_length=512, repeats=3)


def run(settings: Settings) -> Iterator[Row]:
    """Measure scaling, traffic and memory, yielding rows as they come.

    Raises:
        GateError: the ranks computed something else than one process, or exchanged other bytes than the closed form.
    """
    scaling, traffic = _spawn(measure, settings, settings.ranks)[0]
    shape = {
        "pattern": str(settings.pattern), "tokens_per_rank": settings.tokens_per_rank,
        "hidden_size": settings.hidden_size, "layers": settings.layers, "dtype": "float32", "threads": 1,
    }  # fmt: skip
    yield {"case": "scaling", "ranks": settings.ranks, **shape, **scaling}
    yield {"case": "traffic", "ranks": settings.ranks, **shape, **traffic}
    for ranks in dict.fromkeys((1, settings.ranks)):
        held = _spawn(peak, settings, ranks)
        yield {
            "case": "memory", "ranks": ranks, **shape,
            "peak_bytes": [total for total, _ in held], "step_bytes": [grown for _, grown in held],
        }  # fmt: skip


def measure(settings: Settings) -> tuple[Row, Row]:
    """Check and time, on every rank of the default group at once; return figures of scaling and of traffic.

    Three cases take turns, so that the drift of a shared machine meets all: rank 0 alone with a sequence of one slice;
    every rank for itself with such a sequence, which shows what the ranks' processes take from each other (memory
    bandwidth, a core's clock); and the ranks together with the whole sequence. The slowest rank counts.

    Raises:
        GateError: on every rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, ids = _model(settings), _ids(settings)
    mine = ids[:, rank * settings.tokens_per_rank :][:, : settings.tokens_per_rank]
    with FlopCounterMode(display=False) as alone:
        _step(model, mine)
    with FlopCounterMode(display=False) as together, counted_exchanges() as received:
        found = _step(model, mine, dist.group.WORLD)
    complaint = [_complaint(found, _step(model, ids)) if rank == 0 else None]
    dist.broadcast_object_list(complaint)
    if complaint[0] is not None:
        raise GateError(f"{complaint[0]} at {ids.shape[1]} tokens on {ranks} ranks with {settings.pattern}; not timed")
    traffic = _traffic(settings, _of_all(received))

    cases: list[Callable[[], object]] = [
        functools.partial(_step, model, mine) if rank == 0 else lambda: None,
        functools.partial(_step, model, mine),
        functools.partial(_step, model, mine, dist.group.WORLD),
    ]
    rounds: list[list[float]] = []
    for _ in range(1 + settings.repeats):
        rounds.append([])
        for case in cases:
            dist.barrier()
            rounds[-1].append(seconds(case, _CPU))
    slowest = torch.tensor(_of_all(rounds[1:])).amax(0).T.tolist()  # case, round
    flops = _of_all([alone.get_total_flops(), together.get_total_flops()])
    names = ("alone", "side_by_side", "together")
    return {
        **{f"{name}_s": statistics.median(times) for name, times in zip(names, slowest, strict=True)},
        "efficiency": ratio(slowest[0], slowest[2]),
        "efficiency_side_by_side": ratio(slowest[1], slowest[2]),
        "tokens_per_second": ids.shape[1] / statistics.median(slowest[2]),
        "flops_over_alone": max(count for _, count in flops) / flops[0][0],
    }, traffic


def peak(settings: Settings) -> tuple[int, int]:
    """Return the most bytes that this rank's process has held in a step, and by how many the step raised that."""
    model, mine = _model(settings), _ids(settings)[:, : settings.tokens_per_rank]
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    _step(model, mine[:, :64], group)  # libraries load their parts
    before = peak_bytes(_CPU, reset=True)
    _step(model, mine, group)
    after = peak_bytes(_CPU)
    return after, after - before


def _model(settings: Settings) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=320, hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 64, position_embedding="rope",
        segment_lengths=settings.pattern.segment_lengths, dilation_rates=settings.pattern.dilation_rates,
    )  # fmt: skip
    model = random_model(config)
    model.train()
    return model


def _ids(settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 320, (1, dist.get_world_size() * settings.tokens_per_rank), generator=generator)


def _step(model: LongNetForCausalLM, ids: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Return the loss, and the gradient of each weight: of one process, or added up over a group's slices."""
    model.zero_grad(set_to_none=True)
    with contextlib.nullcontext() if group is None else sequence_parallel(group):
        loss = model(ids, labels=ids).loss
        loss.backward()
    gradients = {name: cast("Tensor", weight.grad) for name, weight in model.named_parameters()}
    for gradient in gradients.values() if group is not None else ():
        dist.all_reduce(gradient, group=group)
    return {"loss": loss.detach(), **gradients}


def _complaint(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Say what is off, None where nothing is."""
    for name, want in expected.items():
        error = ((found[name] - want).norm() / want.norm()).item()
        if not error <= _LIMIT:
            return f"{name} is off by {error:.1e} (relative)"
    return None


def _traffic(settings: Settings, received: Sequence[Sequence[int]]) -> Row:
    """Compare what every rank received, exchange by exchange, with the closed form.

    Raises:
        GateError: they differ.
    """
    ranks, layers, heads = len(received), settings.layers, settings.hidden_size // 64
    closed = settings.pattern.traffic(
        tokens=ranks * settings.tokens_per_rank, ranks=ranks, num_kv_heads=heads, head_dim=64, itemsize=4,
        is_causal=True,
    )  # fmt: skip
    forward = [list(bytes_of_rank[:layers]) for bytes_of_rank in received]
    backward = [sum(bytes_of_rank[layers:]) for bytes_of_rank in received]
    expected = [[count] * layers if any(closed) else [] for count in closed]
    if forward != expected or sum(backward) != layers * sum(closed):
        raise GateError(
            f"{forward} bytes came forward, exchange by exchange, {backward} backward, where {closed} a layer and "
            "direction were expected; not timed"
        )
    return {"forward_bytes": [sum(bytes_of_rank) for bytes_of_rank in forward], "backward_bytes": backward,
            "closed_form_bytes": [layers * count for count in closed]}  # fmt: skip


def _of_all(mine: Any) -> list[Any]:
    """Return what each rank has."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def _spawn(task: Callable[[Settings], Any], settings: Settings, ranks: int) -> list[Any]:
    """Run a task on every rank of a fresh gloo group; return what each returned, as JSON keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (task, settings, ranks, folder), ranks)  # type: ignore[attr-defined, no-untyped-call]
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    for result in results:
        if "off" in result:
            raise GateError(result["off"])
    return [result["figures"] for result in results]


def _run(rank: int, task: Callable[[Settings], Any], settings: Settings, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    # All ranks are on this machine; its name, by which gloo would look for an address, need not resolve.
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        result = {"figures": task(settings)}
    except GateError as error:
        result = {"off": str(error)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
