"""The log of rows: what is written comes back, and rows on a GPU are copied in an order that loses none."""

import os
from types import SimpleNamespace

import pytest
import torch

from cases import DEVICES
from longnet.training import row_log
from longnet.training.row_log import RowLog


class Streams:
    """Stands in for `torch.cuda`: copies wait until somebody waits for them, and all calls are noted."""

    def __init__(self):
        self.calls, self.waiting = [], []

    def Stream(self, device):  # noqa: N802
        self.device = device
        return SimpleNamespace(wait_stream=lambda other: self.calls.append(f"wait for {other}"))

    def Event(self):  # noqa: N802
        number = sum(call.startswith("record") for call in self.calls)

        def synchronize():
            self.calls.append(f"there {number}")
            while self.waiting and self.waiting[0][0] <= number:
                _, to, source = self.waiting.pop(0)
                torch.Tensor.copy_(to, source)

        return SimpleNamespace(
            record=lambda stream: self.calls.append(f"record {number}"), synchronize=synchronize
        )  # fmt: skip

    def current_stream(self, device):
        assert device == self.device
        return f"the rows on {device}"

    def stream(self, stream):
        return _Copying(self)


class _Copying(torch.overrides.TorchFunctionMode):
    def __init__(self, streams):
        super().__init__()
        self.streams = streams

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            number = sum(call.startswith("record") for call in self.streams.calls)
            self.streams.waiting.append((number, *args))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def log(tmp_path, monkeypatch):
    streams = Streams()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: streams.calls.append("hold"))
    real = os.pwrite
    monkeypatch.setattr(
        row_log.os, "pwrite", lambda *arguments: streams.calls.append(f"disk {arguments[2]}") or real(*arguments)
    )
    log = RowLog(tmp_path / "rows", streams)
    log.offsets = {index: (48 * index, 3) for index in range(5)}
    return log, streams


def rows_of(index):
    return torch.arange(12, dtype=torch.float32).view(3, 2, 2) + 100 * index


def test_rows_on_a_gpu_go_to_disk_once_they_have_come_while_the_next_are_on_their_way(log):
    log, streams = log
    for index in range(4):
        log.write(index, rows_of(index))
    log.sync()
    assert streams.calls == [
        "wait for the rows on cpu", "record 0", "hold",
        "wait for the rows on cpu", "record 1", "hold", "there 0", "disk 0",
        "wait for the rows on cpu", "record 2", "hold", "there 1", "disk 48",
        "wait for the rows on cpu", "record 3", "hold", "there 2", "disk 96",
        "there 3", "disk 144",
    ]  # fmt: skip
    assert not streams.waiting
    for index in range(4):
        assert torch.equal(log.read(index, 2, torch.float32), rows_of(index))
    log.close()


def test_what_is_read_has_been_written_first(log):
    log, streams = log
    log.write(4, rows_of(4))
    assert "disk 192" not in streams.calls
    assert torch.equal(log.read(4, 2, torch.float32), rows_of(4))
    log.close()


def test_two_pinned_buffers_are_used_in_turn(log):
    log, streams = log
    for index in range(5):
        log.write(index, rows_of(index))
        assert len(streams.waiting) == 1  # the other buffer's bytes are on disk
    assert len(log._buffers) == 2
    log.sync()
    log.close()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_written_while_the_next_are_computed_come_back(tmp_path, device):
    """A state that each chunk overwrites at once, and rows whose memory is free for the next as they are written."""
    counts = [0, 3000, 1, 4096, 17, 0, *torch.randint(0, 4097, (18,)).tolist()]
    starts = [512 * sum(counts[:index]) for index in range(len(counts))]
    log = RowLog(tmp_path / "rows", torch.cuda if device == "cuda" else None)
    log.offsets = dict(enumerate(zip(starts, counts, strict=True)))
    state = torch.arange(4096 * 128, dtype=torch.float32, device=device).view(4096, 2, 64)
    of_zero, load = state.to("cpu", copy=True), torch.randn(256, 256, device=device)
    for index, count in enumerate(counts):
        for _ in range(10):
            load = (load @ load).tanh()  # the copies fall behind the host, which writes on
        log.write(index, torch.cat([state[: count // 2], state[count // 2 : count]]))
        state += 1
        if index % 7 == 6:
            assert torch.equal(log.read(index, 64, torch.float32), of_zero[:count] + index)
    log.sync()
    for index, count in enumerate(counts):
        assert torch.equal(log.read(index, 64, torch.float32), of_zero[:count] + index)
    log.close()
    assert (tmp_path / "rows").stat().st_size == 512 * sum(counts)


def test_rows_other_than_were_counted_and_a_file_that_ends_are_said(tmp_path):
    log = RowLog(tmp_path / "rows")
    log.offsets = {0: (0, 3), 1: (48, 3)}
    with pytest.raises(ValueError, match="chunk 0 overwrote 2 rows, where 3 were counted"):
        log.write(0, torch.zeros(2, 2, 2))
    log.write(0, rows_of(0))
    assert torch.equal(log.read(0, 2, torch.float32), rows_of(0))
    with pytest.raises(OSError, match="ends before the rows of chunk 1: it is damaged"):
        log.read(1, 2, torch.float32)
    log.close()
