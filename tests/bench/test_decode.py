"""The decoding benchmark: its gate, its rows, and what a step does at any position, counted rather than timed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from longnet.bench import decode
from longnet.cli.main import main
from longnet.model.versions import CACHE

CPU = torch.device("cpu")
SMALL = decode.Settings(
    contexts=(256, 4096, 10**9 - 1), dense_contexts=(256,), segment_length=64, hidden_size=128, layers=1, steps=8,
    repeats=1, gate_tokens=300,
)  # fmt: skip


def model_of(pattern):
    torch.manual_seed(0)
    config = LongNetConfig.preset(
        "tiny", position_embedding="rope", segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
    )  # fmt: skip
    return LongNetForCausalLM(config).eval()


class Work(TorchDispatchMode):
    """Counts operators, bytes they allocate, and rows of keys that attention reads."""

    def __init__(self):
        super().__init__()
        self.calls = self.rows = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if "flash_attention" in str(func):
            self.rows += args[1].shape[1] * args[1].shape[2]
        elif isinstance(out, torch.Tensor):
            held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, out.nbytes)
        return out


def work(model, position, steps):
    cache = decode.as_if_read(model, position)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        with Work() as counted:
            for _ in range(steps):
                model(ids, **{CACHE: cache})
    return counted


def test_a_step_does_the_same_at_any_position():
    """Operators, keys read and memory of 256 steps, which are whole segments of the first branches."""
    model = model_of(DilationPattern.geometric(64, 2**30))
    at = {name: work(model, position - 1, 256) for name, position in (("4K", 2**12), ("1M", 2**20), ("1G", 10**9 - 63))}
    assert at["1M"].calls <= 1.15 * at["4K"].calls
    assert at["1G"].calls <= 1.15 * at["1M"].calls
    assert at["1M"].rows <= 1.3 * at["4K"].rows  # wide branches are full only later
    assert at["1G"].rows <= 1.3 * at["1M"].rows
    # Some twice the first branch's mean of 32 keys a head and layer, not the 1,600 rows of the state.
    assert at["1G"].rows / 256 / (2 * 4) <= 2.6 * 64
    assert at["4K"].largest == at["1M"].largest <= 320 * 4


def test_rows_and_gate():
    rows = list(decode.run(SMALL, CPU))
    assert [(row["cache"], row["context"]) for row in rows] == [
        *[(name, n) for name in ("dilated", "dilated, all queries") for n in (256, 4096, 10**9 - 1)], ("dense", 256),
    ]  # fmt: skip
    assert rows[0]["over_shortest"] == rows[3]["over_shortest"] == rows[6]["over_shortest"] == 1
    assert {row["cache_bytes"] for row in rows[:6]} == {2 * 128 * 4 * 25 * 64}
    assert rows[6]["cache_bytes"] == rows[6]["dense_bytes"] == 2 * 128 * 4 * 256
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_the_gate_stops_a_wrong_result(monkeypatch):
    model = model_of(DilationPattern((16, 64), (1, 4)))
    decode.gate(model, 150)
    keep = decode.DilatedCache.get_seq_length
    monkeypatch.setattr(decode.DilatedCache, "get_seq_length", lambda *a: keep(*a) + (keep(*a) > 120))
    with pytest.raises(decode.GateError, match="off by"):
        decode.gate(model, 150)


def test_the_bytes_of_known_shapes():
    rows = {(row["shape"], row["tokens"]): row for row in decode.cache_bytes()}
    assert rows["LongNet-125M", 2**15]["dense_bytes"] == 2 * 12 * 12 * 64 * 2 * 2**15
    assert rows["Llama-8B", 2**15]["dense_bytes"] == 2 * 32 * 8 * 128 * 2 * 2**15
    branches = [-(-min(2048 << n, 2**15) // (1 << n)) for n in range(20)]
    assert rows["LongNet-125M", 2**15]["dilated_bytes"] == 2 * 12 * 12 * 64 * 2 * sum(branches)
    assert rows["Llama-8B", 10**9]["times_less"] > 24_000


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(decode, "QUICK", SMALL)
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "decode", "--quick", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    printed = capsys.readouterr().out
    assert "33.5 TiB" in printed
    assert "999,999,999" in printed
    assert len((tmp_path / "decode.jsonl").read_text().splitlines()) == 7
    assert json.loads((tmp_path / "decode.jsonl").read_text().splitlines()[0])["commit"]


def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "decode", "--sizes"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if "iB" in line]
    page = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()
    shown = [line.replace("|", " ").split() for line in page.splitlines() if line.startswith(("| LongNet", "| Llama"))]
    assert len(printed) == 6
    assert printed == shown
