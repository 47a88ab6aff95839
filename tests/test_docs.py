"""The pages that no other test runs do run: their Python, and what they type at a console."""

import logging
import re
import shlex
import sys
from pathlib import Path

import pytest

import longnet
from longnet.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
# These have tests of their own, or hold no code that runs.
ELSEWHERE = {"huggingface", "streaming", "training", "data", "distributed", "design", "compatibility", "evidence"}
SMALLER = "--train.steps 4 --train.tokens 64 --train.device cpu --evaluate.every 0 --sample.every 0"


@pytest.mark.parametrize("page", sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in ELSEWHERE))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("longnet").level
    (tmp_path / "my-project").symlink_to(Path(longnet.__file__).parent / "attention", target_is_directory=True)
    names = {}
    for kind, block in re.findall(
        r"^```(console|python)\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    ):
        if kind == "python":
            exec(compile(block, f"{page}.md", "exec"), names)  # noqa: S102
            continue
        for line in block.splitlines():
            command = shlex.split(line.removeprefix("$ "))
            monkeypatch.setattr(sys, "argv", command + (SMALLER.split() if command[1] == "train" else []))
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code, line
    logging.getLogger("longnet").setLevel(level)


def test_the_reference_has_every_public_name():
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    assert len(named) == len(set(named))
    rendered = {name.rpartition(".")[2] for name in named}
    assert set(longnet.__all__) <= rendered
    modules = {name for name in named if name.rpartition(".")[2].islower()}
    assert {"longnet.attention.backends.dispatch", "longnet.attention.backends.triton.launch"} <= modules


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
