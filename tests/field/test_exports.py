"""What writes a model down as a graph, or serves it in its own way, works or says in one line that it does not.

| source | instance | right value |
|---|---|---|
| torch.export | LongNet, a dilated Llama, one length and any length | the model's logits |
| torch.jit.trace | "Cannot insert a Tensor that requires grad as a constant" and a page of numbers | one line |
| torch.onnx.export(dynamo=False) | "unsupported type: DynamicCache" | one line |
| torch.onnx.export(dynamo=True) | "No ONNX function for aten.cummax" and much advice | our line, within its report |
| transformers serve | "module transformers has no attribute LongNetForCausalLM" | answers: test_import.py |
| transformers' ExecuTorch | "Could not guard on data-dependent expression" | one line |
| transformers' generate_batch | paged caches | one line, from transformers |
"""

import pytest
import torch
from torch.export import Dim
from transformers import GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache

from model.families import BRANCHES, build, dilated, tokens_of

IDS = tokens_of(2, 12)


@pytest.fixture(name="model", params=["LongNet", "Llama"])
def fixture_model(request):
    return dilated(build(request.param), BRANCHES)


def test_export_at_one_length_and_at_any(model):
    inputs = {"input_ids": IDS, "use_cache": False}
    shapes = {"input_ids": {1: Dim("tokens", min=3, max=64)}, "use_cache": None}
    expected = model(**inputs).logits
    fixed = torch.export.export(model, (), inputs)
    torch.testing.assert_close(fixed.module()(**inputs).logits, expected)
    ragged = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    torch.testing.assert_close(ragged(**inputs).logits, expected)
    longer = tokens_of(2, 37)
    torch.testing.assert_close(ragged(input_ids=longer, use_cache=False).logits, model(longer).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_and_onnx_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"^torch.jit.trace cannot record dilated attention"):
        torch.jit.trace(model, (IDS,))
    with pytest.raises(ValueError, match=r"^ONNX has no operator for dilated attention"):
        torch.onnx.export(model, (IDS,), tmp_path / "model.onnx", dynamo=False)


def test_the_newer_onnx_exporter_tells_it_too(model, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError, match="ONNX has no operator for dilated attention"):
        torch.onnx.export(
            model, (), tmp_path / "model.onnx", kwargs={"input_ids": IDS, "use_cache": False}, dynamo=True
        )


def test_executorch_is_refused(model):
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=30,
        cache_config={"batch_size": 1, "max_cache_len": 30},
    )  # fmt: skip
    with pytest.raises(Exception, match="ExecuTorch, cannot record dilated attention with a cache"):
        convert_and_export_with_cache(model, torch.tensor([[1]]), torch.tensor([0]))


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="dilated is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=2))
