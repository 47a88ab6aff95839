"""What `stream` reads is what `prepare` writes.

| source | instance | right value |
|---|---|---|
| daulet/tokenizers#30 | `truncation` in a tokenizer.json: 64 of 18,801 tokens, status 0 | all of them |
| tried here | the text of a special token in a file | text, in both |
| tried here | Chinese on one line, cut between the bytes of a character | no U+FFFD that the file has not |
| tried here | a file edited to the same size between a stop and `--resume` | one line: of another source |
| tried here | a BPE without unknown token: Chinese and emoji dropped, status 0 | one line: file and character |
| tried here | Unigram, WordPiece, WordLevel without one: a traceback | likewise |
| tried here | `stream` on an empty file, on a FIFO: "there is no file" | one line that says what it is |
"""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.data import documents, reading
from longnet.data.assembly import Options
from longnet.data.preparation import prepare
from longnet.data.shards import TokenData
from longnet.data.tokenizer import wrap
from longnet.evaluation.stream import Cursor, open_source
from longnet.training.checkpoint import model_folder


def save(folder, tokenizer):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return tokenizers that cut off, pad, add tokens, and know special ones."""
    place = tmp_path_factory.mktemp("tokenizers")
    words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2, "<s>": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(64)
    words.enable_padding(length=80)
    words.add_special_tokens([AddedToken("<s>", special=True)])
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(alphabet, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "bytes": "bytes",
        "words": save(place / "words", words),
        "letters": save(place / "letters", letters),
    }


TEXT = st.one_of(
    st.text(st.sampled_from("one two <s> <|endoftext|> 中文é\n\r"), max_size=300).map(str.encode),
    st.text("中文字", min_size=1, max_size=200).map(str.encode),
    st.binary(max_size=200).map(lambda data: data.replace(b"\0", b"\n")),
    st.just(b"one <s> two <|endoftext|> "),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXT, min_size=1, max_size=4), name=st.sampled_from(["bytes", "words", "letters"]), data=st.data()
)
def test_stream_reads_what_prepare_writes(tmp_path_factory, tokenizers, texts, name, data):
    place = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        if data.draw(st.booleans(), "as a record"):
            record = {"body": {"text": text.decode(errors="replace")}}
            (place / f"{number}.jsonl").write_text(json.dumps(record) + "\n")
        else:
            (place / f"{number}.txt").write_bytes(text)
    pieces, batch = data.draw(st.sampled_from([5, 64, 2**22])), data.draw(st.sampled_from([1, 100, 2**20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", pieces)
        patch.setattr(reading, "BATCH_BYTES", batch)
        options = Options((str(place),), tokenizer=tokenizers[name], text_field="body.text", validation=0)
        source = open_source(
            [place], tokenizers[name], place, 70_000, reading=documents.Reading(text_field="body.text")
        )
        if not any(texts):
            for fails in (lambda: prepare(options, place / "DATA", progress=False), lambda: source.read(Cursor(), 1)):
                with pytest.raises(ValueError, match="no text in"):
                    fails()
            return
        prepare(options, place / "DATA", workers=1, progress=False)
        split = TokenData.open(place / "DATA").train
        expected = split.read(0, split.tokens)
        found, cursor = [], Cursor()
        while len(found) == 0 or len(found[-1]):
            size = data.draw(st.integers(1, 400), "tokens")
            ids, cursor = source.read(cursor, size)
            found.append(ids)
            if data.draw(st.booleans(), "anew"):
                source = open_source(
                    [place], tokenizers[name], place, 70_000,
                    reading=documents.Reading(text_field="body.text"), exclude=["DATA"],
                )  # fmt: skip
    assert np.array_equal(np.concatenate(found), expected)


def test_a_tokenizer_that_cuts_off_cuts_nothing(tokenizers, tmp_path):
    (tmp_path / "long.txt").write_text("one two " * 9400)
    ids, _ = open_source([tmp_path / "long.txt"], tokenizers["words"], tmp_path, 70_000).read(Cursor(), 10**6)
    assert len(ids) == 18_801  # with the end token
    assert np.array_equal(ids[:-1], np.tile([1, 2], 9400))


@pytest.mark.parametrize("edit", ["the same size", "another size", "another name"])
def test_a_file_that_has_changed_is_not_gone_on_with(call, tmp_path, capsys, edit):
    torch.manual_seed(0)
    config = LongNetConfig.preset("tiny", vocab_size=257, segment_lengths=(16, 64), dilation_rates=(1, 4))
    LongNetForCausalLM(config).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("first " * 100)
    arguments = ("stream", tmp_path / "model", tmp_path / "text*", "--chunk", 50, "-o", tmp_path / "out")
    assert call(*arguments, "-n", 200) == 0
    before = text.stat().st_mtime_ns
    if edit == "the same size":
        text.write_text("other " * 100)
    elif edit == "another size":
        text.write_text("other " * 101)
    else:
        text = text.rename(tmp_path / "text2.txt")
    os.utime(text, ns=(before + (edit != "another name"),) * 2)
    capsys.readouterr()
    assert call(*arguments, "--resume") == 2
    assert "is of another source: give them as before, files unchanged" in capsys.readouterr().err


def test_what_is_no_text_is_named(call, run_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04 and so on")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("empty.txt", "no text in {} (left out: 1 empty)"),
        ("archive.zip", "no text in {} (left out: 1 zip archives)"),
        ("pipe", "no text in {} (left out: 1 neither file nor folder)"),
        ("none", "{} does not exist"),
    ):
        for command in (("stream", run_folder), ("prepare",)):
            assert call(*command, tmp_path / name, "-o", tmp_path / "out") == 2
            error = capsys.readouterr().err
            assert message.format(tmp_path / name) in error
            assert error.count("\n") == 1


ASCII = [chr(code) for code in range(32, 127)]
EVERY_BYTE = [f"<0x{byte:02X}>" for byte in range(256)]


def lossy(kind):
    """Return a tokenizer of ASCII that has no token for other text, and no unknown one, unless its name says so."""
    tokens = {token: n for n, token in enumerate([*ASCII, "or", "hello"])}
    if kind == "Unigram":
        made = Tokenizer(models.Unigram([(token, -1.0) for token in tokens]))
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece({**tokens, **{f"##{letter}": 1000 + n for n, letter in enumerate(ASCII)}}))
    elif kind == "WordLevel":
        made = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    elif kind == "BPE of some bytes":
        made = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*ASCII, "Ġ"])}, []))
    elif kind == "BPE with bytes":
        made = Tokenizer(
            models.BPE({**tokens, **{b: 999 + n for n, b in enumerate(EVERY_BYTE)}}, [], byte_fallback=True)
        )
    elif kind == "BPE with an unknown token":
        made = Tokenizer(models.BPE({**tokens, "<unk>": 500}, [], unk_token="<unk>"))
    else:
        made = Tokenizer(models.BPE(tokens, [("o", "r")]))
    if kind.startswith("Word"):
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "BPE of some bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_tokens(["added"])
    return made


@pytest.mark.parametrize("kind", ["BPE", "BPE of some bytes", "Unigram", "WordPiece", "WordLevel"])
def test_text_that_a_tokenizer_would_lose(call, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "tokenizer", lossy(kind))
    text = "hello added hello " * 3
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in (text, text + "or 😀 or")))
    assert call("prepare", "x.jsonl", "-o", "data", "--tokenizer", folder) == 2
    error = capsys.readouterr().err
    if kind in ("WordPiece", "WordLevel"):
        assert "x.jsonl, line 2: at character " in error
    else:
        where = (
            f"x.jsonl, line 2: at character {len(text) + 4} the tokenizer has no token for '😀' (U+1F600), and none for"
        )
        assert error.startswith(f"longnet: {where}"), error
    assert error.count("\n") == 1
    assert not (tmp_path / "data").exists()
    source = open_source(["x.jsonl"], folder, tmp_path, 2000)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: at character "):
        source.read(Cursor(), 10**4)


@pytest.mark.parametrize("kind", ["BPE", "BPE of some bytes", "Unigram", "BPE with bytes", "BPE with an unknown token"])
def test_what_is_watched_keeps_its_ids(tmp_path, kind):
    plain = lossy(kind)
    text = "hello added or, " * 20 + ("é" if "with" in kind else "")
    (tmp_path / "x.txt").write_text(text)
    tokens, _ = open_source([tmp_path / "x.txt"], save(tmp_path / "t", plain), tmp_path, 2000).read(Cursor(), 10**4)
    assert tokens[:-1].tolist() == plain.encode(text).ids


def test_the_vocabulary_that_fills_its_dtype(tmp_path):
    vocabulary = {**{letter: n for n, letter in enumerate(ASCII)}, "<|endoftext|>": 2**16 - 1}
    folder = save(tmp_path / "t", Tokenizer(models.BPE(vocabulary, [])))
    for name, text in (("x.txt", "hello"), ("y.txt", "hello é")):
        (tmp_path / name).write_text(text)
    assert open_source([tmp_path / "x.txt"], folder, tmp_path, 2**16).read(Cursor(), 9)[0].tolist()[-1] == 2**16 - 1
    with pytest.raises(ValueError, match=r"y\.txt: at character 7 .* 'é' \(U\+00E9\)"):
        open_source([tmp_path / "y.txt"], folder, tmp_path, 2**16).read(Cursor(), 9)


def test_unknown_tokens_are_counted(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "tokenizer", lossy("BPE with an unknown token"))
    (tmp_path / "x.txt").write_text("or é or é or")
    assert call("prepare", "x.txt", "-o", "data", "--validation", "0", "--tokenizer", folder) == 0
    assert "unknown      2 of 13 tokens stand for text that the tokenizer has none for" in capsys.readouterr().out
    assert TokenData.open(tmp_path / "data").train.tokens == 13


def test_a_prompt_that_would_be_lost(call, tmp_path, run_folder, monkeypatch, capsys):
    AutoModelForCausalLM.from_pretrained(model_folder(run_folder)).save_pretrained(tmp_path)
    wrap(lossy("BPE")).save_pretrained(tmp_path)
    assert call("generate", tmp_path, "--prompt", "what is 中?", "-n", "1") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "longnet: the prompt: at character 9 the tokenizer has no token for '中' (U+4E2D), and"
    )
    assert not captured.out
    assert call("generate", tmp_path, "--prompt", "what is", "-n", "1") == 0
