"""What `stream` reads is what `prepare` writes.

| source | instance | right value |
|---|---|---|
| daulet/tokenizers#30 | `truncation` in a tokenizer.json: 64 of 18,801 tokens, status 0 | all of them |
| tried here | the text of a special token in a file | text, in both |
| tried here | Chinese on one line, cut between the bytes of a character | no U+FFFD that the file has not |
| tried here | a file edited to the same size between a stop and `--resume` | one line: of another source |
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

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.data import documents, reading
from longnet.data.assembly import Options
from longnet.data.preparation import prepare
from longnet.data.shards import TokenData
from longnet.evaluation.stream import Cursor, open_source


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
