"""Real processes of a group, for tests of what runs across ranks."""

import importlib
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(check, ranks: int, folder: Path, *arguments, backend: str = "gloo") -> list:
    """Run `module:function` of this folder, (rank, ranks, *arguments), in processes; return what each one returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_run, (check, ranks, str(folder), arguments, backend), ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, check: str, ranks: int, folder: str, arguments: tuple, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=60)  # a rank that waits for one that failed ends, too
    dist.init_process_group(backend, timeout=limit, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    module, function = check.split(":")
    result = getattr(importlib.import_module(module), function)(rank, ranks, *arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
