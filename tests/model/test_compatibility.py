"""What people do to a model besides running it: compile, checkpoint, quantise, fine-tune, evaluate."""

import copy
import json
import math

import datasets
import pytest
import torch
import torch._dynamo.testing
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.pytorch_utils import Conv1D

from longnet.model import DilatedCache
from longnet.model.versions import CACHE, checkpoint_layers
from model.families import (
    BRANCHES,
    CAUSAL,
    FAMILIES,
    ONE_BRANCH,
    TEXT,
    build,
    columns_of,
    dilated,
    mask_of,
    positions_of,
    tokens_of,
)

TOKENS = 37


def batch(kind: str, family: str) -> dict:
    ids = tokens_of(2, TOKENS)
    inputs = {"input_ids": ids}
    if family in CAUSAL:
        inputs["use_cache"] = False
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        inputs |= {"attention_mask": mask, "position_ids": positions_of(mask)}
    elif kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (11, 6, 20)]).expand(2, -1)
    return inputs


def loss_and_gradients(model, call, inputs):
    model.zero_grad()
    ids = inputs["input_ids"]
    logits = call(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, call, reference, inputs, rtol=1e-5):
    loss, gradients = loss_and_gradients(model, call, inputs)
    expected, wanted = loss_and_gradients(reference, reference, inputs)
    torch.testing.assert_close(loss, expected, atol=0, rtol=rtol)
    largest = max(grad.abs().max() for grad in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, grad in gradients.items():
        assert (grad - wanted[name]).abs().max() <= rtol * largest, name


def one_layer(family):
    if family == "ModernBERT":  # its configuration refuses layers of one type before transformers 5.17
        return {"num_hidden_layers": 2}
    return {"n_layer": 1} if family == "GPT-2" else {"num_hidden_layers": 1}


@pytest.mark.feature("torch.compile without a graph break")
@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, kind) for f in TEXT for kind in ("plain", "padded", "packed") if kind != "packed" or f in CAUSAL],
)
def test_compile_fullgraph(family, kind):
    torch._dynamo.reset()
    model = dilated(build(family, **one_layer(family)), BRANCHES)
    other = copy.deepcopy(model)
    assert_same_step(other, torch.compile(other, backend="eager", fullgraph=True), model, batch(kind, family))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_compile_backends(backend):
    torch._dynamo.reset()
    model = dilated(build("Llama", num_hidden_layers=1), BRANCHES)
    other = copy.deepcopy(model)
    assert_same_step(other, torch.compile(other, backend=backend, fullgraph=True), model, batch("padded", "Llama"))


@pytest.mark.feature("torch.compile of decoding, static cache, two graphs")
@pytest.mark.parametrize("family", CAUSAL)
def test_compiled_decoding_does_not_recompile_at_each_token(family):
    """As generate() does on a GPU: masks made ahead, a compiled forward for each token."""
    torch._dynamo.reset()
    model = dilated(build(family, **one_layer(family)), BRANCHES)
    ids = tokens_of(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = positions_of(mask)
    full = model(ids, attention_mask=mask, position_ids=positions).logits
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model.forward, backend=counter)
    past = StaticCache(config=model.config, max_cache_len=50)
    with torch.no_grad():
        start = {"attention_mask": mask[:, :9], "position_ids": positions[:, :9], CACHE: past}
        parts = [model(ids[:, :9], **start).logits]
        for t in range(9, TOKENS):
            here = positions[:, t : t + 1]
            seen = mask_of(
                create_masks_for_generate, model.config, torch.empty(2, 1, 0), mask[:, : t + 1],
                cache=past, past=t, position_ids=here,
            )  # fmt: skip
            step = {"attention_mask": seen, "position_ids": here, CACHE: past, "use_cache": True, **columns_of(t, 1)}
            parts.append(compiled(ids[:, t : t + 1], **step).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], full[mask.bool()], atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["dynamic", "static", "dilated"])
