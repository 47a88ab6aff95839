"""Checkpoints are whole or not there; damage is found, named, and costs one checkpoint."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from longnet.training import checkpoint as module
from longnet.training.checkpoint import (
    Saving,
    find_fault,
    lock_run,
    model_folder,
    newest_whole,
    save_checkpoint,
)


def write(content):
    def into(folder):
        (folder / "config.json").write_text("{}")
        (folder / "state.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "vocab.txt").write_text("a")

    return into


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write(b"x" * 100 * step), keep=0)
    return tmp_path


def test_the_newest_ones_stay(tmp_path):
    for step in (2, 9, 10, 100_000_000):
        folder = save_checkpoint(tmp_path, step, write(b"x"), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-100000000"]
    assert newest_whole(tmp_path) == (folder, [])
    assert model_folder(tmp_path) == folder
    assert model_folder(folder) == folder
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(manifest) == ["config.json", "deeper/vocab.txt", "model.safetensors", "state.json"]
    assert manifest["model.safetensors"]["sha256"].startswith("2d711642b726b044")  # of one x


@pytest.mark.parametrize("name", ["model.safetensors", "deeper/vocab.txt", "manifest.json"])
@pytest.mark.parametrize("kind", ["flipped", "short", "missing"])
def test_damage_is_named_and_the_one_before_is_used(run, name, kind):
    newest, previous = (run / "checkpoints" / f"step-0000000{step}" for step in (3, 2))
    path = newest / name
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        middle = content.find(b'"sha256": "') + 11 if name == "manifest.json" else len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :] if kind == "flipped" else content[:-1])
    if name == "manifest.json" and kind == "short":  # its last byte is white space
        path.write_bytes(content[:-3])
    found = newest_whole(run)
    assert found.whole == previous
    [(damaged, fault)] = found.damaged
    assert damaged == newest
    assert fault == find_fault(newest)
    assert (name in fault) or name == "manifest.json"
    assert model_folder(run) == previous
    with pytest.raises(ValueError, match="is a damaged checkpoint"):
        model_folder(newest)


def test_every_single_byte_of_a_manifest_counts_or_does_not_matter(run):
    path = run / "checkpoints" / "step-00000003" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        fault = find_fault(path.parent)  # never an exception
        assert fault is None or "\n" not in fault


def test_damaged_ones_stay_until_their_step_is_reached_again(run):
    folder = run / "checkpoints"
    for step in (2, 3):
        (folder / f"step-0000000{step}" / "model.safetensors").write_bytes(b"y")
    assert newest_whole(run).whole == folder / "step-00000001"
    save_checkpoint(run, 2, write(b"new"), keep=1)
    assert names(run) == ["step-00000002", "step-00000003"]
    assert newest_whole(run).whole == folder / "step-00000002"
    save_checkpoint(run, 3, write(b"new"), keep=1)
    assert names(run) == ["step-00000003"]
    assert find_fault(folder / "step-00000003") is None


def test_no_whole_one_is_an_error_that_names_each(run):
    for step in (1, 2, 3):
        (run / "checkpoints" / f"step-0000000{step}" / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"no whole checkpoint: step-00000003: config.json has 1 bytes instead of 2; st"
    ):
        model_folder(run)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        model_folder(run / "nothing")


def test_a_full_disk_costs_nothing(run, monkeypatch):
    def fill(folder):
        (folder / "model.safetensors").write_bytes(b"x" * 50)
        raise OSError(28, os.strerror(28))

    before = names(run)
    with pytest.raises(OSError, match=r"checkpoint of step 4 .* the disk is full; the previous one, .*3, is whole"):
        save_checkpoint(run, 4, fill, keep=1)
    assert names(run) == before

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(OSError, match="the disk is full") as raised:
        save_checkpoint(run, 4, write(b"x"), keep=1)
    assert "Errno" not in str(raised.value)
    assert names(run) == before


def test_a_really_full_disk_as_safetensors_reports_it(run):
    def fill(folder):
        (folder / "model.safetensors").symlink_to("/dev/full")
        save_file({"a": torch.ones(10_000)}, folder / "model.safetensors")
        (folder / "x").symlink_to("/dev/full")
        with (folder / "x").open("w") as file:
            file.write("x")

    with pytest.raises(OSError, match="the disk is full; the previous one"):
        save_checkpoint(run, 4, fill, keep=1)


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_goes(run):
    folder = run / "checkpoints"
    for name in ("step-00000009.partial", "step-00000001.superseded"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"x")
    assert newest_whole(run).whole == folder / "step-00000003"
    save_checkpoint(run, 4, write(b"x"), keep=2)
    assert names(run) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("at", range(13))
def test_dying_at_any_point_of_saving_leaves_a_whole_one(run, monkeypatch, at):
    """Stop before the at-th change to the folder: sync, rename or removal."""
    calls = 0

    class Died(BaseException):
        pass

    def dying(real):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > at:
                raise Died
            return real(*arguments, **keywords)

        return call

    monkeypatch.setattr(module.Path, "rename", dying(module.Path.rename))
    monkeypatch.setattr(module.os, "fsync", dying(os.fsync))
    monkeypatch.setattr(module.shutil, "rmtree", dying(module.shutil.rmtree))
    try:
        save_checkpoint(run, 4, write(b"new"), keep=1)
    except Died:
        pass
    else:
        assert at >= 12, "fewer changes than expected"
    monkeypatch.undo()
    found = newest_whole(run)
    assert found.damaged == []
    assert found.whole.name in ("step-00000003", "step-00000004")
    save_checkpoint(run, 5, write(b"new"), keep=1)
    assert names(run) == ["step-00000005"]


def test_one_process_at_a_time(tmp_path):
    in_use = f"is in use by process {os.getpid()}: wait for it"
    with lock_run(tmp_path / "RUN"), pytest.raises(ValueError, match=in_use), lock_run(tmp_path / "RUN"):
        pass
    with lock_run(tmp_path / "RUN"):
        pass


def test_a_checkpoint_is_waited_for_with_its_thread(tmp_path):
    """One that frees its copies of the weights while Python shuts down aborts the process: status -6, not 143."""

    class Copies:
        def __del__(self):
            time.sleep(0.2)

    def save_with(copies):
        def save():
            time.sleep(0.2)
            return tmp_path if copies else None

        return save

    saving = Saving()
    saving.start(save_with(Copies()))
    assert saving.wait() == tmp_path
    assert not [thread for thread in threading.enumerate() if thread.name == "saving"]
