"""The public face."""

import subprocess
import sys

import longnet


def test_public_names():
    assert sorted(longnet.__all__) == ["DilationPattern", "dilated_attention", "use_dilated_attention"]
    assert all(hasattr(longnet, name) for name in longnet.__all__)


def test_importing_pulls_in_torch_only():
    code = (
        "import sys, torch; before = set(sys.modules); import longnet;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['longnet', 'torch']"
