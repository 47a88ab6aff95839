"""The model of costs: what can be counted agrees with what is counted elsewhere."""

import contextlib
import sys

import pytest
import torch

from longnet import DilationPattern
from longnet.attention import combined, halo
from longnet.attention.backends import cuda, dispatch
from longnet.attention.backends.triton import launch
from longnet.bench import cost_model, cost_model_calls
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


def slice_on_meta(backend):
    """Compute one rank's slice on meta tensors, its own part and its halo, forward and backward."""
    pattern, tokens, ranks, heads = DilationPattern.paper(), 2**15, 8, 16
    layout = cost_model_calls.slice_layout(tokens, ranks, 5, pattern, heads)
    shape = (1, tokens // ranks, heads, 64)
    q, k, v, dout = (torch.empty(shape, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "qkvo")
    rows = torch.empty(2, 1, heads, layout.halo_rows, 64, dtype=torch.bfloat16, device="meta")
    with cost_model_calls._Launches("meta") as there:
        out, lse = halo.attend(backend, layout.tiles, q, k, v, lambda: rows, None, scale=0.1)
    with cost_model_calls._Launches("meta") as back:
        grads = halo.differentiate(backend, layout.tiles, dout, q, k, v, rows, out, lse, scale=0.1, tell=lambda _: None)
        for grad in grads[:3]:
            grad.to(q.dtype)
    return layout, there.counts, back.counts


def test_launches_and_bytes_of_a_slice_are_those_counted(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    kernels = dispatch.Kernels(cuda.FlashCUDA(), cuda.FlashCUDA())
    combined_, moved = launch.combine, []

    def count(parts, out, lse, *rest, **more):
        moved.append(sum(part.out.nbytes for part in parts) + out.nbytes)
        combined_(parts, out, lse, *rest, **more)

    monkeypatch.setattr(dispatch, "choose", lambda *_: kernels)
    monkeypatch.setattr(combined, "_combines_on", lambda _: True)
    monkeypatch.setattr(launch, "_launch", lambda *_, **__: None)
    monkeypatch.setattr(launch, "combine", count)
    slice_on_meta("auto")  # and once more, since the first call sends tables
    moved.clear()
    layout, there, back = slice_on_meta("auto")
    assert layout.tiles.halo
    modelled = [cost_model_calls.slice_launches(layout, "tiles", way, 2**12, 16) for way in ("forward", "backward")]
    zeros = sum(count for name, count in back.items() if "zero" in name)
    assert there.total() + 1 == modelled[0], there
    assert back.total() + 3 - zeros == modelled[1], back
    own, of_halo, rows = layout.tiles.own, layout.tiles.halo, 16 * 2**12
    assert moved[0] == 64 * cost_model.combined_bytes("forward", (*own, *of_halo), rows)
    # Of the keys at hand gradients are written in float32: other ranks' shares are added to them.
    parts = cost_model.combined_bytes("backward", own, rows) + sum(2 * cost_model.rows_of(tile)[0] for tile in of_halo)
    assert sum(moved[1:]) == 64 * (parts + 2 * 2 * rows)


def test_launches_of_a_slice_on_the_fused_kernel(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton: pip install 'longnet-torch[triton]'")
    launched = []
    monkeypatch.setattr(launch, "refusal", lambda *_: None)
    monkeypatch.setattr(launch, "_launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    slice_on_meta("triton")
    assert launched == ["attend"] * 2 + ["backward_queries", "backward_halo", "backward_queries", "backward_keys"]
    found = cost_model_calls.slice_costs(H100, 2**15, 8, DilationPattern.paper(), num_heads=16)
    fused = {row["way"]: row["launches"] for row in found if row["path"] == "fused"}
    assert fused == {"forward": 2 + 1, "backward": 4 + 1 + 3}  # the halo's share of dq, and casts


def test_a_slice_exchanges_the_rows_of_its_halo():
    rows = list(cost_model_calls.slice_costs(H100, 2**15, 8, DilationPattern.paper(), num_heads=16))
    layouts = [cost_model_calls.slice_layout(2**15, 8, rank, DilationPattern.paper(), 16) for rank in range(8)]
    assert 0 < rows[0]["exchanged"] <= 2 * 2 * 128 * max(sum(layout.sent_counts) for layout in layouts)
    pairs = sum(layout.tiles.pairs for layout in layouts)
    whole = DilationPattern.paper().flops(tokens=2**15, num_heads=16, head_dim=128, is_causal=True)
    assert 4 * 128 * pairs == whole  # ranks share the work of one
    assert all(0 < row["of_ideal"] <= 1 for row in rows)


@pytest.mark.parametrize(("queries", "launches"), [("kept", 22), ("all", 62)])
def test_a_token_is_one_launch_fused_and_many_on_tiles(queries, launches):
    pattern = DilationPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12), queries=queries)
    tiles, fused = cost_model_calls.token_costs(H100, 2**15, pattern, num_heads=32)
    assert (tiles["launches"], fused["launches"]) == (launches, 1)
    before, now = (
        pattern.flops(tokens=tokens, num_heads=32, head_dim=128, is_causal=True) for tokens in (2**15 - 1, 2**15)
    )
    assert tiles["flops"] == fused["flops"] == now - before
    assert all(0 < row["of_ideal"] <= 1 for row in (tiles, fused))


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
    assert said.count("fused") == said.count("tiles") == 23


def test_a_device_that_is_not_known_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longnet", "bench", "attention", "--model", "h10"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "longnet: --model must be one of h100, a100, got 'h10'" in capsys.readouterr().err
