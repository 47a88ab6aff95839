"""Every recipe of the repository is one, and says how its data are made."""

import sys
from pathlib import Path

import pytest

from longnet.cli.main import main

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def test_there_are_recipes():
    assert {"demo", "table2-tiny", "table2-small", "paper-125m", "paper-2.7b"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_whole(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # so that no data are prepared
    monkeypatch.setattr(sys, "argv", ["longnet", "info", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "dilated" in printed
    assert "a token in training" in printed
    assert "longnet prepare" in path.read_text()
