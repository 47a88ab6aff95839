"""The README's code runs as it stands, and its tree names every module."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from longnet.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert "hops" in capsys.readouterr().out
    assert names["q"].grad.shape == names["q"].shape
    assert names["model"].model.embed_tokens.weight.grad is not None


def test_the_commands_of_the_quick_start_run(tmp_path, monkeypatch, capsys):
    smaller = "--train.steps 4 --train.device cpu --evaluate.every 2 --evaluate.contexts 64 128 --sample.every 0"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-project").symlink_to(ROOT / "src", target_is_directory=True)
    (block,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    commands = [shlex.split(line.removeprefix("$ ")) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["prepare", "train", "evaluate", "generate"]
    for command in commands:
        more = {"train": smaller, "evaluate": "--tokens 4096 --device cpu", "generate": "--tokens 8"}
        monkeypatch.setattr(sys, "argv", command + more.get(command[1], "").split())
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
    assert "def " in capsys.readouterr().out
    assert (
        "<svg" in (tmp_path / "runs/mine.html").read_text() or "data:image" in (tmp_path / "runs/mine.html").read_text()
    )


def test_the_tree_names_every_module():
    modules = {str(path.relative_to(ROOT / "src/longnet")) for path in (ROOT / "src/longnet").rglob("*.py")}
    unnamed = {name for name in modules if not name.endswith("__init__.py") and Path(name).name not in README}
    assert not unnamed


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
