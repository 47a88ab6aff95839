import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import longnet
from longnet.bench import attention
from longnet.cli.commands import COMMANDS, make_app
from longnet.cli.lists import spread_lists
from longnet.cli.main import main


def run(monkeypatch, *arguments):
    """Run the command line in this process; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["longnet", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_show_prints_cost_reach_and_state(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "pattern.png"
    assert run(monkeypatch, "show", "paper", "--tokens", "32768", "--heads", "12", "-o", str(picture)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "7.68× less" in printed
    assert "after 2 layers" in printed
    assert "11,606 rows per key/value head" in printed
    assert picture.stat().st_size > 5000


def test_show_counts_the_rows_of_global_tokens(monkeypatch, capsys):
    assert run(monkeypatch, "show", "16:1,64:4;all;global=2", "-n", "64", "--heads", "4") == 0
    printed = capsys.readouterr().out
    rows = [int(row.split("│")[3]) for row in printed.splitlines() if row.startswith("│")]
    assert rows == [16, 16, 2]
    assert f"state  {sum(rows)} rows" in printed


def test_show_writes_the_explorer(monkeypatch, capsys, tmp_path):
    page, opened = tmp_path / "pattern.html", []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    arguments = ["show", "8:1,32:4;all", "-n", "100", "--heads", "3", "--no-causal", "-o", str(page), "--open"]
    assert run(monkeypatch, *arguments) == 0
    text = page.read_text()
    assert 'data-start="p=8%3A1%2C32%3A4%3Ball&amp;n=100&amp;h=3&amp;c=0&amp;q=62"' in text
    assert not re.search(r"<link|src=|https?:", text)
    assert opened == [page.as_uri()]
    assert run(monkeypatch, "show", "8:1", "-n", "8", "-o", str(tmp_path / "x.png"), "--open") == 2
    assert "give a file that ends in .html" in capsys.readouterr().err


def test_show_knows_what_has_no_reach(monkeypatch, capsys):
    assert run(monkeypatch, "show", "16:1,32:2", "-n", "64") == 0
    assert "some tokens never hear of each other" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, "show", "paper", "-n", "1000") == 0
    assert "after 1 layers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "2048", "-n", "8"], "cannot read the pattern '2048': write segment:rate pairs"),
        (["show", "8:1"], "show needs --tokens; for example: longnet show paper -n 32768"),
        (["show", "8:1", "-n", "0"], "--tokens must be at least 1, got 0"),
        (["show", f"{2**63}:1", "-n", "64"], "segment_lengths must be below 2^63"),
        (["show", "8:1", "-n", "x"], "-n must be an integer, like 512 or 8K, got x"),
        (["show", "8:1", "-n", "8", "-o", "x.doc"], "the suffix must be one of"),
        (["show", "8:1", "-n", "8", "-o", "/nonexistent/x.png"], "No such file or directory"),
        (["bench", "attention", "--device", "cuda"], "--device = 'cuda', but torch finds no GPU"),
        (["bench", "attention", "--device", "gpu"], "--device must be auto, cpu or cuda, got 'gpu'"),
        (["show", "8:1", "-n", "8", "-o", "/"], "cannot draw"),
        (["bench", "attention", "--quick", "-o", "/dev/null/x"], "Not a directory"),
        (["bench", "attention", "--repeats", "0"], "--repeats must be at least 1"),
        (["train"], "train needs RECIPE; for example: longnet train demo --data.path runs/data -o runs/mine"),
        (["trian", "demo"], "there is no command 'trian': did you mean train?"),
        (["frobnicate"], "there is no command 'frobnicate': there are show, prepare"),
        (["bench", "atention"], "there is no command 'bench atention': did you mean attention?"),
        (["bench", "frobnicate"], "there is no command 'bench frobnicate': there are attention, decode"),
        (["show", "8:1", "16:2", "-n", "8"], "show has no place for '16:2': longnet show --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("longnet: ")
    assert error.count("\n") == 1


def test_bash_completes_what_the_completion_was_written_for(monkeypatch, capsys, tmp_path):
    script = tmp_path / "longnet"
    assert run(monkeypatch, "--install-completion", "--shell", "bash", "-o", str(script)) == 0
    assert f"installed to {script}" in capsys.readouterr().out
    function = re.search(r"^complete -F (\S+) longnet$", script.read_text(), re.MULTILINE)[1]
    for words, expected in {
        "longnet tr": {"train"},
        "longnet bench ": {"attention", "decode", "distributed", "kernels", "slides"},
        "longnet prepare --split-by ": {"document", "folder"},
        "longnet train demo --optim.l": {"--optim.lr"},
    }.items():
        typed = words.split(" ")
        code = (
            f"source {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(typed)}); COMP_CWORD={len(typed) - 1};"
            f"{function}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        found = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
        assert set(found.stdout.split()) == expected, words


def test_an_error_that_nobody_raised_on_purpose_is_no_mistake_of_the_users(monkeypatch):
    def break_down(*_, **__):
        return int("not a number")

    monkeypatch.setattr("longnet.attention.pattern.DilationPattern.parse", break_down)
    with pytest.raises(ValueError, match="invalid literal"):
        run(monkeypatch, "show", "8:1", "-n", "8")


def test_a_warning_is_one_line():
    """And names no line of code: nobody who types commands can mend that."""
    code = "import warnings\nfrom longnet.cli import commands, main\n"
    code += "commands.run = lambda _: (warnings.warn('rates of 4'), warnings.warn('old', FutureWarning))\nmain.main()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said.splitlines() == ["longnet: warning: rates of 4", "longnet: warning: old (FutureWarning, <string>:3)"]


def test_the_version_is_the_packages(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == longnet.__version__


@pytest.fixture
def hears_ctrl_c():
    """Where the tests run in the background, the shell has them ignore it, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line_and_status_130(command, when, tmp_path):
    """However early: it comes while the first library of weight is imported, which catches all that is raised there."""
    heaviest = "numpy" if command == "prepare" else "torch"
    (tmp_path / f"{'cyclopts' if when == 'at once' else heaviest}.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('goes on')\n"
        "except BaseException:\n"
        "    raise ImportError('half imported')\n"
    )
    (tmp_path / "my-project").mkdir()
    (tmp_path / "my-project" / "a.txt").write_text("some text")
    paths = [str(tmp_path), str(Path(longnet.__file__).parents[1])]
    stopped = subprocess.run(
        [sys.executable, "-m", "longnet", *shlex.split(COMMANDS[command].example)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "longnet: stopped by Ctrl-C\n")


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_at_work_is_one_line_and_status_130(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        "longnet.attention.pattern.DilationPattern.parse", lambda _: os.kill(os.getpid(), signal.SIGINT)
    )
    assert run(monkeypatch, "show", "8:1", "-n", "8") == 130
    assert capsys.readouterr().err == "longnet: stopped by Ctrl-C\n"
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ("evaluate M D --contexts 64,2K --tokens 9", "evaluate M D --contexts 64 2048 --tokens 9"),
        ("evaluate M D --contexts=64,256", "evaluate M D --contexts 64 256"),
        (
            "recall R -o O --recall.systems sdpa,window 64:1,512:8;all",
            "recall R -o O --recall.systems sdpa window 64:1,512:8;all",
        ),
        ("evaluate M D --contexts 64 256 --report a,b", "evaluate M D --contexts 64 256 --report a,b"),
        ("train demo --optim.betas 0.9,0.95 -o a,b", "train demo --optim.betas 0.9 0.95 -o a,b"),
        ("train demo --evaluate.contexts 64, 1k", "train demo --evaluate.contexts 64 1024"),
        ("prepare a,b --suffixes .py,.md -o X", "prepare a,b --suffixes .py .md -o X"),
        ("generate M --prompt a,b", "generate M --prompt a,b"),
        ("evaluate M D --tokens 2K --contexts=1K,2K", "evaluate M D --tokens 2048 --contexts 1024 2048"),
        ("show 8:1 -n 1M --heads=4", "show 8:1 -n 1048576 --heads 4"),
        ("train demo -o 8K --train.tokens 8K 3K", "train demo -o 8K --train.tokens 8192 3K"),
    ],
)
def test_lists_are_written_in_one_way(words, spread):
    assert spread_lists(make_app(), words.split()) == spread.split()


