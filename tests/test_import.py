"""What importing longnet costs and offers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longnet


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_pulls_in_torch_only():
    code = (  # triton is torch's, where it is installed
        "import sys, torch; before = set(sys.modules); import longnet;"
        "packages = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(packages - sys.stdlib_module_names - {'triton', '_sysconfigdata__linux_x86_64-linux-gnu'}))"
    )
    assert run(code) == "['longnet', 'torch']"


ATTENTION = sorted((Path(longnet.__file__).parent / "attention").rglob("*.py"))


@pytest.mark.parametrize("path", ATTENTION, ids=lambda path: path.stem)
def test_attention_names_torch_the_standard_library_and_itself_alone(path):
    """Within functions too, where importing shows nothing."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            named.add(node.module)
    foreign = {name for name in named if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}}
    assert all(name.startswith("longnet.attention") for name in foreign), foreign


def test_importing_all_of_attention_pulls_in_torch_only():
    modules = [".".join(path.relative_to(ATTENTION[0].parents[2]).with_suffix("").parts) for path in ATTENTION]
    modules = [name for name in modules if not name.endswith("__init__")]
    assert "longnet.attention.backends.sdpa" in modules
    code = (
        "import importlib, sys, torch, torch.utils.flop_counter; before = set(sys.modules);"
        f"[importlib.import_module(name) for name in {modules}];"
        "packages = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(packages - sys.stdlib_module_names - {'triton', '_sysconfigdata__linux_x86_64-linux-gnu'}))"
    )
    assert run(code) in ("['longnet']", "['longnet', 'torch']")


def test_the_models_come_when_asked_for():
    asked = "import sys, longnet; longnet.LongNetForCausalLM; print('transformers' in sys.modules)"
    assert run(asked).split()[-1] == "True"
    for name in longnet.__all__:
        assert getattr(longnet, name).__name__ == name
        assert name in dir(longnet)
    with pytest.raises(AttributeError, match="no attribute 'LongNetXL'"):
        longnet.LongNetXL  # noqa: B018


def test_the_public_names_are_these():
    assert longnet.__all__ == [
        "DilatedCache",
        "DilationPattern",
        "LongNetConfig",
        "LongNetForCausalLM",
        "LongNetModel",
        "dilated_attention",
        "sequence_parallel",
        "use_dilated_attention",
    ]
