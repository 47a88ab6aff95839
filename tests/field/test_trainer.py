"""What transformers' Trainer and loaders expect of a LongNet.

| source | instance | right value |
|---|---|---|
| tried here | Trainer.evaluate() of a LongNet reports no eval_loss, calls no compute_metrics | both |
| tried here | load_best_model_at_end | the best of the checkpoints is loaded |
| tried here | `model.config.tokenizer_class = "X"` before save_pretrained | the folder loads, and keeps it |
| transformers serve | AutoConfig.from_pretrained(folder, tqdm_class=None) | loads |
"""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments

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
