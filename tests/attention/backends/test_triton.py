"""The fused kernels without a GPU: interpreted, in a process of its own, and compiled ahead of time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longnet import DilationPattern, dilated_attention
from longnet.attention.backends.triton import launch
from longnet.bench import kernels

triton = pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")


@pytest.mark.parametrize("chosen", ["any_call", "parts", "not any_call and not parts"])
def test_interpreted(chosen):
    """What interpreted.py tests, since the interpreter is chosen once a process; some minutes each."""
    file = Path(__file__).with_name("interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, file],
        check=False, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_it_needs_cuda_where_it_is_not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match=r'backend="triton" cannot run.*runs on CUDA, not on cpu'):
        dilated_attention(q, q, q, DilationPattern((4,), (1,)), backend="triton")


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'longnet-torch[triton]'" in launch.refusal(torch.device("cuda"), torch.bfloat16, 64)


SPILLED_BYTES = 256  # a program; measured ones are in benchmarks/results/triton_kernels.jsonl
# Measured on an H100: the same kernel takes 1.8 times as long in the blocks that others get (h100.jsonl).
SPILLED_ON_HOPPER = {("backward_keys", 128): 512}
# Of sm_86, the least of all with tensor cores for bfloat16; Hopper's own blocks are larger.
SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90a": 227 * 1024, "sm_100a": 99 * 1024}


def assert_within_bounds(row):
    is_own = row["architecture"] == "sm_90a" and row["dtype"] != "float32"
    spilled = SPILLED_ON_HOPPER.get((row["kernel"], row["head_dim"]), SPILLED_BYTES) if is_own else SPILLED_BYTES
    assert row["spilled_bytes"] <= spilled, row
    assert row["shared_bytes"] <= SHARED_BYTES[row["architecture"]], row
    assert row["narrow_loads"] == 0, row
    assert row["wide_loads"] > 0, row
    if row["dtype"] != "float32" and not row["kernel"].startswith("combine"):  # which multiplies no matrices
        assert row["tensor_core"] != "none", row


@pytest.mark.parametrize(
    ("architecture", "kernel", "dtype", "head_dim"),
    [
        (90, "attend", torch.bfloat16, 128),
        (90, "backward_queries", torch.bfloat16, 128),
        (90, "backward_keys", torch.bfloat16, 128),
        (80, "attend", torch.bfloat16, 64),
        (100, "attend", torch.float16, 64),
        (90, "attend, halo", torch.bfloat16, 128),
        (90, "decode", torch.bfloat16, 128),
        (90, "combine", torch.bfloat16, 128),
        (90, "combine, sum", torch.bfloat16, 128),
    ],
)
def test_compiled_without_a_gpu(architecture, kernel, dtype, head_dim, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made, compile_once = [], triton.compile
    monkeypatch.setattr(
        triton, "compile", lambda *args, **kwargs: made.append(compile_once(*args, **kwargs)) or made[0]
    )
    assert_within_bounds(kernels.compile_one(architecture, kernel, dtype, head_dim))
    if kernel == "backward_keys":  # which stores nothing but rows
        assert not re.search(r"st\.global(?!\S*\.v)\S*\.b32", made[0].asm["ptx"]), "sums are stored 4 bytes at a time"


def test_the_table_of_compiled_kernels_is_whole_and_within_bounds():
    file = Path(__file__).parents[3] / "benchmarks/results/triton_kernels.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = {(row["architecture"], row["kernel"], row["dtype"], row["head_dim"]) for row in rows}
    wanted = {
        (f"sm_{architecture}{'a' * (architecture > 80)}", kernel, str(dtype).removeprefix("torch."), head_dim)
        for architecture, kernel, dtype, head_dim in kernels.cases()
    }
    assert found == wanted
    for row in rows:
        assert_within_bounds(row)
        assert "dirty" not in row["commit"]
        assert not (row["kernel"].startswith("combine") and row["spilled_bytes"]), row
        blocks = kernels.blocks_of(
            int(row["architecture"].removeprefix("sm_").rstrip("a")),
            row["kernel"],
            getattr(torch, row["dtype"]),
            row["head_dim"],
        )
        assert blocks == tuple(row[name] for name in blocks._fields), "compiled with other blocks than are launched"
