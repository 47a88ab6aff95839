"""Nothing that cost work is removed on an error that may pass.

| source | instance | right value |
|---|---|---|
| huggingface/datasets#6172 | `prepare hf:x` resumed without a network: all tokens deleted | they stay; it goes on |
| tried here | a read error of the disk, taken for a damaged file | likewise |
| tried here | `.unfinished/state.json` damaged: "Expecting value: line 1 …" | one line; `--overwrite` begins anew |
| tried here | a state with one wrong number: other tokens, exit 0, or a traceback | likewise |
| tried here | a shard of it missing: a dead end even with `--overwrite`; shorter: all removed | likewise |
| tried here | a stream's state or cache damaged: a traceback, or another loss in silence | one line |
"""

import errno
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from longnet.data import assembly, content, preparation, reading
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
        "longnet: data/.unfinished/state.json is missing or damaged, so that the work begun there cannot go on: "
        "begin it anew with --overwrite\n"
    )
    assert call(*arguments, "--overwrite") == 0
    assert TokenData.open(Path("data")).train.tokens == 501


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with records, their preparation `begun`, stopped after some shards, and `whole`."""
    folder = tmp_path_factory.mktemp("begun")
    with (folder / "x.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"word {n} " * 20}) + "\n" for n in range(150))
    saves, save = 0, assembly._Assembly._save

    def save_and_stop(self, *arguments):
        nonlocal saves
        save(self, *arguments)
        saves += 1
        if saves == 12:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(reading, "BATCH_BYTES", 1000)
        options = preparation.Options(("x.jsonl",), shard_tokens=3000, validation=0.2)
        preparation.prepare(options, Path("whole"), progress=False)
        patch.setattr(assembly, "_SAVE_SECONDS", 0)
        patch.setattr(assembly._Assembly, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(options, Path("begun"), progress=False)
    return folder


PREPARE = ("prepare", "x.jsonl", "--shard-tokens", "3000", "--validation", "0.2", "-o")


def edit(**changes):
    def edited(work):
        state = json.loads((work / "state.json").read_text())
        for place, value in changes.items():
            *path, last = place.split("__")
            inner = state
            for name in path:
                inner = inner[name]
            inner[last] = value
        (work / "state.json").write_text(json.dumps(state))

    return edited


def cut(pattern, *, by):
    def shortened(work):
        path = min(work.glob(pattern))
        path.write_bytes(path.read_bytes()[:-by])

    return shortened


def remove(pattern):
    return lambda work: min(work.glob(pattern)).unlink()


def flip(work):
    path = work / "train-00000.npy"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def to_folder(work):
    (work / "state.json").unlink()
    (work / "state.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (edit(cursor=[-1, 0]), "state.json"),  # other tokens, exit 0
        (edit(cursor=[5, 0]), "state.json"),  # half of the tokens, exit 0
        (edit(cursor=[0, 1.5]), "state.json"),
        (edit(writer={}), "state.json"),
        (edit(writer__train__open_tokens=0), "state.json"),
        (edit(lowest=3), "state.json"),
        (edit(more=1), "state.json"),
        (remove("state.json"), "state.json"),
        (to_folder, "state.json"),
        (cut("train-0*.partial", by=200), "train-0"),
        (remove("train-0*.partial"), "train-0"),
        (cut("train-documents*", by=8), "train-documents"),
        (remove("train-00000.npy"), "train-00000.npy"),
        (cut("train-00000.npy", by=1), "train-00000.npy"),
        (flip, "train-00000.npy"),
    ],
)
def test_damaged_work(call, monkeypatch, capsys, begun, damage, named):
    monkeypatch.chdir(begun)
    monkeypatch.setattr(assembly, "_SAVE_SECONDS", 5)
    shutil.rmtree("data", ignore_errors=True)
    shutil.copytree("begun", "data")
    work = Path("data/.unfinished")
    damage(work)
    left = sum(path.stat().st_size for path in work.rglob("*.npy*"))
    assert call(*PREPARE, "data") == 2
    error = one_line(capsys)
    assert named in error
    assert error.endswith("so that the work begun there cannot go on: begin it anew with --overwrite\n")
    assert sum(path.stat().st_size for path in work.rglob("*.npy*")) >= left
    assert call(*PREPARE, "data", "--overwrite") == 0
    assert TokenData.open(Path("data")).fingerprint == TokenData.open(Path("whole")).fingerprint


@pytest.mark.parametrize("damage", ["number", "missing cache", "cut cache", "flipped cache", "list", "no key"])
def test_a_damaged_stream(call, run_folder, capsys, damage):
    Path("x.txt").write_text("some words and more " * 100)
    arguments = ("stream", run_folder, "x.txt", "-o", "out", "--chunk", "64")
    assert call(*arguments, "-n", "512") == 0
    state, (cache,) = Path("out/state.json"), Path("out").glob("cache-*")
    if damage == "number":
        state.write_text(state.read_text().replace('"skip": ', '"skip": 1'))
    elif damage in ("list", "no key"):
        state.write_text({"list": "[1]", "no key": "{}"}[damage])
    elif damage == "missing cache":
        cache.unlink()
    else:
        content = bytearray(cache.read_bytes())
        content[-9] ^= 1
        cache.write_bytes(content if damage == "flipped cache" else content[:-9])
    capsys.readouterr()
    assert call(*arguments, "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("longnet: out/state.json cannot be gone on from"), error
    assert error.endswith("begin anew with another folder, or remove it"), error


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_where_a_result_cannot_lie_is_said_before_the_work(call, run_folder, words, capsys, option):
    Path("file").write_text("")
    Path("folder").mkdir()
    wrong = "file" if option == "--output" else "folder"
    assert call("evaluate", run_folder, words, "--contexts", "64", option, wrong) == 2
    captured = capsys.readouterr()
    assert not captured.out  # not a table of results, which then get lost
    assert f"the {'folder file' if wrong == 'file' else 'file folder'} cannot be written" in captured.err
