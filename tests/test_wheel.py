"""The wheel, installed into an environment of its own, does the demo from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = """
longnet prepare TEXT --train-bpe 400 --validation 0.3 -o runs/data
longnet train demo --data.path runs/data -o runs/mine --train.steps 2 --train.tokens 64 --evaluate.every 0 \
  --sample.every 0 --train.device cpu
"""


def run(*command, **keywords):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **keywords)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    run(sys.executable, *build, "--wheel-dir", folder, ROOT)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_holds_recipes_licence_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"longnet/recipes/{path.name}" for path in (ROOT / "src/longnet/recipes").glob("*.toml")}
    assert {"longnet/py.typed", "longnet/__main__.py", "longnet/explorer/pattern.html"} | recipes <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "src")) for name in names)


def test_the_demo_runs_from_an_empty_folder(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    # Libraries are those of this environment; a path in a .pth file brings no .pth files of its own, so that this
    # repository itself, installed there editable, is not seen.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text"
    text.mkdir()
    for path in sorted((ROOT / "src/longnet/attention").glob("*.py")):
        (text / path.name).write_text(path.read_text())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    clean["PATH"] = f"{home / 'bin'}{os.pathsep}{clean['PATH']}"
    assert run(python, "-c", "import longnet; print(longnet.__file__)", cwd=empty, env=clean).startswith(str(home))
    out = run("sh", "-ec", DEMO.replace("TEXT", str(text)), cwd=empty, env=clean)
    load = [line for line in out.splitlines() if line.startswith(("import longnet", "model = "))]
    assert len(load) == 2
    load += ["print(type(model).__name__, longnet.__version__)", "from transformers import AutoTokenizer, pipeline"]
    folder = load[1].partition('"')[2].partition('"')[0] or load[1].partition("'")[2].partition("'")[0]
    load += [f"print(pipeline('text-generation', {folder!r}, device='cpu')('def', max_new_tokens=3)[0].keys())"]
    said = run(python, "-c", "\n".join(load), cwd=empty, env=clean)
    assert "LongNetForCausalLM" in said
    assert "generated_text" in said
