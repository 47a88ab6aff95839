"""The README's code runs as it stands, and its tree names every module."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert "hops" in capsys.readouterr().out
    assert names["q"].grad.shape == names["q"].shape
    assert names["model"].model.embed_tokens.weight.grad is not None


def test_the_tree_names_every_module():
    modules = {str(path.relative_to(ROOT / "src/longnet")) for path in (ROOT / "src/longnet").rglob("*.py")}
    unnamed = {name for name in modules if not name.endswith("__init__.py") and Path(name).name not in README}
    assert not unnamed


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
