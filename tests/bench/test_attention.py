"""The benchmark's gate, its rows, and the memory bar, which needs no quiet machine."""

import dataclasses
import json

import pytest
import torch

from longnet import DilationPattern
from longnet.bench import attention, record

CPU = torch.device("cpu")
SMALL = attention.Settings(
    lengths=(300,),
    dense_query_lengths=(300,),
    token_lengths=(2100, 4200),
    memory_length=65536,
    tile_rows=(128, 256),
    num_heads=3,
    head_dim=16,
    repeats=1,
)


@pytest.mark.parametrize("queries", ["kept", "all"])
def test_every_case_gives_a_row(queries):
    pattern = DilationPattern((64, 128), (1, 6), queries=queries)
    rows = [*attention.compare(300, pattern, SMALL, CPU), *attention.per_token(SMALL, CPU)]
    of_pattern = {"kept": "compare", "all": "dense_queries"}[queries]
    assert [row["case"] for row in rows] == [of_pattern, "per_token", "per_token"]
    assert rows[0]["flop_ratio"] == pytest.approx(300 * 301 / 2 * 3 * 64 / rows_flops(rows[0]))
    # One round: the medians are that round's.
    assert rows[0]["forward_speedup"] == rows[0]["forward_dense_s"] / rows[0]["forward_dilated_s"]
    assert rows[0]["both_over_bare"] == rows[0]["both_dilated_s"] / rows[0]["both_bare_s"]
    assert rows[0]["both_share_of_ideal"] == pytest.approx(rows[0]["both_speedup"] / rows[0]["flop_ratio"])
    assert rows[1]["over_shortest"] == 1


def rows_flops(row):
    return DilationPattern.parse(row["pattern"]).flops(tokens=300, num_heads=3, head_dim=16, is_causal=True)


def test_tiles_are_rated_against_the_longest():
    short, long = attention.tiles(SMALL, CPU)
    assert (short["tokens"], long["tokens"]) == (128, 256)
    assert long["full_rate_over_longest"] == long["causal_rate_over_longest"] == 1
    for kind in ("full", "causal"):  # one round: the ratio of medians is the median of ratios
        assert short[f"{kind}_rate_over_longest"] == pytest.approx(short[f"{kind}_gflops"] / long[f"{kind}_gflops"])


def test_large_logits_cost_gradients_a_digit():
    """What docs/design.md says: p = exp(s − lse) inherits |s| roundings of s."""
    unit, large = attention.accuracy(CPU)
    assert unit["largest_logit"] < 10
    assert large["largest_logit"] == pytest.approx(120, rel=0.1)
    assert max(unit["out_error"], unit["gradient_error"]) < 2e-6
    assert 1e-6 < large["gradient_error"] < 5e-5


def test_memory_stays_under_the_bar():
    row = attention.memory(dataclasses.replace(SMALL, num_heads=4, head_dim=64), CPU)
    assert row["qkv_out_bytes"] == 4 * 4 * 65536 * 4 * 64
    assert 0.25 <= row["growth_over_qkv_out"] <= 0.65  # the output alone is a quarter


@pytest.mark.parametrize("wrong", ["out", "dq"])
def test_the_gate_stops_a_wrong_result(wrong, monkeypatch):
    pattern = DilationPattern((64, 128), (1, 2))
    tensors = attention._tensors(300, SMALL, CPU)
    gathered = attention.gather(*tensors, pattern)
    attention.gate(*tensors, pattern, gathered)  # the right result passes
    right = attention.dilated_attention

    def slightly_off(q, k, v, pattern, **keywords):
        out = right(q, k, v, pattern, **keywords)
        return out + 1e-3 * out.detach() if wrong == "out" else out + 1e-3 * (q - q.detach())

    monkeypatch.setattr(attention, "dilated_attention", slightly_off)
    with pytest.raises(attention.GateError, match=f"{wrong} is off by"):
        attention.gate(*tensors, pattern, gathered)


def test_rows_are_appended_with_their_provenance(tmp_path):
    path = tmp_path / "results" / "attention.jsonl"
    for number in range(2):
        record.append([{"case": "x", "number": number}], path, CPU)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1]
    assert {"date", "commit", "device", "threads", "torch", "python"} <= rows[0].keys()
    assert rows[0]["torch"] == torch.__version__


def test_the_fastest_dense_kernel_is_one_that_the_device_has(monkeypatch):
    """Not every GPU has cuDNN's attention, nor FlashAttention; running out of memory is no refusal."""
    device, times = torch.device("cuda"), {"CUDNN_ATTENTION": 1.0, "FLASH_ATTENTION": 2.0}

    def seconds(call, _):
        return call()

    def with_kernel(kernel, _):
        if isinstance(times[kernel.name], Exception):
            raise times[kernel.name]
        return times[kernel.name]

    monkeypatch.setattr(attention, "duration", seconds)
    monkeypatch.setattr(attention, "_with_kernel", with_kernel)
    names = []
    for refused in ((), ("CUDNN_ATTENTION",), tuple(times)):
        times |= dict.fromkeys(refused, RuntimeError("No available kernel"))
        names.append(attention._fastest_dense(lambda: None, device)[0])
    assert names == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "PyTorch's choice"]
    times["CUDNN_ATTENTION"] = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        attention._fastest_dense(lambda: None, device)
