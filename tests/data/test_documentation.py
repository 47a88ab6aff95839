"""docs/data.md runs as it stands, on this package's own source."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import longnet
from longnet.cli.main import main
from longnet.cli.prepare import prepare

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_blocks_of_the_data_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    package = Path(longnet.__file__).parent
    for name in ("my-project", "SOURCE"):
        (tmp_path / name).symlink_to(package, target_is_directory=True)
    (tmp_path / "notes.txt").write_text("a note\n")
    blocks = re.findall(r"^```(console|python)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("python") >= 3
    names = {}
    for kind, block in blocks:
        if kind == "console":
            for line in block.splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line.removeprefix("$ ")))
                with pytest.raises(SystemExit) as stop:
                    main()
                assert not stop.value.code
        else:
            exec(compile(block, "data.md", "exec"), names)  # noqa: S102
    assert names["input_ids"].shape == (4, 512)
    assert names["data"].provenance["sources"] == ["SOURCE"]
    assert '"""' in capsys.readouterr().out  # the text of a module


def test_every_option_is_explained():
    options = {name.replace("_", "-") for name in prepare.__kwdefaults__} | {"train-bpe"}
    assert {name for name in options if f"--{name}" not in PAGE} == set()


def test_what_is_claimed_about_the_defaults():
    assert prepare.__kwdefaults__["validation"] == 0.05
    assert prepare.__kwdefaults__["shard_tokens"] == 64 * 2**20
