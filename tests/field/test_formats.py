"""What files are called, hold and hide: read, or named for what they are.

| source | instance | right value |
|---|---|---|
| tried here | `.ndjson`, `.json`, `.gz`, `.bz2`, `.xz`, UTF-16 | the text in them |
| tried here | `--text-field a.b` | field b of field a |
| tried here | a half-uploaded `.jsonl` | one line; with `--skip-damaged` the whole records, the rest counted |
| tried here | one unreadable subfolder | the rest, and one unreadable counted |
| tried here | `a/README.md b/README.md`: "one document" | two documents |
| tried here | `--exclude a/b` that never matches, in silence | it matches; what meets nothing is told |
| tried here | `prepare ""`, an unset variable: the current directory | one line, status 2 |
| tried here | FASTA on one line | a document a record, in pieces |
| tried here | FASTA whose lines end by CR: all of it a header, "1 empty" | one line |
| tried here | UTF-16 that is none further on: U+FFFD, uncounted | damage, as in a cut `.gz` |
| tried here | a tokenizer that knows none of the text: data of end tokens, exit 0 | one line |
| huggingface/tokenizers#497, #1313 | `--train-bpe` on unbroken text: 1 MB has no end | seconds (`test_tokenizer.py`) |
"""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from longnet.data import documents
from longnet.data.corpus import list_corpus
from longnet.data.documents import Piece, Reading, Skipped, read_pieces

PACKED = {  # in small blocks, where there are such
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": lambda data: bz2.compress(data, 1), ".xz": lzma.compress,
    ".zst": zstandard.compress,
}  # fmt: skip
RECORDS = [{"text": "one"}, {"text": "zwei ☃"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def read(path, **options):
    return list(read_pieces(list_corpus([str(path)]).files[0], Reading(**options)))


def texts(path, **options):
    return [item.text.decode() for item in read(path, **options) if isinstance(item, Piece)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", "line\nzwei ☃\n", ["line\nzwei ☃\n"]),
        ("x.jsonl", LINES, ["one", "zwei ☃"]),
        ("x.ndjson", LINES, ["one", "zwei ☃"]),
        ("x.json", json.dumps(RECORDS), ["one", "zwei ☃"]),
        ("x.json", f" [\n {json.dumps(RECORDS[0])}\n]\n", ["one"]),
        ("x.json", LINES, ["one", "zwei ☃"]),  # JSON lines under a wrong name
        ("x.json", '{"a": [1, 2]}\n', ['{"a": [1, 2]}\n']),  # no records: text
        ("x.json", "[1, 2]", ["[1, 2]"]),
    ],
)
def test_each_is_read(tmp_path, packed, coding, name, content, expected):
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKED[packed](content.encode(coding)))
    found = texts(path)
    assert [text.removeprefix("\ufeff") for text in found] == expected
    assert list_corpus([str(tmp_path)], suffixes=[path.name]).files[0].compression == packed


