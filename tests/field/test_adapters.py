"""Adapters of dilated models, and folders that hold a pattern.

| source | instance | right value |
|---|---|---|
| tried here | AutoPeftModelForCausalLM of a dilated LoRA attends in full, off by 2.4 | the LoRA's logits, always |
| tried here | transformers' own load_adapter and save_pretrained with an adapter | the pattern is read, and kept |
| tried here | the Trainer resumes an adapter onto a base that was loaded anew | the run's own logits |
| tried here | an adapter loaded into a model with another pattern | refused in one line, as trained with another |
| tried here | PrefixTuning and PromptTuning, one segment over all | logits of sdpa, which the prefix changes |
| tried here | generate() with PrefixTuning, which transformers 5.24 lets PEFT 0.21 lose | refused in one line |
| tried here | a folder with a saved pattern, loaded without attn_implementation | a warning says how to load it |
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers.integrations.peft
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from longnet import DilationPattern, use_dilated_attention
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import use_sparse_fixed_attention
from longnet.model.patterns import fields_of
from model.families import BRANCHES, ONE_BRANCH, build, dilated, tokens_of

PATTERN = DilationPattern((4, 8, 32), (1, 2, 4), head_offsets="block", queries="all", global_tokens=2)
IDS = tokens_of(2, 37)


def to_dilated(model):
    use_dilated_attention(model, PATTERN, rotate_offsets=True)


def to_sparse(model):
    use_sparse_fixed_attention(model, SparseFixedPattern(8, 2))


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("Llama", num_key_value_heads=4).save_pretrained(folder)
    return folder


def adapted(base, change, task_type="CAUSAL_LM"):
    model = AutoModelForCausalLM.from_pretrained(base)
    change(model)
    torch.manual_seed(7)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=task_type)
    return get_peft_model(model, lora).eval()


def native(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter), adapter_name="mine")
    return model


def mixed(base, adapter):
    return PeftMixedModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def second(base, adapter):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.load_adapter(adapter, "mine")
    model.set_adapter("mine")
    return model


LOADERS = {
    "Auto class of PEFT": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "Auto class of transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "PeftModel": peft,
    "PeftMixedModel": mixed,
    "second adapter": second,
    "load_adapter of transformers": native,
}


@pytest.mark.parametrize("change", [to_dilated, to_sparse])
@pytest.mark.parametrize("way", LOADERS)
def test_an_adapter_brings_its_pattern(way, change, base, tmp_path):
    tuned = adapted(base, change)
    tuned.save_pretrained(tmp_path)
    expected = tuned(IDS).logits
    assert (expected - adapted(base, lambda _: None)(IDS).logits).abs().max() > 0.1
    again = LOADERS[way](base, tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, expected)


def test_it_is_kept_through_loading_saving_merging_and_without_a_task(base, tmp_path, monkeypatch):
    tuned = adapted(base, to_dilated, task_type=None)
    tuned.save_pretrained(tmp_path / "first")
    expected = tuned(IDS).logits
    again = AutoPeftModel.from_pretrained(tmp_path / "first").eval()
    torch.testing.assert_close(again(IDS).logits, expected)
    again.save_pretrained(tmp_path / "second")
    # transformers 5.24 asks for PEFT 0.22 before it saves an adapter.
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    native(base, tmp_path / "second").save_pretrained(tmp_path / "third")
    written = json.loads((tmp_path / "third" / "adapter_config.json").read_text())["auto_mapping"]
    assert written["longnet"] == {
        "attn_implementation": "dilated", "segment_lengths": [4, 8, 32], "dilation_rates": [1, 2, 4],
        "head_offsets": "block", "queries": "all", "global_tokens": 2, "rotate_offsets": True,
    }  # fmt: skip
    again = AutoPeftModel.from_pretrained(tmp_path / "third").eval()
    torch.testing.assert_close(again(IDS).logits, expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.warns(UserWarning, match='holds a pattern of dilated attention.*attn_implementation="dilated"'):
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")  # is meant: no warning
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="dilated")
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_attends_in_full_again_says_nothing_of_a_pattern(base, tmp_path):
    tuned = adapted(base, to_dilated)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    again.base_model.model.set_attn_implementation("sdpa")
    again.save_pretrained(tmp_path / "full")
    assert json.loads((tmp_path / "full" / "adapter_config.json").read_text())["auto_mapping"] is None


def test_another_pattern_is_refused(base, tmp_path):
    adapted(base, to_dilated).save_pretrained(tmp_path)
    model = dilated(AutoModelForCausalLM.from_pretrained(base), BRANCHES)
    with pytest.raises(ValueError, match=r"trained with dilated attention of segment_lengths \[4, 8, 32\].*\n?.*kept"):
        PeftModel.from_pretrained(model, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    to_sparse(model)
    with pytest.raises(ValueError, match="was trained with dilated attention, and the model's is sparse_fixed"):
        model.load_adapter(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["auto_mapping"]["longnet"]["curvature"] = 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="asks for an attention that this version does not know"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_a_trainer_resumes_an_adapter_onto_a_base_that_attends_in_full(base, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens_of(8, 20)]

    def trainer(model, steps):
        return Trainer(
            model=model, train_dataset=rows,
            args=TrainingArguments(
                output_dir=tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
                report_to=[], disable_tqdm=True, dataloader_pin_memory=False, lr_scheduler_type="constant",
                learning_rate=1e-2,
            ),
        )  # fmt: skip

    straight = adapted(base, to_dilated)
    trainer(straight, 4).train()
    trainer(adapted(base, to_dilated), 2).train()
    resumed = adapted(base, lambda _: None)
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fields_of(resumed.base_model.model.config, "dilated") is not None
    torch.testing.assert_close(resumed.eval()(IDS).logits, straight.eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning", "ignore:Position ids:UserWarning")
@pytest.mark.parametrize("family", ["Llama", "LongNet"])
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens(family, kind):
    settings = {"position_embedding": "rope"} if family == "LongNet" else {}
    plain = build(family, **settings)

    def tuned(model):
        torch.manual_seed(2)
        return get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()

    dense, full = tuned(copy.deepcopy(plain)), tuned(dilated(plain, ONE_BRANCH))
    expected = dense(IDS).logits
    assert (expected[:, -37:] - plain(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(full(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    padding = torch.ones_like(IDS)
    padding[0, :4] = 0
    with pytest.raises(ValueError, match="real tokens of a document must lie side by side"):
        full(IDS, attention_mask=padding)
    if kind is PrefixTuningConfig:
        with pytest.raises(ValueError, match=r"two names of one argument.*PEFT hands a prefix on by the old name"):
            full.generate(input_ids=IDS, max_new_tokens=2)
    else:
        # PEFT 0.21 looks for the cache by its old name, and puts the prompt before every token that transformers 5.24
        # generates, whatever the attention: this only says that ours is the same.
        found, wanted = (
            model.generate(
                input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )
            for model in (full, dense)
        )  # fmt: skip
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5, rtol=1e-5)
        later = dense(wanted.sequences[:, :-1]).logits[:, -1]
        assert (later - wanted.logits[-1]).abs().max() > 0.1  # when this fails PEFT has mended it: compare our branches


def test_importing_longnet_and_its_models_does_not_import_peft_which_is_served_once_it_comes():
    code = (
        "import sys, longnet.model; assert 'peft' not in sys.modules\n"
        "import peft; print(hasattr(peft.PeftModel.load_adapter, '__wrapped__'))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True"
