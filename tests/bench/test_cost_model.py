"""The model of costs: what can be counted agrees with what is counted elsewhere."""

import contextlib
import sys

import pytest

from longnet import DilationPattern
from longnet.bench import cost_model
from longnet.cli.main import main

H100 = cost_model.DEVICES["h100"]


def rows(pattern=None, tokens=32768):
    found = cost_model.costs(H100, tokens, pattern or DilationPattern.paper(), num_heads=32, head_dim=64)
    return {(row["path"], row["way"]): row for row in found}


def test_flops_are_the_patterns_and_launches_those_of_the_plan():
    found = rows()
    useful = DilationPattern.paper().flops(tokens=32768, num_heads=32, head_dim=64, is_causal=True)
    assert found["tiles", "forward"]["flops"] == found["fused", "forward"]["flops"] == useful
    # 15 calls, as test_cuda.py counts them, what puts their parts together, and addresses sent.
    assert (found["tiles", "forward"]["launches"], found["tiles", "backward"]["launches"]) == (17, 64)
    assert (found["fused", "forward"]["launches"], found["fused", "backward"]["launches"]) == (1, 2)


def test_bytes_of_a_branch_of_rate_one_are_those_of_a_dense_kernel_and_a_copy():
    row = rows(DilationPattern((2048,), (1,)))["tiles", "forward"]
    # q, k, v read and a part written in 16 bits; that read and written in 16 bits
    assert row["bytes"] == 32768 * 32 * 64 * (4 * 2 + (2 + 2))


def test_bytes_of_all_queries_are_those_of_merges_in_float32():
    row = rows(DilationPattern((2048, 8192), (1, 4), queries="all"))["tiles", "forward"]
    # a dense kernel's, its output copied to float32; the same against a quarter of the keys, merged; a cast
    assert row["bytes"] == 32768 * 32 * 64 * ((8 + 2 + 4) + (2 * 2 / 4 + 2 + 2 + (2 + 4 + 4)) + (4 + 2))


def test_no_path_is_better_than_ideal_and_waste_is_no_gain():
    for row in rows().values():
        assert 0 < row["of_ideal"] <= 1
        assert row["computed_over_useful"] >= 1
        assert row["model_speedup"] == pytest.approx(row["of_ideal"] * row["flop_ratio"])


def test_the_command_prints_a_row_for_each_path(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "attention", "--model", "h100"])
    with contextlib.suppress(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "not measured" in said
    assert said.count("fused") == said.count("tiles") == 16


def test_a_device_that_is_not_known_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "attention", "--model", "h10"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "longnet: --model must be one of h100, a100, got 'h10'" in capsys.readouterr().err
