"""Block sizes of the fused kernels, timed on a GPU: `python benchmarks/gpu_blocks.py ROWS.jsonl [SECONDS]`.

Compiles every candidate in processes of its own first, which is what takes long; then times each kernel by itself, with
the blocks of the others as they are, and appends a row for each. `attention/backends/triton/blocks.py` has the choice.
"""

import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from longnet import DilationPattern
from longnet.attention.backends.triton import launch
from longnet.attention.backends.triton.blocks import Blocks
from longnet.attention.plan import Whole, runs_of
from longnet.bench.record import append

DEVICE = torch.device("cuda")
CHOOSERS = {"attend": "forward_blocks", "backward_queries": "query_blocks", "backward_keys": "key_blocks"}
CANDIDATES = [
    Blocks(*sizes) for sizes in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)) if sizes[2] < 8 or
    max(sizes[:2]) > 64
]  # fmt: skip
CHANNELS = 2048
Case = tuple[str, int, Blocks]


def tensors(tokens: int, head_dim: int) -> list[Tensor]:
    shape = (1, tokens, CHANNELS // head_dim, head_dim)
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]


def call_of(kernel: str, pattern: DilationPattern, x: list[Tensor]) -> Callable[[], object]:
    """Return a call that launches one kernel, whose other inputs are there."""
    q, k, v, dout = x
    whole, scale = Whole(pattern, runs_of(None, 1, q.shape[2]), True, True), q.shape[3] ** -0.5
    if kernel == "attend":
        return lambda: launch.attend(q, k, v, None, whole, scale=scale)
    out, lse = launch.attend(q, k, v, None, whole, scale=scale)
    delta, dq, dk, dv = torch.empty_like(lse), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def queries() -> None:
        launch.differentiate_queries(dout, q, (k, v), None, out, lse, delta, whole, dq, scale=scale)

    queries()
    if kernel == "backward_queries":
        return queries
    return lambda: launch.differentiate_keys(dout, q, (k, v), lse, delta, whole, (dk, dv), scale=scale)


def milliseconds(case: Case, pattern: DilationPattern, x: list[Tensor], repeats: int = 3) -> float | None:
    """Return the median of some calls; None where the blocks do not fit the GPU."""
    kernel, _, blocks = case
    call = call_of(kernel, pattern, x)
    with mock.patch.object(launch, CHOOSERS[kernel], return_value=blocks):
        try:
            call()
        except launch.failures() as error:
            print(case, str(error).splitlines()[0][:100], flush=True)
            return None
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def compile_case(case: Case) -> None:
    milliseconds(case, DilationPattern.paper(), tensors(2048, case[1]), repeats=1)


def main(file: Path, seconds: float) -> None:
    """Measure until the time is over."""
    stop = time.monotonic() + seconds
    cases = [(kernel, head_dim, blocks) for head_dim in (128, 64) for kernel in CHOOSERS for blocks in CANDIDATES]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_case, cases))
    for head_dim, tokens in itertools.product((128, 64), (32768, 8192)):
        x = tensors(tokens, head_dim)
        for case in cases:
            if case[1] == head_dim and time.monotonic() < stop:
                row: dict[str, Any] = {
                    "case": "blocks", "kernel": case[0], "pattern": str(DilationPattern.paper()), "tokens": tokens,
                    "heads": CHANNELS // head_dim, "head_dim": head_dim, "dtype": "bfloat16", **case[2]._asdict(),
                    "ms": milliseconds(case, DilationPattern.paper(), x),
                }  # fmt: skip
                append([row], file, DEVICE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3600)