def test_bench_attention_writes_rows_and_a_picture(monkeypatch, capsys, tmp_path):
    small = attention.Settings(
        lengths=(2048, 2100), dense_query_lengths=(2100,), factors=(4,), token_lengths=(2100,), memory_length=4096,
        tile_rows=(64, 128), num_heads=1, head_dim=8, repeats=1,
    )  # fmt: skip
    monkeypatch.setattr(attention, "QUICK", small)
    assert run(monkeypatch, "bench", "attention", "--quick", "--device", "cpu", "-o", str(tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == [
        "compare", "compare", "dense_queries", "tile", "tile", "accuracy", "accuracy", "per_token", "memory",
    ]  # fmt: skip
    assert (tmp_path / "runtime.svg").read_text().startswith("<svg ")
    assert "2,100" in capsys.readouterr().out


def test_bench_reports_nothing_that_its_gate_refused(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise attention.GateError("out is off by 1e-1")

    monkeypatch.setattr(attention, "gate", fail)
    assert run(monkeypatch, "bench", "attention", "--quick", "--device", "cpu", "-o", str(tmp_path)) == (
        "longnet: out is off by 1e-1"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_answers():
    shown = subprocess.run(
        [sys.executable, "-c", "from longnet.cli.main import main; main()"], capture_output=True, text=True, check=True
    )
    assert "show" in shown.stdout
