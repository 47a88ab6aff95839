"""What transformers' Trainer and loaders expect of a LongNet.

| source | instance | right value |
|---|---|---|
| tried here | Trainer.evaluate() of a LongNet reports no eval_loss, calls no compute_metrics | both |
| tried here | load_best_model_at_end | the best of the checkpoints is loaded |
| tried here | `model.config.tokenizer_class = "X"` before save_pretrained | the folder loads, and keeps it |
| tried here | … `config.pad_token`, `num_heads`, which look like fields misspelt | the folder loads, likewise |
| transformers serve | AutoConfig.from_pretrained(folder, tqdm_class=None) | loads |
"""

import json
import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlavaConfig,
    Trainer,
    TrainingArguments,
)

from model.families import build, tokens_of


def test_evaluation_metrics_and_the_best_model(tmp_path):
    model, rows = build("LongNet"), [{"input_ids": row, "labels": row} for row in tokens_of(4, 20)]
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    trainer = Trainer(
        model=model, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(5)],
        args=TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
            save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", use_cpu=True, report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    trainer.train()
    result = trainer.evaluate()
    assert math.isfinite(result["eval_loss"])
    assert result["eval_rows"] == 4
    assert seen[0] == (4, 20, 101)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == pytest.approx(min(losses))


def test_what_others_set_on_a_configuration_is_saved_and_loaded(tmp_path):
    model = build("LongNet", "dilated")
    model.config.tokenizer_class = "ByteTokenizer"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tokenizer_class == "ByteTokenizer"
    torch.testing.assert_close(again(tokens_of(1, 9)).logits, model(tokens_of(1, 9)).logits)
    assert AutoConfig.from_pretrained(tmp_path, tqdm_class=None).hidden_size == 32


def test_a_folder_that_was_saved_loads_whatever_others_call_their_keys(tmp_path):
    added = {
        "pad_token": "<pad>", "eos_token": "</s>", "num_heads": 4, "hidden_sizes": [1, 2], "d_model": 3, "dropout": 0.1,
        "rms_norm_eps": 1e-6, "segment_length": 8, "moe": True,
    }  # fmt: skip
    model = build("LongNet", "dilated")
    model.config.update(added)
    for folder in (tmp_path / "once", tmp_path / "twice"):  # saved, loaded and saved
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {name: getattr(model.config, name) for name in added} == added
        assert json.loads((folder / "config.json").read_text())["keys_of_others"] == sorted(added)
    nested = LlavaConfig(text_config=model.config)
    nested.save_pretrained(tmp_path / "nested")
    assert AutoConfig.from_pretrained(tmp_path / "nested").text_config.pad_token == "<pad>"
    file = tmp_path / "twice" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_head": 4}))
    with pytest.raises(TypeError, match="no field 'n_head': did you mean 'num_attention_heads'"):  # a user wrote this
        AutoConfig.from_pretrained(tmp_path / "twice")
