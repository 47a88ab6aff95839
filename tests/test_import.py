"""What importing longnet costs and offers."""

import subprocess
import sys

import pytest

import longnet


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_pulls_in_torch_only():
    code = (
        "import sys, torch; before = set(sys.modules); import longnet;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert run(code) == "['longnet', 'torch']"


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
        "use_dilated_attention",
    ]
