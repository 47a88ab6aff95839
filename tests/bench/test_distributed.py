"""The benchmark across processes: its gate, its rows, and what its command prints."""

import json
import sys

import pytest

from longnet.bench import distributed
from longnet.cli.main import main
from ranks import run_ranks

SMALL = distributed.Settings(tokens_per_rank=150, segment_length=32, hidden_size=64, layers=2, repeats=1)


def test_the_command(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(distributed, "QUICK", SMALL)
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "distributed", "--quick", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    captured = capfd.readouterr()  # of the ranks' processes, too
    assert "no head keeps" not in captured.err
    printed = " ".join(captured.out.split())
    rows = [json.loads(line) for line in (tmp_path / "distributed.jsonl").read_text().splitlines()]
    assert [(row["case"], row["ranks"]) for row in rows] == [
        ("scaling", 2), ("traffic", 2), ("memory", 1), ("memory", 2),
    ]  # fmt: skip
    assert all(row["commit"] and row["threads"] == 1 and row["tokens_per_rank"] == 150 for row in rows)
    scaling, traffic, alone, both = rows
    assert f"weak scaling 1 → 2: {scaling['efficiency']:.1%}" in printed
    # One round: the medians are that round's.
    assert scaling["efficiency"] == scaling["alone_s"] / scaling["together_s"]
    assert scaling["efficiency_side_by_side"] == scaling["side_by_side_s"] / scaling["together_s"]
    assert scaling["tokens_per_second"] == pytest.approx(300 / scaling["together_s"])
    # The second slice sees the rows of the first one besides its own: more work, by less than the whole of a branch.
    assert 1 < scaling["flops_over_alone"] < 1.5

    # Slices of 150 cut segments of 32, 64 and 128 after 22 positions, the wide ones after 150: kept rows of one head.
    cut = 22 + 11 + 6 + 150 // 8 + 1 + -(-150 // 16) + -(-150 // 32)
    assert scaling["pattern"] == "32:1,64:2,128:4,256:8,512:16,1024:32"
    row_bytes = 2 * 64 * 4
    assert traffic["forward_bytes"] == traffic["closed_form_bytes"] == [0, 2 * cut * row_bytes]
    assert traffic["backward_bytes"] == [2 * cut * row_bytes, 0]  # to the rank that has sent the rows

    assert [len(row["peak_bytes"]) for row in (alone, both)] == [1, 2]
    for row in (alone, both):
        assert all(peak > step >= 0 for peak, step in zip(row["peak_bytes"], row["step_bytes"], strict=True))


def test_the_gate_stops_a_wrong_result(tmp_path):
    for wrong_result, wrong_bytes in run_ranks("parallel_checks:bench_gate", 2, tmp_path, SMALL):
        assert "is off by" in wrong_result
        assert "300 tokens on 2 ranks" in wrong_result
        assert "a layer and direction were expected" in wrong_bytes


def test_what_a_rank_refuses_reaches_the_command(monkeypatch, capsys, tmp_path):
    def refuse(settings):
        raise distributed.GateError("loss is off by 1.0e+00 (relative); not timed")
        yield

    monkeypatch.setattr(distributed, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "distributed", "--quick", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="longnet: loss is off by"):
        main()
    assert not (tmp_path / "distributed.jsonl").exists()
