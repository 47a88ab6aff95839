"""One sequence from files: its losses against one forward pass, whatever the chunks, and after being killed."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from cases import DEVICES
from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, use_dilated_attention
from longnet.cli.main import main
from longnet.data import documents
from longnet.data import reading as batches
from longnet.evaluation import stream as reading
from model.families import build

PATTERN = {"segment_lengths": (16, 64, 4096), "dilation_rates": (1, 4, 256)}


def small(**fields):
    torch.manual_seed(1)
    config = LongNetConfig.preset("tiny", hidden_size=16, num_attention_heads=2, vocab_size=257, **PATTERN, **fields)
    return LongNetForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    """Files of odd sizes, one of them empty, in folders whose order is that of their paths."""
    rng, text = np.random.default_rng(0), tmp_path / "text"
    for name, size in {"b.txt": 700, "a/z.c": 1301, "a/empty.md": 0, "a/b/c.c": 5, "c.py": 900}.items():
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        (text / name).write_bytes(rng.integers(1, 256, size, dtype=np.uint8).tobytes())
    return text


def whole(folder):
    """Return the ids of all of it: bytes, and 256 where a document ends."""
    return [token for name in ("a/b/c.c", "a/z.c", "b.txt", "c.py") for token in [*(folder / name).read_bytes(), 256]]


def source_of(*paths):
    return reading.open_source(paths, "bytes", Path(), 257)


def expected_bins(model, ids):
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    edges = [0, 1, *(2**n for n in range(1, 40) if 2**n < len(losses)), len(losses)]
    return [(a, b, losses[a:b].mean().item()) for a, b in itertools.pairwise(edges)], losses.mean().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 100, 1000, 2910, 5000])
def test_losses_are_those_of_one_pass(chunk, folder, tmp_path, device):
    model = small().to(device)
    ids = torch.tensor(whole(folder), device=device)
    tokens = 150 if chunk == 1 else len(ids)
    *_, sums = reading.stream(model, source_of(folder), tmp_path, chunk=chunk, tokens=tokens)
    bins, mean = expected_bins(model, ids[: tokens + 1])  # each token that is fed predicts the next one
    assert sums.tokens == tokens
    assert sums.loss == pytest.approx(mean, abs=1e-5)
    got = [(row["from"], row["to"], row["loss"]) for row in sums.by_position()]
    assert [row[:2] for row in got] == [row[:2] for row in bins]
    assert [row[2] for row in got] == pytest.approx([row[2] for row in bins], abs=1e-5)


def test_the_sums_are_plain_statistics():
    losses, sums = np.random.default_rng(0).normal(2, 1, 1000), reading.Sums()
    for part in np.split(losses, [3, 4, 400]):
        sums.add(int(sum(row["to"] - row["from"] for row in sums.by_position())), part)
    row = sums.by_position()[-1]
    assert (row["from"], row["to"]) == (512, 1000)
    assert row["loss"] == pytest.approx(losses[512:].mean())
    assert row["standard_error"] == pytest.approx(losses[512:].std() / math.sqrt(488))
    assert row["perplexity"] == pytest.approx(math.exp(losses[512:].mean()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_stream_goes_on_to_the_same_sums(stop, folder, tmp_path, device):
    model, source = small().to(device), source_of(folder)
    *_, expected = reading.stream(model, source, tmp_path / "one", chunk=200, save_every=400)
    begun = reading.stream(model, source, tmp_path / "two", chunk=200, save_every=400)
    for _ in range(stop):
        next(begun)
    begun.close()
    *_, resumed = reading.stream(model, source, tmp_path / "two", chunk=200, save_every=400, resume=True)
    assert resumed.tokens == expected.tokens
    assert resumed.bins == expected.bins  # bitwise
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["cache-2910.safetensors", "state.json"]
    assert list(reading.stream(model, source, tmp_path / "two", chunk=200, resume=True)) == []


@pytest.mark.parametrize("tokens", [1, 400, 777])
def test_a_stream_goes_on_beyond_the_tokens_it_was_to_read(tokens, folder, tmp_path):
    model, source, ids = small(), source_of(folder), torch.tensor(whole(folder))
    *_, part = reading.stream(model, source, tmp_path, chunk=200, tokens=tokens)
    assert (part.tokens, sum(count for count, *_ in part.bins)) == (tokens, tokens)
    *_, sums = reading.stream(model, source, tmp_path, chunk=200, resume=True)
    bins, mean = expected_bins(model, ids)
    assert sums.loss == pytest.approx(mean, abs=1e-5)
    got = [(row["from"], row["to"], row["loss"]) for row in sums.by_position()]
    assert [row[:2] for row in got] == [row[:2] for row in bins]  # no prediction is lost between
    assert [row[2] for row in got] == pytest.approx([row[2] for row in bins], abs=1e-5)


def test_one_token_is_refused_where_none_follows(tmp_path):
    (tmp_path / "one.txt").write_text("a")
    source = reading.open_source([tmp_path / "one.txt"], "bytes", tmp_path, 256)  # without an end
    with pytest.raises(ValueError, match="there is one token, and none after it to predict"):
        list(reading.stream(small(), source, tmp_path / "one"))
    *_, sums = reading.stream(small(), source_of(tmp_path / "one.txt"), tmp_path / "two", tokens=1)
    assert [count for count, *_ in sums.bins] == [1]  # the end that follows


def test_a_stream_may_be_as_long_as_the_positions_that_a_model_knows(folder, tmp_path):
    model = small(position_embedding="learned", max_position_embeddings=64)
    *_, sums = reading.stream(model, source_of(folder), tmp_path / "all", tokens=64)
    assert sums.tokens == 64
    with pytest.raises(ValueError, match="64 positions"):
        list(reading.stream(model, source_of(folder), tmp_path / "more", tokens=65))


def test_a_state_of_something_else_is_refused(folder, tmp_path):
    model, source = small(), source_of(folder)
    list(reading.stream(model, source, tmp_path, chunk=1000, tokens=2000))
    with pytest.raises(ValueError, match="go on with --resume"):
        next(reading.stream(model, source, tmp_path, chunk=1000))
    with pytest.raises(ValueError, match="of another chunk"):
        next(reading.stream(model, source, tmp_path, chunk=500, resume=True))
    with pytest.raises(ValueError, match="of another source"):
        next(reading.stream(model, source_of(folder / "c.py"), tmp_path, chunk=1000, resume=True))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="of another model"):
        next(reading.stream(model, source, tmp_path, chunk=1000, resume=True))
    path = next(tmp_path.glob("cache-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with torch.no_grad():
        model.lm_head.weight.div_(2)
    with pytest.raises(ValueError, match="damaged"):
        next(reading.stream(model, source, tmp_path, chunk=1000, resume=True))


def test_a_loss_that_is_not_finite_stops_the_stream(folder, tmp_path):
    model = small()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss is not finite at token 0"):
        next(reading.stream(model, source_of(folder), tmp_path, chunk=100))


def words(tmp_path):
    vocabulary = {"?": 0, "one": 1, "two": 2, "three": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer


def test_text_through_a_tokenizer_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_BYTES", 64)
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    text = "\n".join(np.random.default_rng(0).choice(["one two", "three", "", "four one"], 200))
    (tmp_path / "x").write_text(text)
    (tmp_path / "y").write_text("one" * 100 + " two")  # a line longer than a piece is cut within
    tokenizer = words(tmp_path)

    def opened():
        return reading.open_source([tmp_path / "x", tmp_path / "y"], str(tmp_path), tmp_path, 5)

    source, ids, cursor = opened(), [], reading.Cursor()
    for size in [1, 7, 64, 3, *[50] * 30]:
        new, cursor = source.read(cursor, size)
        source = opened()  # as after a restart
        ids += new.tolist()
    expected = [*tokenizer.encode(text).ids, 4]
    assert ids[: len(expected)] == expected
    assert ids[-2:] == [2, 4]
    assert len(new) == 0


def test_which_way_files_become_tokens(folder, tmp_path):
    files = [folder / "c.py"]

    def is_bytes(*arguments):
        return reading.open_source(files, *arguments).encoder.tokenizer is None

    assert is_bytes(None, tmp_path, 257)
    words(tmp_path)
    assert not is_bytes(None, tmp_path, 257)
    assert is_bytes("bytes", tmp_path, 257)
    assert not is_bytes(str(tmp_path), folder, 257)
    with pytest.raises(ValueError, match="has 4 tokens, the model knows 3"):
        reading.open_source(files, None, tmp_path, 3)
    with pytest.raises(ValueError, match="the tokenizer bytes has 256 tokens, the model knows 255"):
        reading.open_source(files, "bytes", tmp_path, 255)
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        reading.open_source(files, None, folder, 5000)
    assert reading.open_source(files, "bytes", tmp_path, 256).encoder.end is None  # the model knows no end token
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    places = {chr(byte) if n < 188 else chr(256 + n - 188): byte for n, byte in enumerate(order)}
    assert sorted(places) == letters
    tokenizer = Tokenizer(models.BPE(places, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert is_bytes(None, tmp_path, 257)
    tokenizer = Tokenizer(models.BPE({**places, "th": 256}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not is_bytes(None, tmp_path, 257)


def test_other_models_are_streamed_too(folder, tmp_path):
    model = build("Llama", vocab_size=256)
    use_dilated_attention(model, DilationPattern((16, 64), (1, 4)))
    ids = torch.tensor([token for token in whole(folder) if token < 256])[:201]
    source = reading.open_source([folder], "bytes", Path(), 256)
    *_, sums = reading.stream(model, source, tmp_path, chunk=33, tokens=200)
    assert sums.loss == pytest.approx(expected_bins(model, ids)[1], abs=1e-5)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["longnet", "stream", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command(monkeypatch, folder, tmp_path, capsys):
    small().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert run(monkeypatch, tmp_path / "model", folder, "--chunk", 500, "-n", 2000, "-o", out) == 0
    about = json.loads((out / "stream.json").read_text())
    assert about["tokens"] == 2000
    assert about["is_bytes"]
    assert about["by_position"][-1]["to"] == 2000
    assert about["peak_bytes"] > 2**20
    assert (out / "stream.svg").stat().st_size > 5000
    assert run(monkeypatch, tmp_path / "model", folder, "--chunk", 500, "-o", out, "--resume") == 0
    assert json.loads((out / "stream.json").read_text())["tokens"] == 2910
    assert run(monkeypatch, tmp_path / "model", folder, "--chunk", 500, "-o", out, "--resume") == 0
    assert "nothing left to read" in capsys.readouterr().out
    for arguments, message in (
        ([tmp_path, folder], "holds no model"),
        ([tmp_path / "model", tmp_path / "none", "-o", tmp_path / "x"], "does not exist: give files"),
        ([tmp_path / "model", folder, "--chunk", 0], "--chunk must be at least 1"),
        ([tmp_path / "model", folder, "--chunk", 500, "-o", out], "go on with --resume"),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_killed_command_goes_on_to_the_same_result(monkeypatch, folder, tmp_path):
    small().save_pretrained(tmp_path / "model")
    (folder / "d.txt").write_bytes(np.random.default_rng(1).integers(1, 256, 400_000, dtype=np.uint8).tobytes())
    arguments = [tmp_path / "model", folder, "--chunk", 100, "--save-every", 100]
    assert run(monkeypatch, *arguments, "-n", 6000, "-o", tmp_path / "one") == 0
    command = [sys.executable, "-c", "from longnet.cli.main import main; main()", "stream"]
    child = subprocess.Popen(
        [*command, *map(str, arguments), "-o", str(tmp_path / "two")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    state = tmp_path / "two" / "state.json"
    while not state.exists() or json.loads(state.read_text())["sums"]["tokens"] < 1000:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert json.loads(state.read_text())["sums"]["tokens"] < 6000
    assert run(monkeypatch, *arguments, "-n", 6000, "-o", tmp_path / "two", "--resume") == 0
    one, two = (json.loads((tmp_path / name / "stream.json").read_text()) for name in ("one", "two"))
    assert one["by_position"] == two["by_position"]
