"""What importing longnet costs and offers."""

import ast
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import longnet

# What torch imports in its own time where it is installed.
OF_TORCH = {"torch", "triton", f"_sysconfigdata_{sys.abiflags}_{sys.platform}_{sysconfig.get_config_var('MULTIARCH')}"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_costs_nothing_and_the_op_and_the_layer_need_torch_only():
    code = "import sys; before = set(sys.modules); import longnet; print(sorted(set(sys.modules) - before))"
    assert "torch" not in run(code)
    code = (
        "import sys, torch; before = set(sys.modules); from longnet import DilatedSelfAttention, dilated_attention;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert set(run(code).split()) - OF_TORCH == {"longnet"}


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
    own = {"torch", "triton"} if path.parent.name == "triton" else {"torch"}
    foreign = {name for name in named if name.split(".")[0] not in sys.stdlib_module_names | own}
    assert all(name.startswith("longnet.attention") for name in foreign), foreign


def test_importing_all_of_attention_pulls_in_torch_only():
    modules = [".".join(path.relative_to(ATTENTION[0].parents[2]).with_suffix("").parts) for path in ATTENTION]
    modules = [name for name in modules if not name.endswith("__init__")]
    if importlib.util.find_spec("triton") is None:
        modules = [name for name in modules if not name.endswith(("triton.forward", "triton.backward", "triton.merge"))]
    assert "longnet.attention.backends.sdpa" in modules
    code = (
        "import importlib, sys, torch, torch.utils.flop_counter; before = set(sys.modules);"
        f"[importlib.import_module(name) for name in {modules}];"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert set(run(code).split()) - OF_TORCH == {"longnet"}


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
        "DilatedSelfAttention",
        "DilationPattern",
        "LongNetConfig",
        "LongNetForCausalLM",
        "LongNetForImageClassification",
        "LongNetForMaskedLM",
        "LongNetForQuestionAnswering",
        "LongNetForSequenceClassification",
        "LongNetForSlideClassification",
        "LongNetForTokenClassification",
        "LongNetImageConfig",
        "LongNetImageModel",
        "LongNetModel",
        "LongNetSlideConfig",
        "LongNetSlideModel",
        "collate_slides",
        "dilated_attention",
        "load_gigapath",
        "load_longvit",
        "load_torchscale_lm",
        "sequence_parallel",
        "use_dilated_attention",
    ]


BERT_OR_OURS = """
config = AutoConfig.for_model("longnet", **sizes)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "LongNetForCausalLM"
llama = AutoConfig.for_model("llama", **sizes, segment_lengths=[8], dilation_rates=[1])
model = AutoModelForCausalLM.from_config(llama, attn_implementation="dilated")
print(model(torch.ones(1, 5, dtype=torch.long)).logits.shape)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import longnet; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import longnet",
        "import transformers, longnet; from transformers import AutoModelForCausalLM, AutoConfig",
        "import longnet, transformers.generation.utils; from transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_import_longnet_makes_it_known_to_transformers(first):
    sizes = "sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)"
    assert run(f"import torch; {first}; {sizes}{BERT_OR_OURS}") == "torch.Size([1, 5, 9])"


@pytest.mark.parametrize(
    "first",
    [
        "import transformers as held; from longnet import LongNetForCausalLM as ours",
        "import longnet, transformers as held; from transformers import ContinuousBatchingConfig, AutoConfig",
        "import longnet, transformers as held, transformers.modeling_layers; from longnet import LongNetModel",
    ],
)
def test_a_checkpoints_class_is_found_by_name_in_transformers(first):
    """As `transformers serve` finds it; importing transformers' models makes that module anew."""
    now = "import sys; now = sys.modules['transformers']"
    assert run(f"{first}; {now}; print(held.LongNetForCausalLM is now.LongNetForCausalLM)") == "True"


def test_who_needs_no_models_of_transformers_does_not_pay_for_ours():
    code = (
        "import sys, longnet; from transformers import PreTrainedTokenizerFast;"
        "print('longnet.model' in sys.modules, 'transformers.modeling_utils' in sys.modules)"
    )
    assert run(code) == "False False"


def test_a_transformers_that_cannot_be_served_is_told_and_works_all_the_same():
    code = (
        "import sys, warnings; sys.modules['longnet.model'] = None; import longnet\n"
        "with warnings.catch_warnings(record=True) as said: from transformers import AutoConfig\n"
        "print(AutoConfig.__name__, said[-1].message)"
    )
    assert run(code).startswith("AutoConfig LongNet cannot make itself known to transformers: import of longnet.model")