@pytest.mark.parametrize("family", ["LongNet", "Llama"])
def test_compiled_prefill_with_a_cache(family, kind):
    torch._dynamo.reset()
    model = dilated(build(family, **one_layer(family)), BRANCHES)
    ids = tokens_of(2, TOKENS)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=50),
        "dilated": lambda: DilatedCache(model.config),
    }[kind]()
    compiled = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        parts = [compiled(part, **{CACHE: cache}, use_cache=True).logits for part in ids.split([20, 16, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.feature("activation checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", TEXT)
def test_activation_checkpointing(family, use_reentrant):
    model = dilated(build(family), BRANCHES).train()
    other = copy.deepcopy(model)
    checkpoint_layers(other, use_reentrant=use_reentrant)
    other.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
    calls = []
    for layer in other.modules():
        if layer.__class__.__name__.endswith(("Attention", "SelfAttention")):
            layer.register_forward_hook(lambda *_: calls.append(1))
    dropless = {"input_ids": tokens_of(2, TOKENS), **({"use_cache": False} if family in CAUSAL else {})}
    assert_same_step(other, other, model, dropless)
    assert len(calls) >= 4  # two layers, each recomputed


@pytest.mark.feature("autocast bf16")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_autocast(family):
    """No further from float32 than sdpa under the same autocast."""
    sdpa = build(family)
    model = dilated(sdpa, ONE_BRANCH)
    if FAMILIES[family].is_text:
        inputs = {"input_ids": tokens_of(2, TOKENS)}
    else:
        inputs = {"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))}
    exact = sdpa(**inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**inputs)[0], sdpa(**inputs)[0]
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
    assert (ours - exact).abs().max() > 1e-4
    ours.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.feature("from_pretrained(dtype=bfloat16)")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_from_pretrained_dtype(family, tmp_path):
    model = dilated(build(family), BRANCHES)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForMaskedLM if FAMILIES[family].is_text else AutoModel
    loaded = auto.from_pretrained(tmp_path, attn_implementation="dilated", dtype=torch.bfloat16).eval()
    if FAMILIES[family].is_text:
        inputs = wide = {"input_ids": tokens_of(2, TOKENS)}
    else:
        wide = {"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))}
        inputs = {"pixel_values": wide["pixel_values"].bfloat16()}
    out, exact = loaded(**inputs)[0], model(**wide)[0]
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() <= 0.05 * exact.norm()


class Texts(torch.utils.data.Dataset):
    """Bytes that can be learnt: counting, with a stride of its own in each row."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = 3 + (torch.arange(48) * (1 + index % 5) + index) % 90
        return {"input_ids": ids, "labels": ids}


def trainer(model, path, steps):
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=steps, save_steps=4, per_device_train_batch_size=8, learning_rate=1e-2,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, seed=1, save_total_limit=3, warmup_steps=2,
        lr_scheduler_type="constant_with_warmup", dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Texts())


@pytest.mark.feature("Trainer: train")
@pytest.mark.parametrize("family", CAUSAL)
def test_trainer_trains(family, tmp_path):
    straight = trainer(dilated(build(family), BRANCHES), tmp_path, 8)
    straight.train()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.feature("Trainer: resume to the same weights")
@pytest.mark.parametrize("family", CAUSAL)
def test_trainer_resumes(family, tmp_path):
    # transformers 5.23 writes GPT-NeoX's head as embed_out, and its Trainer looks for lm_head, whatever the attention:
    # an untied head is not resumed. A tied one is the embeddings.
    settings = {"tie_word_embeddings": True} if family == "GPT-NeoX" else {}
    model = dilated(build(family, **settings), BRANCHES)
    start = copy.deepcopy(model)
    trainer(model, tmp_path / "straight", 8).train()
    stopped = trainer(copy.deepcopy(start), tmp_path / "stopped", 8)
    stopped.args.max_steps = 4
    stopped.train()
    resumed = trainer(start, tmp_path / "stopped", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.feature("Trainer: evaluate, compute_metrics, early stopping, best model")
@pytest.mark.parametrize("family", CAUSAL)
def test_trainer_evaluates(family, tmp_path):
    """It stops at the second evaluation that is no better, and has the weights of the first again."""
    rows = [{"input_ids": row, "labels": row} for row in tokens_of(4, 20)]
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"falls": -len(shapes)}

    model = dilated(build(family, tie_word_embeddings=True), BRANCHES)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="falls", greater_is_better=True, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert shapes == [(4, 20, 101)] * 3
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] != losses[2]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.feature("PEFT LoRA: train, save, reload, merge")
@pytest.mark.parametrize("family", TEXT)
def test_lora(family, tmp_path):
    model = dilated(build(family), BRANCHES)
    base = copy.deepcopy(model)
    names = {"GPT-NeoX": ["query_key_value"], "GPT-2": ["c_attn"], "BERT": ["query", "value"], "ModernBERT": ["Wqkv"]}
    lora = LoraConfig(r=4, target_modules=names.get(family, ["q_proj", "v_proj"]), fan_in_fan_out=family == "GPT-2")
    tuned = get_peft_model(model, lora)
    inputs = batch("padded", family)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(6):
        loss, gradients = loss_and_gradients(tuned, tuned, inputs)
        assert all("lora_" in name for name in gradients)
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0]
    tuned.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = tuned(**inputs).logits
    torch.testing.assert_close(again(**inputs).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def trained(family):
    model = dilated(build(family), BRANCHES).train()
    ids = torch.stack([Texts()[index]["input_ids"] for index in range(64)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval(), ids


def replace_conv1d(model):
    """Make nn.Linear of GPT-2's Conv1D, the same with its weight transposed, which torchao passes by."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(child.nx, child.nf)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=pytest.mark.feature(f"torchao int8 {kind}, perplexity within 2 %"))
        for kind in ("weight-only", "dynamic")
        for family in CAUSAL
    ],
)
def test_int8(family, kind):
    model, ids = trained(family)
    if family == "GPT-2":
        logits = model(ids).logits
        replace_conv1d(model)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        before = model(ids, labels=ids).loss.exp()
        config = Int8WeightOnlyConfig() if kind == "weight-only" else Int8DynamicActivationInt8WeightConfig()
        quantize_(model, config)
        after = model(ids, labels=ids).loss.exp()
    projections = [
        m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
    ]
    assert all(type(m.weight) is not torch.nn.Parameter for m in projections)
    assert len(projections) >= 8  # four a layer, at least
    assert before < 60  # it has learnt: 101 is guessing
    assert after != before
    assert abs(after / before - 1) < 0.02


def byte_tokenizer(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


@pytest.mark.feature("lm-eval on a local task")
@pytest.mark.parametrize("family", CAUSAL)
def test_lm_eval(family, tmp_path, monkeypatch):
    """The byte perplexity that lm-eval finds is the one of the model's own logits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer.json")
    documents = ["In the beginning there was one segment.", "A key that three branches see counts three times."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_bytes
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{tmp_path / "texts.jsonl"}"}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""
    )
    model = dilated(build(family, vocab_size=257), BRANCHES)
    likelihood = 0.0
    for text in documents:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        likelihood += logits.gather(1, ids[0, 1:, None]).sum().item()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu", max_length=128)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(lm, tasks=["local_bytes"], task_manager=tasks, bootstrap_iters=0)
    perplexity = found["results"]["local_bytes"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-likelihood / sum(map(len, documents))), rel=1e-5)
