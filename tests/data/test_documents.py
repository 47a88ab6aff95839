"""Files to documents, and what is wrong with a file by name and line."""

import gzip
import json
import random
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longnet.data import documents
from longnet.data.corpus import list_corpus
from longnet.data.documents import Piece, Reading, Skipped, read_pieces

TEXTS = ["one\n", "zwei ☃", "\udc80 lone", "three " * 50]


def read(path, *, skip=0, **options):
    return list(read_pieces(list_corpus([str(path)]).files[0], Reading(**options), skip=skip))


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 7, field: text}) + "\n" for text in texts).encode()


WRITERS = {
    ".jsonl": lambda path, content: path.write_bytes(content),
    ".jsonl.gz": lambda path, content: path.write_bytes(gzip.compress(content)),
    ".jsonl.zst": lambda path, content: path.write_bytes(
        zstandard.compress(content[:60]) + zstandard.compress(content[60:])
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path, lines([*TEXTS[:2], "", None]) + b"\n  \n" + lines(TEXTS[2:]))
    found = read(path)
    assert [item.text.decode("utf-8", "surrogatepass") for item in found if isinstance(item, Piece)] == TEXTS
    assert [item.unit for item in found if isinstance(item, Piece)] == [f"{path.name}:{n}" for n in (1, 2, 7, 8)]
    assert found[2:4] == [Skipped("empty")] * 2
    assert found[-1].position == path.stat().st_size
    assert read(path, skip=3) == found[3:]
    assert read(path, by_folder=True) == found


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": [f"text {n}" for n in range(1000)] + [None], "text": [0] * 1001}), path)
    found = read(path, text_field="body")
    assert [item.text for item in found[:-1]] == [f"text {n}".encode() for n in range(1000)]
    assert found[-1] == Skipped("empty")
    assert found[999].unit == "x.parquet:1000"
    assert read(path, text_field="body", skip=600) == found[600:]
    with pytest.raises(ValueError, match=r"x\.parquet, row 1: the field 'text' is not text but int"):
        read(path)
    with pytest.raises(ValueError, match="no field 'prose' among body, text: choose one with --text-field"):
        read(path, text_field="prose")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.parquet is damaged after row 0"):
        read(path)


def test_plain_text_is_its_bytes(tmp_path):
    path = tmp_path / "x.txt"
    content = bytes(range(1, 256)) + b"\xff\xfe \r\n"
    path.write_bytes(content)
    assert read(path) == [Piece("x.txt", content, starts=True, ends=True, position=len(content), source=str(path))]
    path.write_bytes(b"")
    assert read(path) == [Skipped("empty")]
    path.write_bytes(b"text" * 1999 + b"\0")
    assert read(path) == [Skipped("binary")]
    path.write_bytes(b"text" * 2000 + b"\0")  # git's rule looks at the first 8,000 bytes
    assert len(read(path)) == 1


@pytest.mark.parametrize("content", ["line\n" * 900, "日本語é" * 400, "\x80" * 3000, "a" * 2048, "☃" + "a\n" * 1023])
def test_long_files_come_in_pieces_that_cut_no_character(tmp_path, monkeypatch, content):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1024)
    (tmp_path / "x.txt").write_text(content)
    found = read(tmp_path / "x.txt")
    assert b"".join(piece.text for piece in found) == content.encode()
    assert "".join(piece.text.decode() for piece in found) == content
    assert len(found) > 1
    assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].position == len(content.encode())
    assert max(len(piece.text) for piece in found) < 2 * 1024 + 4


def test_long_files_of_any_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    for seed in range(50):
        content = bytes(random.Random(seed).choices([0x80, 0xBF, 0xC3, 0xE2, 0xF0, 0x41, 0xFF], k=200 + seed))
        (tmp_path / "x.txt").write_bytes(content)
        assert b"".join(piece.text for piece in read(tmp_path / "x.txt")) == content


def test_folders_are_units_on_request(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.py").write_text("c")
    (tmp_path / "d.py").write_text("d")
    files = list_corpus([str(tmp_path)]).files
    base = tmp_path.name
    assert [piece.unit for file in files for piece in read_pieces(file)] == [f"{base}/a/b/c.py", f"{base}/d.py"]
    assert [piece.unit for file in files for piece in read_pieces(file, Reading(by_folder=True))] == [
        f"{base}/a",
        f"{base}/d.py",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2 is not JSON"),
        (b'{"text": "a"}\n\n\xff\n', r"x\.jsonl, line 3 is not JSON"),
        (b'["a"]\n', r"x\.jsonl, line 1 is not a JSON object but a list"),
        (
            b'{"id": 3, "body": "a"}\n',
            r"x\.jsonl, line 1: no field 'text' among id, body: choose one with --text-field",
        ),
        (b'{"text": ["a"]}\n', r"x\.jsonl, line 1: the field 'text' is not text but list"),
    ],
)
def test_lines_that_are_wrong(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:40] + b"????????" + b[48:], lambda _: b"no"]
)
def test_damaged_compression(tmp_path, suffix, damage):
    content = lines(["".join(random.Random(0).choices("abcdefgh", k=500)) for _ in range(5000)])
    path = tmp_path / f"x{suffix}"
    path.write_bytes(damage(gzip.compress(content) if suffix == ".jsonl.gz" else zstandard.compress(content)))
    with pytest.raises(ValueError, match=rf"x\{suffix}(, line \d+)? is (damaged after line|not JSON)"):
        read(path)


@pytest.mark.parametrize(("name", "module"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_libraries_of_the_extra(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"content")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"reading .*{name} needs the package {module}: pip install 'longnet-torch\[data"
    ):
        read(tmp_path / name)


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in "abcd"]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    file = list_corpus(["hf:owner/name:config:test"]).files[0]
    found = list(read_pieces(file))
    assert [piece.text for piece in found] == [b"a", b"b", b"c", b"d"]
    assert found[1].unit == "hf:owner/name:config:test:2"
    assert list(read_pieces(file, skip=3)) == found[3:]
    next(read_pieces(list_corpus(["hf:plain"]).files[0]))
    assert asked == [("owner/name", "config", "test", True)] * 2 + [("plain", None, "train", True)]


def test_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="hf:owner/nothing: no such data set, or the hub is not reachable") as raised:
        list(read_pieces(list_corpus(["hf:owner/nothing"]).files[0]))
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:owner/nothing needs the package datasets"):
        list(read_pieces(list_corpus(["hf:owner/nothing"]).files[0]))
