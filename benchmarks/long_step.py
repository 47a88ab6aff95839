"""One exact optimizer step on one sequence of up to a billion bytes: `python benchmarks/long_step.py --help`.

The text is the Linux kernel's source as `longnet prepare linux-source-6.1 --validation 0.002` lays it out, in path
order; the held-out text are its last bytes, far behind the sequence. A step that was stopped or killed goes on with the
same command. The result is one JSON object beside what the step keeps on disk, and gradients.safetensors the gradient.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import longnet  # noqa: F401  Auto classes know LongNet
from longnet.data.shards import Split, TokenData
from longnet.measurement import peak_bytes, provenance, take_device
from longnet.training.chunk_schedule import chunk_costs
from longnet.training.chunked import ChunkedStep
from longnet.training.optim import OptimConfig, gradient_norm, make_optimizer, update

CONTEXT = 65536
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # of the one step, each from the same start


@torch.no_grad()
def held_out_loss(model, split: Split, tokens: int) -> float:
    """Return the mean nats a byte of the last `tokens` of the split, in windows of CONTEXT."""
    total, scored = 0.0, tokens // CONTEXT * CONTEXT
    for start in range(split.tokens - scored - 1, split.tokens - 1, CONTEXT):
        ids = torch.from_numpy(split.read(start, start + CONTEXT + 1))[None].to(model.device, torch.int64)
        logits = model.eval()(ids[:, :-1], use_cache=False).logits
        total += float(functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum"))
    return total / scored


def learn(model, split: Split, arguments: argparse.Namespace) -> dict[str, float]:
    """Fill the weights' gradients with those of the whole sequence, from wherever the step stands."""

    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(split.read(start, stop + 1))[None]
        return ids[:, :-1], ids[:, 1:]

    folder, told = arguments.output / "step", arguments.output / "spent.json"
    nothing = dict.fromkeys(("user_s", "system_s", "wall_s", "peak_bytes", "log_bytes", "processes"), 0)
    spent = json.loads(told.read_text()) if told.exists() else nothing
    peak_bytes(model.device, reset=True)
    first = saved = time.perf_counter()
    usage = resource.getrusage(resource.RUSAGE_SELF)

    def note() -> dict[str, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        log = sum(path.stat().st_size for path in folder.glob("rows-*.log"))
        return {
            "user_s": spent["user_s"] + now.ru_utime - usage.ru_utime,
            "system_s": spent["system_s"] + now.ru_stime - usage.ru_stime,
            "wall_s": spent["wall_s"] + time.perf_counter() - first,
            "peak_bytes": max(spent["peak_bytes"], peak_bytes(model.device)),
            "log_bytes": max(spent["log_bytes"], log),
            "processes": spent["processes"] + 1,
        }

    with ChunkedStep(
        model.train(), read, sequences=1, tokens=arguments.tokens, chunk_tokens=arguments.chunk_tokens,
        items=arguments.tokens, folder=folder,
    ) as step:  # fmt: skip
        if step.reread:
            print(f"the log is missing or too short: {step.reread:,} chunks are read anew", flush=True)
        for progress in step:
            if time.perf_counter() - saved >= arguments.save_seconds or progress.share == 1:
                step.save()
                told.write_text(json.dumps(note()))
                saved = time.perf_counter()
                what = "learning from" if progress.is_learning else "reading"
                print(f"{progress.share:7.2%}  {what} chunk {progress.chunk:,} of {progress.chunks:,}", flush=True)
        return {"loss": step.loss, **json.loads(told.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a LongNet of bytes: benchmarks/results/billion/model")
    parser.add_argument("data", type=Path, help="folder that longnet prepare wrote")
    parser.add_argument("--tokens", type=int, required=True, help="of the sequence, the first of the training split")
    parser.add_argument("--chunk-tokens", type=int, default=16384)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--save-seconds", type=float, default=60.0, help="between two saves of the step, from which it goes on"
    )
    parser.add_argument("--held-out", type=int, default=2**22, help="tokens, the last of the training split")
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the step and of result.json")
    arguments = parser.parse_args()
    device = take_device(arguments.device, option="--device")
    arguments.output.mkdir(parents=True, exist_ok=True)
    split = TokenData.open(arguments.data).train
    if arguments.tokens + 1 + arguments.held_out > split.tokens:
        parser.error(f"{arguments.data} has {split.tokens:,} tokens, fewer than the sequence and the held-out text")
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
    before = held_out_loss(model, split, arguments.held_out)
    print(f"held-out loss before the step: {before:.5f} nats a byte", flush=True)
    made = learn(model, split, arguments)
    norm = gradient_norm(model)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    save_file(gradients, arguments.output / "gradients.safetensors")
    after = {}
    for rate in RATES:
        for name, weight in model.named_parameters():
            weight.data.copy_(weights[name])
            weight.grad = gradients[name].clone()
        update(make_optimizer(model, OptimConfig(lr=rate)), lr=rate, clip=2.0, norm=norm)
        after[f"{rate:g}"] = held_out_loss(model, split, arguments.held_out)
        print(f"held-out loss after one AdamW step at {rate:g}: {after[f'{rate:g}']:.5f}", flush=True)
    costs = chunk_costs(model.config, tokens=arguments.tokens, chunk_tokens=arguments.chunk_tokens)
    result = {
        "case": "one exact step", "tokens": arguments.tokens, "chunk_tokens": arguments.chunk_tokens,
        "gradient_norm": float(norm), **made, "user_us_a_token": 1e6 * made["user_s"] / arguments.tokens,
        "log_bytes_estimated": costs.log, "held_out_tokens": arguments.held_out, "held_out_before": before,
        "held_out_after": after, **provenance(device),
    }  # fmt: skip
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
