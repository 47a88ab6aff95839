"""Nothing that cost work is removed on an error that may pass.

| source | instance | right value |
|---|---|---|
| huggingface/datasets#6172 | `prepare hf:x` resumed without a network: all tokens deleted | they stay; it goes on |
| tried here | a read error of the disk, taken for a damaged file | likewise |
| tried here | `.unfinished/state.json` damaged: "Expecting value: line 1 …" | one line; `--overwrite` begins anew |
"""

import errno
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from longnet.data import assembly, content, reading
from longnet.data.shards import TokenData


@pytest.fixture(autouse=True)
def _eagerly(monkeypatch, tmp_path):
    monkeypatch.setattr(assembly, "_SAVE_SECONDS", 0)
    monkeypatch.setattr(reading, "BATCH_BYTES", 1000)
    monkeypatch.chdir(tmp_path)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    "failure", [ConnectionError("reset by peer"), RuntimeError("timed out"), ValueError("offline")]
)
@pytest.mark.parametrize("when", ["while reading", "on resuming"])
def test_a_lost_connection(call, monkeypatch, capsys, failure, when):
    rows, fails = [{"text": f"row {n} " * 20} for n in range(200)], True
    calls = 0

    def generate():
        for number, row in enumerate(rows):
            if fails and number == 150:
                raise failure
            yield row

    def load_dataset(*_, **__):
        nonlocal calls
        calls += 1
        if calls == 2 and when == "on resuming":
            raise failure
        return datasets.IterableDataset.from_generator(generate)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ("prepare", "hf:owner/name", "-o", "data", "--validation", "0")
    for _ in range(2):
        assert call(*arguments) == 2
        assert "the hub is not reachable" in one_line(capsys)
        state = json.loads(Path("data/.unfinished/state.json").read_text())
        assert state["writer"]["train"]["tokens"] > 10_000
    fails = False
    assert call(*arguments) == 0
    split = TokenData.open(Path("data")).train
    expected = b"".join(row["text"].encode() + b"\0" for row in rows)
    assert np.array_equal(np.where(split.read(0, split.tokens) == 256, 0, split.read(0, split.tokens)), [*expected])


class Failing(io.BufferedReader):
    """A file on a disk that fails after so many bytes."""

    left = 10**9

    def _look(self):
        if self.tell() > Failing.left:
            raise OSError(errno.EIO, "Input/output error")

    def readline(self, *arguments):
        self._look()
        return super().readline(*arguments)

    def __next__(self):
        self._look()
        return super().__next__()

    def read(self, *arguments):
        self._look()
        return super().read(*arguments)


@pytest.mark.parametrize("name", ["x.jsonl", "x.fa"])
def test_a_disk_that_fails_for_a_while(call, monkeypatch, capsys, name):
    lines = [json.dumps({"text": "word " * 30}) if name == "x.jsonl" else f">{n}\n" + "ACGT" * 30 for n in range(300)]
    Path(name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(content.io, "BufferedReader", Failing)
    monkeypatch.setattr(Failing, "left", 30_000)
    arguments = ("prepare", name, "-o", "data", "--validation", "0")
    assert call(*arguments) == 2
    assert "Input/output error" in one_line(capsys)
    state = json.loads(Path("data/.unfinished/state.json").read_text())
    assert state["writer"]["train"]["tokens"] > 5000
    monkeypatch.setattr(Failing, "left", 10**9)
    assert call(*arguments) == 0
    assert TokenData.open(Path("data")).train.tokens == 300 * (121 if name == "x.fa" else 151)


def test_what_is_wrong_in_the_input_leaves_no_rest(call, capsys):
    Path("x.jsonl").write_text(json.dumps({"text": "word " * 1000}) + "\nno\n")
    assert call("prepare", "x.jsonl", "-o", "data") == 2
    assert "line 2 is not JSON" in one_line(capsys)
    assert not Path("data").exists()


@pytest.mark.parametrize("damage", ["", "null", "[1]", '{"identity": 3}'])
def test_a_damaged_state(call, capsys, damage):
    Path("x.txt").write_text("text " * 100)
    Path("data/.unfinished").mkdir(parents=True)
    Path("data/.unfinished/state.json").write_text(damage)
    arguments = ("prepare", "x.txt", "-o", "data", "--validation", "0")
    assert call(*arguments) == 2
    assert one_line(capsys) == (
        "longnet: data/.unfinished/state.json is damaged, so that the work begun there cannot go on: begin it anew "
        "with --overwrite\n"
    )
    assert call(*arguments, "--overwrite") == 0
    assert TokenData.open(Path("data")).train.tokens == 501
