"""Bad inputs of the commands, each one clear line on stderr and exit status 2, before anything is written or computed.

| source | instance | right value |
|---|---|---|
| tried here | each row below | status 2; one short line that begins with "longnet: "; nothing written |
"""

import dataclasses
import itertools
import re
from typing import get_type_hints

import pytest

from longnet.training.config import Recipe

# What stands for what an option takes; the values that it does not.
INTEGER = ["x", "1.5", "", "1e3", "٣", "0x10", "1,2", "--"]
COUNT = [*INTEGER, "0", "-3", str(2**63)]
NUMBER = ["x", "", "1,5", "--"]
CHOICE = ["nope", "", "KEEP ", "--"]
PATH = ["", "  "]


def options(command, **kinds):
    """Return the command with each option and each of the values that it does not take."""
    return [(*command, f"--{name.replace('_', '-')}", value) for name, values in kinds.items() for value in values]


PREPARE = [
    ("prepare",),
    ("prepare", "text.txt"),
    ("prepare", "none.txt", "-o", "out"),
    ("prepare", "no*match", "-o", "out"),
    ("prepare", "empty.txt", "-o", "out"),
    ("prepare", "empty", "-o", "out"),
    ("prepare", "pipe", "-o", "out"),
    ("prepare", "binary.bin", "-o", "out"),
    ("prepare", "archive.zip", "-o", "out"),
    ("prepare", "broken.jsonl", "-o", "out"),
    ("prepare", "list.jsonl", "-o", "out"),
    ("prepare", "deep.jsonl", "-o", "out"),
    ("prepare", "other.jsonl", "-o", "out"),
    ("prepare", "number.jsonl", "-o", "out"),
    ("prepare", "nested.jsonl", "-o", "out", "--text-field", "a"),
    ("prepare", "nested.jsonl", "-o", "out", "--text-field", "a.c"),
    ("prepare", "broken.parquet", "-o", "out"),
    ("prepare", "broken.jsonl.gz", "-o", "out"),
    ("prepare", "broken.txt.xz", "-o", "out"),
    ("prepare", "broken.txt.bz2", "-o", "out"),
    ("prepare", "broken.txt.zst", "-o", "out"),
    ("prepare", "broken.json", "-o", "out"),
    ("prepare", "broken.fa", "-o", "out"),
    ("prepare", "text.txt", "-o", "out"),  # one document, and a validation split
    ("prepare", "text.txt", "-o", "full"),
    ("prepare", "text.txt", "-o", "text.txt"),
    ("prepare", "text.txt", "-o", "/dev/null/out"),
    ("prepare", "text.txt", "-o", "data"),  # made from something else
    ("prepare", "text.txt", "-o", "out", "--train-bpe", "256"),
    ("prepare", "text.txt", "-o", "out", "--train-bpe", "300", "--tokenizer", "tiktoken:gpt2"),
    ("prepare", "text.txt", "-o", "out", "--suffixes", "*.py"),
    ("prepare", "text.txt", "-o", "out", "--suffixes", "src/a.py"),
    ("prepare", "text.txt", "-o", "out", "--overwirte"),
    ("prepare", "text.txt", "-o", "out", "--no-overwrite"),
    ("prepare", "text.txt", "-o"),
    ("prepare", "hf:", "-o", "out"),
    ("prepare", "hf:/", "-o", "out"),
    ("prepare", "hf::train", "-o", "out"),
    ("prepare", "cr.fa", "-o", "out"),
    ("prepare", "utf16.txt", "-o", "out"),
    ("prepare", "empty.txt", "text.txt", "-o", "unfinished"),
    ("prepare", "empty.txt", "text.txt", "-o", "unfinished", "--overwrite"),
    ("prepare", "other", "-o", "loop"),
    ("prepare", "other", "-o", "dangling"),
    ("prepare", "loop", "-o", "out"),
    *options(
        ("prepare", "text.txt", "-o", "out"),
        train_bpe=COUNT, shard_tokens=COUNT, workers=COUNT,
        validation=[*NUMBER, "1", "-0.1", "nan", "inf", "2"],
        split_by=CHOICE, fasta_case=CHOICE, fasta_n=CHOICE,
        exclude=PATH, suffixes=PATH,
        tokenizer=["nope", "", "tiktoken:nope", "tiktoken:", "text.txt", "empty.txt", "empty",
                   "broken.json", "data", "model"],
    ),
]  # fmt: skip

