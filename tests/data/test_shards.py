"""Reading what was written, with numpy alone too, and refusing what was damaged."""

import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.data.loader import Windows
from longnet.data.shards import SPLITS, Shard, TokenData, token_dtype
from longnet.data.tokenizer import load_tokenizer, token_bytes
from longnet.data.writer import DataWriter, GrowingArray, write_whole

DOCUMENTS = {"train": [70, 1, 400, 30], "validation": [99]}


def tokens_of(split):
    tokens = np.random.default_rng(len(split)).integers(0, 256, sum(DOCUMENTS[split]))
    tokens[np.cumsum(DOCUMENTS[split]) - 1] = 256
    return tokens


def write(folder, shard_tokens=64):
    tokenizer = load_tokenizer("bytes")
    with DataWriter(folder, tokenizer, token_bytes(tokenizer), shard_tokens=shard_tokens) as writer:
        for name in SPLITS:
            ends = np.cumsum(DOCUMENTS[name])
            text = int(ends[-1]) - len(ends)
            writer.splits[name].append(tokens_of(name), ends, text)
        return writer.finish({"sources": ["here"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    return folder


@pytest.fixture
def damaged(tmp_path):
    write(tmp_path)
    return tmp_path


@given(st.data())
def test_any_run_of_tokens(folder, data):
    name = data.draw(st.sampled_from(SPLITS))
    split = getattr(TokenData.open(folder), name)
    start = data.draw(st.integers(0, split.tokens))
    stop = data.draw(st.integers(start, split.tokens))
    read = split.read(start, stop)
    assert read.dtype == np.int64
    assert (read == tokens_of(name)[start:stop]).all()


def test_the_folder_says_what_it_holds(folder):
    data = TokenData.open(folder)
    data.verify()
    assert data.vocab_size == 257
    assert data.end_of_text == 256
    assert data.provenance == {"sources": ["here"]}
    assert (data.train.tokens, data.train.bytes, data.train.documents.tolist()) == (501, 497, [0, 70, 71, 471, 501])
    assert (data.validation.tokens, data.validation.bytes, data.validation.documents.tolist()) == (99, 98, [0, 99])
    assert data.token_bytes.tolist() == [1] * 256 + [0]
    assert load_tokenizer(data.tokenizer_folder).eos_token_id == 256


def test_numpy_reads_it_alone(folder):
    index = json.loads((folder / "index.json").read_bytes())
    for name in SPLITS:
        shards = [np.load(folder / shard["file"], mmap_mode="r") for shard in index["splits"][name]["shards"]]
        assert all(shard.dtype == index["dtype"] == "uint16" for shard in shards)
        assert (np.concatenate(shards) == tokens_of(name)).all()


def test_reading_outside_raises(folder):
    split = TokenData.open(folder).train
    for start, stop in ((-1, 3), (5, 4), (0, 502)):
        with pytest.raises(IndexError, match="of a split that holds 501"):
            split.read(start, stop)


def test_a_split_goes_to_another_process(folder):
    windows = Windows(TokenData.open(folder).train, 30, seed=0)
    again = pickle.loads(pickle.dumps(windows))  # noqa: S301
    assert again.batch(3, 2)[0].equal(windows.batch(3, 2)[0])


def test_the_fingerprint_is_of_tokens_and_tokenizer(folder, tmp_path):
    fingerprint = TokenData.open(folder).fingerprint
    assert write(tmp_path / "a", shard_tokens=1000)["fingerprint"] == fingerprint
    DOCUMENTS["validation"] = [100]
    try:
        assert write(tmp_path / "b")["fingerprint"] != fingerprint
    finally:
        DOCUMENTS["validation"] = [99]


def test_the_type_is_the_smallest():
    assert [token_dtype(size).name for size in (256, 257, 65536, 65537)] == ["uint8", "uint16", "uint16", "uint32"]


def test_a_split_may_be_empty(tmp_path):
    tokenizer = load_tokenizer("bytes")
    with DataWriter(tmp_path, tokenizer, token_bytes(tokenizer)) as writer:
        writer.splits["train"].append(np.array([1, 256]), [2], 1)
        writer.finish({})
    validation = TokenData.open(tmp_path).validation
    assert (validation.tokens, validation.documents.tolist(), len(validation.read(0, 0))) == (0, [0], 0)
    with pytest.raises(ValueError, match="the validation split holds 0 tokens"):
        Windows(validation, 4, seed=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["train-00003.npy", "validation-00001.npy", "train-documents.npy", "token_bytes.npy", "tokenizer/tokenizer.json"],
)
def test_a_flipped_bit_is_found_and_named(damaged, name):
    flip(damaged / name)
    with pytest.raises(ValueError, match=re.escape(str(damaged / name))):
        (TokenData.open(damaged)).verify()


@pytest.mark.parametrize("name", ["train-00003.npy", "train-documents.npy", "token_bytes.npy"])
def test_a_truncated_file_is_named_when_it_is_opened(damaged, name):
    truncate(damaged / name)
    with pytest.raises(ValueError, match=f"{name} is .* bytes long instead of"):
        TokenData.open(damaged)


@pytest.mark.parametrize(
    "name", ["train-00003.npy", "train-documents.npy", "token_bytes.npy", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: prepare the data again"):
        TokenData.open(damaged)


def test_a_shard_that_shrinks_while_it_is_read(damaged):
    split = TokenData.open(damaged).train
    truncate(damaged / "train-00002.npy")
    with pytest.raises(ValueError, match=r"train-00002.npy ends before token 64"):
        split.read(0, 501)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=2), "has format 2, this version of longnet reads 1"),
        (lambda index: index.pop("format"), "index.json is no index that `longnet prepare` has written"),
        (lambda index: index.pop("splits"), "index.json is no index that `longnet prepare` has written"),
        (
            lambda index: index["splits"]["train"].update(tokens=7),
            "train-documents.npy ends at token 501, the index says 7",
        ),
        (lambda index: index["splits"]["train"]["shards"].pop(), "shards do not add up to 501 tokens"),
        (lambda index: index.update(dtype="uint8"), "of uint16, the index says .* of uint8"),
        (lambda index: index.update(dtype="words"), "index.json is damaged"),
    ],
)
def test_an_index_that_does_not_fit(damaged, change, message):
    index = json.loads((damaged / "index.json").read_bytes())
    change(index)
    (damaged / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        TokenData.open(damaged)


def test_what_is_no_folder_of_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `longnet prepare"):
        TokenData.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        TokenData.open(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"x\.npy is damaged"):
        Shard.open(tmp_path / "x.npy", 1, np.dtype(np.uint8))


def test_an_array_grows_again_from_any_length(tmp_path):
    path = tmp_path / "grown"
    array = GrowingArray(path, np.dtype(np.uint16))
    array.append(np.arange(100))
    array.close()
    array = GrowingArray(path, np.dtype(np.uint16), 40)
    array.append(np.arange(5))
    array.finish(tmp_path / "whole.npy")
    assert not path.exists()
    assert np.load(tmp_path / "whole.npy").tolist() == [*range(40), *range(5)]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter than when it was last synced"):
        GrowingArray(path, np.dtype(np.uint16), 40)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with write_whole(path) as file:
            file.write(b"ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
