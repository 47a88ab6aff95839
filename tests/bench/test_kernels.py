"""`longnet bench kernels` on one kernel, and without Triton."""

import contextlib
import json
import sys

import pytest
import torch

from longnet.attention.backends.triton import launch
from longnet.bench import kernels
from longnet.cli.main import main


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "kernels", *map(str, arguments)])
    with contextlib.suppress(SystemExit):
        main()


def test_the_command_compiles_writes_rows_anew_and_prints_them(capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(kernels, "QUICK", [(90, "decode", torch.bfloat16, 64)])
    (tmp_path / "triton_kernels.jsonl").write_text("from before")
    run(monkeypatch, "--quick", "-o", tmp_path)
    (row,) = map(json.loads, (tmp_path / "triton_kernels.jsonl").read_text().splitlines())
    assert (row["kernel"], row["architecture"], row["dtype"], row["head_dim"]) == ("decode", "sm_90a", "bfloat16", 64)
    assert row["registers"] > 0
    assert row["tensor_core"] == "mma.sync"
    assert {"commit", "torch", "triton"} <= row.keys()
    said = capsys.readouterr().out
    assert "compiled, not run" in said
    line = next(line for line in said.splitlines() if "decode" in line)
    assert line.split()[:6] == ["decode", "sm_90a", "bfloat16", "64", str(row["registers"]), str(row["spilled_bytes"])]
    assert "16 × 64" in line


def test_all_kernels_are_compiled_for_all_architectures():
    found = list(kernels.cases())
    assert set(kernels.QUICK) <= set(found)
    assert {architecture for architecture, *_ in found} == {80, 90, 100}
    assert len(found) == len(set(found)) == 3 * len(kernels.KERNELS) * (5 + 5 + 2)


def test_without_triton_the_extra_is_named_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "is_installed", lambda: False)
    run(monkeypatch, "--quick", "-o", tmp_path)
    assert "longnet: compiling the fused kernels needs Triton: pip install 'longnet-torch[triton]'" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