EVALUATE = [
    ("evaluate",),
    ("evaluate", "run"),
    ("evaluate", "none", "data"),
    ("evaluate", "text.txt", "data"),
    ("evaluate", "empty", "data"),
    ("evaluate", "run", "none"),
    ("evaluate", "run", "text.txt"),
    ("evaluate", "run", "empty"),
    ("evaluate", "run", "model"),
    ("evaluate", "data", "run"),
    ("evaluate", "run", "other"),
    ("evaluate", "run", "damaged"),
    ("evaluate", "", "data"),
    ("evaluate", "run", ""),
    ("evaluate", "run", "data", "extra"),
    ("evaluate", "noconfig", "data"),
    ("evaluate", "badconfig", "data"),
    ("evaluate", "strange", "data"),
    ("evaluate", "model", "data"),
    ("evaluate", "run", "data", "--contexts", "48,64"),
    ("evaluate", "run", "data", "--contexts", "64,1024K"),
    ("evaluate", "run", "data", "--passkey", "--distances", "5"),
    ("evaluate", "run", "data", "--passkey", "--distances", "999999999"),
    *options(
        ("evaluate", "run", "data"),
        contexts=["512 64", "x", "1.5", "0", "-8", "8M", "1e3", "64;128"],
        distances=["x", "1.5", "512 64", "--"], tokens=COUNT, trials=COUNT, batch_tokens=COUNT,
        attention=["nope", "", "sparse_fixed"], device=["tpu", "", "cuda", "cpu:x"],
        output=[*PATH, "text.txt", "loop", "text.txt/x"], report=[*PATH, "empty", "text.txt/x"],
    ),
]  # fmt: skip

GENERATE = [
    ("generate",),
    ("generate", "run"),
    ("generate", "run", "--prompt", "a", "--file", "text.txt"),
    ("generate", "none", "--prompt", "a"),
    ("generate", "text.txt", "--prompt", "a"),
    ("generate", "empty", "--prompt", "a"),
    ("generate", "data", "--prompt", "a"),
    ("generate", "model", "--prompt", "a"),  # has no tokenizer
    ("generate", "run", "--prompt"),
    ("generate", "run", "a prompt"),
    ("generate", "run", "--file", "none"),
    ("generate", "run", "--file", "empty"),
    ("generate", "run", "--file", "latin1.txt"),
    *options(("generate", "run"), file=PATH),
    *options(
        ("generate", "run", "--prompt", "a"),
        tokens=COUNT, top_k=COUNT, seed=[*INTEGER, "-1", str(2**64), str(2**63)],
        temperature=[*NUMBER, "-1", "nan", "inf", "1e-40"], top_p=[*NUMBER, "0", "1.1", "-1", "nan"],
        attention=["nope", "", "sparse_fixed"], device=["tpu", "", "cuda"],
    ),
]  # fmt: skip

STREAM = [
    ("stream",),
    ("stream", "run"),
    ("stream", "none", "text.txt"),
    ("stream", "empty", "text.txt"),
    ("stream", "run", "none.txt", "-o", "out"),
    ("stream", "run", "empty.txt", "-o", "out"),
    ("stream", "run", "empty", "-o", "out"),
    ("stream", "run", "pipe", "-o", "out"),
    ("stream", "run", "binary.bin", "-o", "out"),
    ("stream", "run", "", "-o", "out"),
    ("stream", "run", "broken.jsonl", "-o", "out"),
    ("stream", "run", "text.txt", "-o", "damagedstate", "--resume"),
    ("stream", "run", "text.txt", "-o", "damagedstate"),
    ("stream", "model", "text.txt", "-o", "out", "--tokenizer", "tiktoken:cl100k_base"),
    ("stream", "dense", "text.txt", "-o", "out"),
    *options(
        ("stream", "run", "text.txt", "-o", "out"),
        tokens=COUNT, chunk=COUNT, save_every=COUNT, tokenizer=["nope", "", "text.txt", "empty"],
        device=["tpu", ""], dtype=["float16", "", "int8"], fasta_case=CHOICE, fasta_n=CHOICE, exclude=PATH,
    ),
]  # fmt: skip

