"""Which kernel is taken, why the others are not, and how little it costs to ask."""

import functools
import logging
import time

import pytest
import torch

from longnet import DilationPattern, dilated_attention
from longnet.attention.backends import cuda, dispatch
from longnet.attention.merge import merge_
from longnet.attention.plan import Tile
from longnet.attention.sparse_fixed import SparseFixedPattern, sparse_fixed_attention

CUDA = torch.device("cuda")


class Machine:
    """A GPU to believe in."""

    def __init__(self, monkeypatch):
        self._patch = monkeypatch
        self.is_a((9, 0))
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        for kernel in (cuda.CuDNN, cuda.FlashCUDA, cuda.Efficient):
            monkeypatch.setattr(kernel, "is_enabled", lambda self: True)

    def is_a(self, capability):
        self._patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    def refusal(self, name, dtype=torch.bfloat16, head_dim=64):
        return dispatch.refusals(CUDA, dtype, head_dim).get(name, "")


@pytest.fixture
def machine(monkeypatch):
    for name in ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"):
        monkeypatch.delenv(name, raising=False)
    dispatch._choose.cache_clear()
    yield Machine(monkeypatch)
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "general", "repeated"),
    [
        (torch.bfloat16, 64, "flash (CUDA)", "cuDNN, flash (CUDA)"),
        (torch.bfloat16, 192, "flash (CUDA)", "flash (CUDA)"),
        (torch.float32, 64, "memory-efficient (CUDA)", "memory-efficient (CUDA)"),
        (torch.float64, 64, "math", "math"),
        (torch.bfloat16, 20, "math", "math"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_the_fastest_kernels_that_can_run_are_taken(dtype, head_dim, general, repeated):
    kernels = dispatch.choose("auto", CUDA, dtype, head_dim)
    assert (kernels.general.name, kernels.repeated.name) == (general, repeated)


def test_a_tile_of_one_row_or_of_no_whole_segment_is_the_general_kernels():
    kernels = dispatch.Kernels(cuda.FlashCUDA(), cuda.CuDNN())

    def kernel(q_rows, k_rows, *, is_whole):
        tile = Tile(0, 0, 0, 0, q_rows, 1, 0, k_rows, 1, False, False, (), is_whole=is_whole)
        return kernels.of(tile).name

    assert kernel(8, 8, is_whole=True) == "cuDNN"
    assert kernel(8, 8, is_whole=False) == "flash (CUDA)"
    assert kernel(1, 8, is_whole=True) == "flash (CUDA)"
    assert kernel(8, 1, is_whole=True) == "flash (CUDA)"


@pytest.mark.parametrize(
    ("capability", "is_refused"),
    [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((10, 3), False), ((12, 0), True)],
)
def test_cudnn_on_the_capabilities_that_pytorch_prefers_it_on(machine, capability, is_refused):
    machine.is_a(capability)
    assert bool(machine.refusal("cuDNN")) is is_refused


def test_cudnn_has_pytorchs_own_conditions(machine, monkeypatch):
    assert machine.refusal("cuDNN") == ""
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "version", lambda: 91500)
        assert "after version 9.15.0" in machine.refusal("cuDNN")
    for name in ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert name in machine.refusal("cuDNN")
            patch.setenv(name, "0")
            assert machine.refusal("cuDNN") == ""
    torch.use_deterministic_algorithms(True)
    assert "not deterministic" in machine.refusal("cuDNN")
    assert dispatch.choose("auto", CUDA, torch.bfloat16, 64).repeated.name == "flash (CUDA)"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert machine.refusal("cuDNN") == ""
    assert dispatch.choose("auto", CUDA, torch.bfloat16, 64).repeated.name == "cuDNN, flash (CUDA)"


def test_rocm_has_no_cudnn(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.refusal("cuDNN") == "is not part of ROCm"
    assert machine.refusal("flash (CUDA)") == ""


@pytest.mark.parametrize(("dtype", "is_refused"), [(torch.bfloat16, True), (torch.float16, False)])
def test_bfloat16_needs_ampere(machine, dtype, is_refused):
    machine.is_a((7, 5))
    assert bool(machine.refusal("memory-efficient (CUDA)", dtype)) is is_refused
    kernels = dispatch.choose("auto", CUDA, dtype, 64)
    assert kernels.general.name == ("math" if is_refused else "memory-efficient (CUDA)")


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_flash_cannot_go_backward_with_some_head_dims_on_consumer_cards(machine, capability):
    machine.is_a(capability)
    for head_dim, is_refused in ((192, False), (200, True), (224, True), (232, False), (256, False)):
        assert bool(machine.refusal("flash (CUDA)", head_dim=head_dim)) is is_refused
        machine_a100 = machine.refusal("flash (CUDA)", head_dim=head_dim)
        assert is_refused == ("200 to 224" in machine_a100)
    machine.is_a((8, 0))
    assert machine.refusal("flash (CUDA)", head_dim=200) == ""


def test_why_a_kernel_is_not_taken(machine, monkeypatch):
    assert machine.refusal("flash (CPU)") == "runs on the CPU, not on cuda"
    assert machine.refusal("cuDNN", torch.float32) == "has no torch.float32"
    machine.is_a((7, 5))
    assert "needs compute capability (8, 0), got (7, 5)" in machine.refusal("flash (CUDA)", torch.float16)
    monkeypatch.setattr(cuda.Efficient, "is_enabled", lambda self: False)
    assert "switched off" in machine.refusal("memory-efficient (CUDA)", torch.float16)


@pytest.mark.usefixtures("machine")
def test_auto_says_once_what_it_took(caplog):
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        for _ in range(3):
            dilated_attention(*torch.randn(3, 1, 1, 8, 24), DilationPattern((4,), (1,)))
        dispatch.choose("auto", CUDA, torch.bfloat16, 64)
    on_cpu, on_cuda = (record.getMessage() for record in caplog.records if "kernel" in record.getMessage())
    assert "kernel flash (CPU)" in on_cpu
    assert "cuDNN runs on CUDA, not on cpu" in on_cpu
    assert "kernel cuDNN for whole segments, flash (CUDA) for all else" in on_cuda


def test_tiles_are_not_the_fused_kernels():
    q = torch.zeros(1, 1, 8, 16)
    with pytest.raises(ValueError, match='backend="triton" computes dilated_attention as one'):
        sparse_fixed_attention(q, q, q, SparseFixedPattern(4, 1), backend="triton")


def test_what_nothing_can_run_is_refused_with_every_reason():
    q = torch.zeros(1, 1, 8, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"cannot run on torch.float8_e4m3fn.*CPU\) has no.*math has no.*Cast"):
        dilated_attention(q, q, q, DilationPattern((4,), (1,)))


def test_merging_in_one_launch_has_to_prove_itself(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="longnet")
    monkeypatch.setattr(dispatch.launch, "is_installed", lambda: True)
    assert dispatch.merge_on(torch.device("cpu"), torch.float32) is merge_
    for error, taken in ((1e-7, dispatch.launch.merge_), (0.1, merge_)):
        monkeypatch.setattr(dispatch, "_disagreement", lambda _, error=error: error)
        dispatch._float32_merge_on.cache_clear()
        assert dispatch.merge_on(CUDA, torch.float32) is taken
        assert dispatch.merge_on(CUDA, torch.float64) is merge_, "the launch sums in float32"
    assert "was off by 1.0e-01; plain PyTorch merges" in caplog.text
    assert "merging in one launch on cuda: agrees to 1.0e-07" in caplog.text

    dispatch._float32_merge_on.cache_clear()


def test_a_launch_that_cannot_be_compiled_is_left_aside(monkeypatch, caplog):
    errors = pytest.importorskip("triton.errors")
    for error in (RuntimeError("Failed to find C compiler"), errors.TritonError("ptxas failed")):

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(dispatch, "_disagreement", fail)
        dispatch._float32_merge_on.cache_clear()
        assert dispatch.merge_on(CUDA, torch.float32) is merge_
        assert f"could not run: {error}; plain PyTorch merges" in caplog.text
    dispatch._float32_merge_on.cache_clear()


def _seconds(function):
    """Processor time of a call: the least of ten batches, which other processes cannot make less."""
    times = []
    for _ in range(10):
        start = time.thread_time()
        for _ in range(500):
            function()
        times.append((time.thread_time() - start) / 500)
    return min(times)


@pytest.mark.usefixtures("machine")
def test_asking_for_a_kernel_costs_what_a_few_lookups_cost(monkeypatch):
    """It is asked at every call: 11 µs and more to find out, half a µs from a cache. A bare lookup is the measure."""

    @functools.lru_cache(maxsize=256)
    def look_up(*key):
        return key

    kind = "auto", CUDA, torch.bfloat16, 64
    lookup = _seconds(lambda: look_up(*kind))
    assert _seconds(lambda: dispatch.choose(*kind)) < 30 * lookup
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_choose", dispatch._choose.__wrapped__)
        assert _seconds(lambda: dispatch.choose(*kind)) > 60 * lookup  # so the bar shows it
