"""Ranks of `longnet train`, each a process: started by hand, as torchrun starts them, or by torchrun's own agent.

They are forked from a process that has imported everything and computed nothing, so that a rank starts at once.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from longnet.cli.main import main
from longnet.data.shards import TokenData
from longnet.training.config import to_toml


def preloaded():
    """Return the context of the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["longnet.training.loop", "longnet.cli.train", "transformers.models.auto.tokenization_auto", "training.jobs"]
    )
    return context


def write_recipe(recipe, path):
    """Write a recipe as the TOML file that the command reads."""
    path.write_text(to_toml(recipe.resolve(TokenData.open(recipe.data.path))))
    return path


class Job:
    """Ranks that train together; what each one prints is in the job's folder.

    Args:
        context: of the processes.
        command: arguments of `longnet`, the recipe and the run among them.
        size: number of ranks.
        folder: for what they print.
        prepare: "module:function" of these tests, called with the rank before the command.
    """

    def __init__(self, context, command, size, folder, *, prepare=None):
        folder.mkdir(parents=True)
        self.folder = folder
        # It plays torchrun's, which lives as long as the job.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
            }
            arguments = (environment, [str(word) for word in command], str(folder), prepare)
            self.processes.append(context.Process(target=run_rank, args=arguments))
        for process in self.processes:
            process.start()

    def wait(self, seconds=300):
        """Return the exit status of each rank once all have ended."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.end()
        assert not late, f"ranks {late} did not end in {seconds} s; {self.printed()}"
        return [process.exitcode for process in self.processes]

    def end(self):
        """Kill what still runs."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def printed(self):
        """Return what each rank has printed."""
        return [path.read_text() for path in sorted(self.folder.glob("rank-*.txt"))]


def run_rank(environment, command, folder, prepare):
    """Be a rank: print into the folder, and run the command."""
    gc.freeze()  # a store of the agent's, whose thread is not in this process, must not be collected here
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    file = os.open(Path(folder) / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # no fork's of pytest's own
    if prepare is not None:
        module, function = prepare.split(":")
        getattr(importlib.import_module(module), function)(rank)
    (Path(folder) / f"pid-{rank}").write_text(f"{os.getpid()}")
    sys.argv = ["longnet", *command]
    main()


def run_agent(command, size, restarts, folder):
    """Be torchrun: its agent and its restarts, but that a rank is a fork and no new interpreter."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, run_rank)({}, [str(word) for word in command], str(folder), None)