INFO = [
    ("info",), ("info", ""), ("info", "none"), ("info", "empty"), ("info", "text.txt"), ("info", "none.toml"),
    ("info", "broken.toml"), ("info", "run", "--memory", "8"), ("info", "data", "--train.steps", "3"),
    ("info", "badconfig"), ("info", "damaged"), ("info", "other"), ("info", "data", "-o", "x.png"),
    ("info", "good.toml", "--train.stesp", "3"), ("info", "good.toml", "--memory", "0"),
    *options(("info", "good.toml"), tokens=COUNT, memory=[*NUMBER, "-1", "nan", "inf"]),
]  # fmt: skip


def wrong(hint):
    """Return values that are not of the type of a setting."""
    text = str(hint)
    if "bool" in text:
        return ["maybe"]
    if "tuple" in text or "list" in text:
        return ["x"]
    if "int" in text:
        return ["1.5"]
    return ["x"] if "float" in text else ["nope"] if "Literal" in text else []


TRAIN = [
    ("train",), ("train", "good.toml"), ("train", "none.toml", "-o", "out"), ("train", "empty", "-o", "out"),
    ("train", "broken.toml", "-o", "out"), ("train", "binary.bin", "-o", "out"), ("train", "", "-o", "out"),
    ("train", "good.toml", "-o", ""), ("train", "good.toml", "-o", "text.txt"), ("train", "good.toml", "-o", "run"),
    ("train", "good.toml", "-o", "out", "--train.stesp", "3"), ("train", "good.toml", "-o", "out", "--steps", "3"),
    ("train", "good.toml", "-o", "out", "--train", "3"), ("train", "good.toml", "-o", "out", "extra"),
    *(("train", "good.toml", "-o", "out", "--data.path", path) for path in ("none", "empty", "other", "run")),
    *(
        ("train", "good.toml", "-o", "out", f"--{table}.{item.name}", value)
        for table, kind in get_type_hints(Recipe).items()
        for item in dataclasses.fields(kind)
        for value in wrong(item.type)
    ),
    *(
        ("train", "good.toml", "-o", "out", f"--{setting}", value)
        for setting, values in {
            "optim.lr": ["0", "-1", "nan", "inf", ""], "optim.betas": ["0.9", "1 1", "2 0.9"], "optim.eps": ["0", "-1"],
            "optim.weight_decay": ["-1", "nan"], "optim.warmup_steps": ["-1"], "optim.power": ["0"],
            "optim.min_lr_ratio": ["2", "-1"], "optim.clip": ["-1"], "train.steps": ["0", "-1"],
            "train.tokens": ["0", "99999999"], "train.batch_sequences": ["0"], "train.accumulate": ["0", "3"],
            "train.seed": ["-1", str(2**64)], "train.device": ["cuda"], "train.log_every": ["0"],
            "train.max_skipped": ["0"], "parallel.dp": ["0", "3"], "parallel.sp": ["0"],
            "parallel.timeout_seconds": ["0"], "evaluate.every": ["-1"], "evaluate.tokens": ["0"],
            "evaluate.contexts": ["0", "48 64", "1024K"], "evaluate.batch_tokens": ["0"], "sample.every": ["-1"],
            "sample.tokens": ["0"], "checkpoint.every": ["-1"], "checkpoint.keep": ["-1"], "model.preset": ["7b"],
            "model.vocab_size": ["100"], "model.hidden_size": ["15"], "model.num_attention_heads": ["3"],
            "model.segment_lengths": ["16"], "model.dilation_rates": ["0 4"], "model.hidden_act": ["nope"],
            "model.attention_dropout": ["0.1", "2"], "model.num_hidden_layers": ["0"],
        }.items()
        for value in values
    ),
]  # fmt: skip