@pytest.mark.parametrize("packed", [name for name in PACKED if name])
def test_packed_text_that_is_cut_off(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    content = b"".join(b"%d " % (n * n * 7919 % 100_003) for n in range(60_000))
    path = tmp_path / f"x.txt{packed}"
    path.write_bytes(PACKED[packed](content)[:-2000])
    with pytest.raises(ValueError, match=r"is damaged \(.*\): copy it anew, or skip what is damaged"):
        read(path)
    *pieces, damaged, last = read(path, skip_damaged=True)
    assert damaged == Skipped("damaged")
    kept = b"".join(piece.text for piece in [*pieces, last])
    assert content.startswith(kept)
    assert last.ends


def test_a_folder_takes_them_by_their_names(tmp_path):
    for name in ("a.txt.gz", "b.jsonl.xz", "c.ndjson", "d.json", "e.fa", "f.fa.gz", "g.tar.gz", "README.bz2", "h.zip"):
        (tmp_path / name).write_text("x")
    names = [file.name.partition("/")[2] for file in list_corpus([str(tmp_path)]).files]
    assert names == ["README.bz2", "a.txt.gz", "b.jsonl.xz", "c.ndjson", "e.fa", "f.fa.gz"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04", "zip archives"), (b"%PDF-1.7\n", "PDF files"),
        (gzip.compress(b"x", mtime=0), "gzip files not named .gz"),
        (b"x" * 257 + b"ustar", "tar archives"), (b"SQLite format 3\0", "SQLite files"), (b"text\0", "binary"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_called_what_it_is(tmp_path, content, what):
    (tmp_path / "x").write_bytes(content)
    assert read(tmp_path / "x") == [Skipped(what)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_fields_within_fields(tmp_path, suffix):
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    records = [{"a": {"b": {"c": "deep"}, "n": 1}, "text": "flat"}, {"a": {"b": None, "n": 1}, "text": "flat"}]
    path = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    assert texts(path, text_field="a.b.c") == ["deep"]
    assert read(path, text_field="a.b.c")[1] == Skipped("empty")
    assert texts(path) == ["flat", "flat"]
    with pytest.raises(ValueError, match=r"the field 'a.b' is not text but dict, which holds c: write a.b.c"):
        read(path, text_field="a.b")
    with pytest.raises(ValueError, match=r"no field 'x\.y' among a.*, text"):
        read(path, text_field="x.y")


def test_a_field_whose_name_has_a_dot(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a.b": "dotted", "a": {"b": "nested"}}\n')
    assert texts(tmp_path / "x.jsonl", text_field="a.b") == ["dotted"]


def test_a_half_uploaded_file(tmp_path, call, capsys):
    (tmp_path / "x.jsonl").write_text(LINES * 3 + '{"text": "cut o')
    arguments = ("prepare", tmp_path / "x.jsonl", "-o", tmp_path / "out")
    assert call(*arguments) == 2
    assert "x.jsonl, line 7 is not JSON" in capsys.readouterr().err
    assert call(*arguments, "--skip-damaged") == 0
    assert "1 damaged" in capsys.readouterr().out
    assert len(texts(tmp_path / "x.jsonl", skip_damaged=True)) == 6
    (tmp_path / "x.jsonl").write_text(LINES + '{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"line 3 is nested too deeply"):
        read(tmp_path / "x.jsonl")


def test_an_unreadable_folder_stops_nothing(tmp_path, monkeypatch):
    for name in ("a/x.txt", "secret/y.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path) and access(path, mode))
    corpus = list_corpus([str(tmp_path)])
    assert [Path(file.path).name for file in corpus.files] == ["x.txt", "z.txt"]
    assert corpus.skipped == {"unreadable": 1}
    monkeypatch.undo()
    scandir = os.scandir

    def refuse(path):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list_corpus([str(tmp_path)]).skipped == {"unreadable": 1}


def test_files_of_one_name_are_documents_of_their_own(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for name in ("a/README.md", "b/README.md", "c/x/n.py", "d/x/n.py", "c/x/m.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [file.name for file in list_corpus(["a/README.md", "b/README.md"]).files]
    assert names == ["a/README.md", "b/README.md"]
    assert [file.name for file in list_corpus(["a/README.md"]).files] == ["README.md"]
    files = list_corpus(["c/x", "d/x", "a"]).files
    assert [file.name for file in files] == ["c/x/m.py", "c/x/n.py", "d/x/n.py", "a/README.md"]
    assert call("prepare", "a/README.md", "b/README.md", "-o", "data", "--validation", "0.5") == 0


def test_exclusions_by_path(tmp_path, call, capsys):
    for name in ("docs/a.txt", "docs/old/b.txt", "src/docs/c.txt", "d.txt"):
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text(name)

    def left(*patterns):
        corpus = list_corpus([str(tmp_path / "proj")], exclude=patterns)
        return [file.name.partition("/")[2] for file in corpus.files], corpus.unused

    everything = ["d.txt", "docs/a.txt", "docs/old/b.txt", "src/docs/c.txt"]
    assert left() == (everything, [])
    assert left("src/docs") == (everything[:3], [])
    assert left("src/docs/") == (everything[:3], [])
    assert left("docs/*.txt") == (["d.txt", "docs/old/b.txt"], [])
    assert left("proj/docs") == (["d.txt", "src/docs/c.txt"], [])
    assert left("old", "dosc/*") == (["d.txt", "docs/a.txt", "src/docs/c.txt"], ["--exclude 'dosc/*'"])
    assert call("prepare", tmp_path / "proj", "--exclude", "dosc", "-o", tmp_path / "out") == 0
    assert capsys.readouterr().err == "longnet: warning: --exclude 'dosc' met no file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "a path is empty: an unset variable of the shell, perhaps"),
        (("here.txt", ""), "a path is empty"),
        (("here.txt", "--exclude", ""), "--exclude is empty"),
        (("here.txt", "--suffixes", "*.py"), "--suffixes takes suffixes like .py and whole names like Makefile"),
    ],
)
def test_empty_and_misspelt_arguments(tmp_path, monkeypatch, call, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("x")
    assert call("prepare", *arguments, "-o", "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_fasta(tmp_path, monkeypatch):
    path = tmp_path / "x.fa"
    path.write_text(">chr1 a header\nACGTNN\nacgtn\n;comment\n>chr2\n\n>chr3\r\nGGG\r\n")
    assert read(path) == [
        Piece(
            "x.fa:1",
            b"ACGTNNacgtn",
            starts=True,
            ends=True,
            position=read(path)[0].position,
            source=f"{path}, record 1",
        ),
        Skipped("empty"),
        Piece("x.fa:3", b"GGG", starts=True, ends=True, position=path.stat().st_size, source=f"{path}, record 3"),
    ]
    assert texts(path, fasta_case="upper") == ["ACGTNNACGTN", "GGG"]
    assert texts(path, fasta_case="lower", fasta_n="drop") == ["acgtacgt", "ggg"]
    genome = "ACGT" * 5000
    monkeypatch.setattr(documents, "PIECE_BYTES", 1024)
    for width in (70, 10**6):
        path.write_text(">g\n" + "\n".join(genome[n : n + width] for n in range(0, len(genome), width)))
        found = read(path)
        assert "".join(piece.text.decode() for piece in found) == genome
        assert {piece.unit for piece in found} == {"x.fa:1"}
        assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
        assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    path.write_text("no header\nACGT\n")
    with pytest.raises(ValueError, match="is no FASTA: it does not begin with '>'"):
        read(path)


def test_fasta_with_a_mark_at_its_begin(tmp_path):
    path = tmp_path / "x.fa"
    path.write_bytes(b"\xef\xbb\xbf>one\r\nACGT\r\nAC\r\n")
    assert texts(path) == ["ACGTAC"]


def test_fasta_whose_lines_end_by_cr(tmp_path):
    path = tmp_path / "x.fa"
    path.write_bytes(b">one\rACGT\rACGT\r")
    with pytest.raises(ValueError, match="ends lines by CR alone"):
        texts(path)


@pytest.mark.parametrize(
    "content", ["words \u2603 ".encode("utf-16")[:-1], b"\xff\xfea\0\0\xd8b\0", b"\xff\xfe\0\0abcdefgh"]
)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_what_is_not_the_utf_16_that_its_mark_says(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged.*its mark says UTF"):
        read(tmp_path / name)
    assert Skipped("damaged") in read(tmp_path / name, skip_damaged=True)


def test_a_tokenizer_that_knows_nothing_of_the_text(call, tmp_path, capsys):
    tokenizer = Tokenizer(models.BPE(vocab={"q": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text(" \n" * 9)
    out = tmp_path / "out"
    arguments = ("prepare", tmp_path / "x.txt", "-o", out, "--validation", "0", "--tokenizer")
    assert call(*arguments, tmp_path / "tokenizer.json") == 2
    assert "makes no token of any text" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("field", "there"), [("a.c", "a.b"), ("a.b.c", "a.b"), ("b", "a.b")])
def test_parquet_without_the_field(tmp_path, field, there):
    pq.write_table(pa.table({"a": pa.array([{"b": "x"}])}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"no field '{field}' among {there}: choose one with --text-field"):
        read(tmp_path / "x.parquet", text_field=field)