TOML = {
    "a stray ]": "[data]\npath = 'data'\n]\n", "no table": "steps = 3\n", "a wrong table": "[trian]\nsteps = 3\n",
    "a wrong key": "[train]\nstesp = 3\n", "a key twice": "[train]\nsteps = 3\nsteps = 4\n",
    "no value": "[train]\nsteps =\n",
    "a word for a number": "[train]\nsteps = 'x'\n", "a number for a word": "[data]\npath = 3\n",
    "a fraction": "[train]\nsteps = 3.5\n", "true for a number": "[train]\nsteps = true\n",
    "no data": "[train]\nsteps = 3\n",
    "an empty path": "[data]\npath = ''\n", "a list for a number": "[train]\nsteps = [3]\n",
    "a number for a list": "[evaluate]\ncontexts = 64\n", "nan": "[optim]\nlr = nan\n", "inf": "[optim]\nlr = inf\n",
    "a table in a table": "[train.more]\nsteps = 3\n", "latin 1": "[data]\npath = '\udce9'\n",
    "deep": "[data]\npath = " + "[" * 5000,
    "a null byte": "[data]\npath = 'a\0b'\n", "JSON": '{"train": {"steps": 3}}',
    "a date": "[train]\nsteps = 2026-01-01\n",
}  # fmt: skip

OTHERS = [
    ("compare",), ("compare", "good.toml"), ("compare", "none.toml", "-o", "out"),
    ("compare", "broken.toml", "-o", "out"),
    ("compare", "good.toml", "-o", "text.txt"), ("compare", "recall-tiny", "-o", "out"),
    *options(
        ("compare", "good.toml", "-o", "out"),
        **{"compare.attentions": ["nope", "8:0", "8:1;any"], "compare.lengths": ["x", "0"], "compare.contexts": ["0"]},
    ),
    ("recall",), ("recall", "recall-tiny"), ("recall", "none.toml", "-o", "out"), ("recall", "good.toml", "-o", "out"),
    ("recall", "broken.toml", "-o", "out"), ("recall", "recall-tiny", "-o", "text.txt"),
    *options(("recall", "recall-tiny", "-o", "out"), **{"task.tokens": ["x", "0", "-1"], "task.pairs": ["x", "0"]}),
    ("encode",), ("encode", "none", "text.txt", "-o", "out"), ("encode", "empty", "text.txt", "-o", "out"),
    ("encode", "model", "text.txt", "-o", "out"), ("encode", "text.txt", "text.txt", "-o", "out"),
    ("convert",), ("convert", "text.txt"), ("convert", "none.pt", "out"), ("convert", "text.txt", "out"),
    ("convert", "empty.txt", "out"), ("convert", "empty", "out"), ("convert", "text.txt", ""), ("convert", "", "out"),
    *options(("convert", "text.txt", "out"), kind=["nope", ""]),
    ("show",), ("show", "paper"), ("show", "", "-n", "8"), ("show", "nope", "-n", "8"), ("show", "8", "-n", "8"),
    ("show", "8:1,8:1", "-n", "8"), ("show", "8:0", "-n", "8"), ("show", "8:1;any", "-n", "8"),
    ("show", "-8:1", "-n", "8"),
    ("show", f"{2**63}:1", "-n", "8"), ("show", "8:1", "-n", "8", "-o", "text.txt/x.png"),
    *options(("show", "8:1", "-n", "8"), heads=COUNT, tokens=COUNT),
    ("bench", "nope"), *options(("bench", "attention"), lengths=["x", "0"], repeats=COUNT, model=["nope"]),
    ("nope",), ("trian", "good.toml"), ("--verbose",), ("--versoin",), ("",),
]  # fmt: skip

CASES = [*PREPARE, *EVALUATE, *GENERATE, *STREAM, *INFO, *TRAIN, *OTHERS]


@pytest.fixture(scope="session")
def place(tmp_path_factory, run_folder, words):
    """A folder with everything that the cases name, and nothing that they may write to."""
    import os  # noqa: PLC0415
    import shutil  # noqa: PLC0415

    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("bad")
    files = {
        "text.txt": b"some text " * 50, "empty.txt": b"", "binary.bin": b"a\0b", "archive.zip": b"PK\x03\x04...",
        "broken.jsonl": b'{"text": "a"}\n{"text": ', "list.jsonl": b"[1]\n", "deep.jsonl": b"[" * 10**5 + b"\n",
        "other.jsonl": b'{"body": "a"}\n', "number.jsonl": b'{"text": 3}\n', "nested.jsonl": b'{"a": {"b": "c"}}\n',
        "broken.parquet": b"PAR1 no", "broken.jsonl.gz": b"no gzip", "broken.txt.xz": b"no xz",
        "broken.txt.bz2": b"no bzip2", "broken.txt.zst": b"no zstandard", "broken.json": b'[{"text": "a"}, {',
        "broken.fa": b"no header\n", "cr.fa": b">a\rACGT\r", "utf16.txt": b"\xff\xfea\0b",
        "latin1.txt": b"caf\xe9", "broken.toml": b"[train\n", "full/file": b"x", "unfinished/.unfinished": b"x",
        "other/index.json": b'{"files": []}', "damagedstate/state.json": b"{", "noconfig/model.safetensors": b"",
        "badconfig/config.json": b"{", "strange/config.json": b'{"model_type": "nobody"}',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    shutil.copytree(run_folder, folder / "run")
    shutil.copytree(words, folder / "data")
    shutil.copytree(words, folder / "damaged")
    shard = folder / "damaged" / "validation-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-7])
    checkpoint = next((run_folder / "checkpoints").iterdir())
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder / "dense")
    (folder / "good.toml").write_text(
        "[data]\npath = 'data'\n[model]\nhidden_size = 16\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"
        "segment_lengths = [16, 64]\ndilation_rates = [1, 4]\nposition_embedding = 'rope'\n"
        "[train]\nsteps = 1\ntokens = 64\nbatch_sequences = 2\ndevice = 'cpu'\n"
    )
    return folder


def look(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.name != "lock")


def refused(call, capfd, folder, arguments):
    before = look(folder)
    capfd.readouterr()
    status = call(*arguments)
    captured = capfd.readouterr()
    assert status == 2, captured
    assert captured.err.startswith("longnet: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert len(captured.err.replace(str(folder), "")) < 500, captured.err
    assert not captured.out.strip(), captured.out
    assert look(folder) == before
    return captured.err


@pytest.mark.parametrize("arguments", CASES, ids=lambda words: " ".join(words).encode("ascii", "replace").decode())
def test_a_bad_command_line(call, place, monkeypatch, capfd, arguments):
    monkeypatch.chdir(place)
    told = refused(call, capfd, place, arguments).lower().replace("-", "_")
    for option, value in itertools.pairwise(arguments[-2:]):
        if option.startswith("--"):
            named = [option[2:], option.rsplit(".")[-1], *re.findall(r"[\w.]+", value)]
            assert any(each.lower().replace("-", "_") in told for each in named), told


@pytest.mark.parametrize("name", TOML)
def test_a_bad_recipe(call, place, monkeypatch, capfd, tmp_path, name):
    monkeypatch.chdir(place)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TOML[name], encoding="utf-8", errors="surrogateescape")
    assert "recipe.toml" in refused(call, capfd, place, ("train", recipe, "-o", "out"))


def test_there_are_hundreds():
    assert len({*CASES}) + len(TOML) > 400
