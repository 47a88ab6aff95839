"""Why a converted model loses what it loses: SmolLM2 under masks that `dilated_attention` cannot make, without healing.

    python benchmarks/smollm2.py runs/smollm2 convert
    python benchmarks/smollm2_masks.py runs/smollm2

Each system is a dense additive mask, the logarithm of how often a query counts a key, written from the definition;
those of systems that the operator has are checked against it. A row a system and file, as in smollm2.py.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from smollm2 import FILES, add_row, load, rows_of
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

import longnet
from longnet import DilationPattern
from longnet.evaluation.scoring import Scorer

TOKENS, LOCAL, RATE = 4096, 512, 8
KV_HEADS, ROWS = 3, 512
GATE = 1e-4  # nats a token, in float32
Counts = Callable[[Tensor, Tensor, int], Tensor]  # rows (n, 1), keys (1, T), the head's place among all layers' heads


def segments(length: int, shift: int = 0) -> Counts:
    """Each query sees its segment."""
    return lambda q, k, head: (q + shift) // length == (k + shift) // length


def last(length: int) -> Counts:
    """Each query sees so many keys, itself the last."""
    return lambda q, k, head: q - k < length


def kept(length: int, rate: int, queries: str = "all", is_rotated: bool = True) -> Counts:
    """Each query, or each that is kept, sees of its segment what its head keeps: offsets go on from layer to layer."""

    def seen(q: Tensor, k: Tensor, head: int) -> Tensor:
        offset = head % rate if is_rotated else 0
        same = (q // length == k // length) & (k % length % rate == offset)
        return same & (q % length % rate == offset) if queries == "kept" else same

    return seen


def together(*parts: Counts, first: bool = False, once: bool = False) -> Counts:
    """Add up how often a query counts a key; `once`: at most once; `first`: the first token too, unless it is there."""

    def count(q: Tensor, k: Tensor, head: int) -> Tensor:
        total = torch.stack([part(q, k, head).float() for part in parts]).sum(0)
        total = total.clamp(max=1) if once else total
        return torch.where(k == 0, total.clamp(min=1), total) if first else total

    return count


FAR = kept(TOKENS, RATE)
KEPT = (segments(512), kept(1024, 2, "kept"), kept(2048, 4, "kept"), kept(4096, 8, "kept"))
OPERATORS = {"window": "1024:1", "kept": "512:1,1024:2,2048:4,4096:8", "all": "512:1,4096:8;all"}
SYSTEMS = {
    "dense": segments(TOKENS),
    "window": segments(1024),
    "kept": together(*KEPT),
    "all": together(segments(LOCAL), FAR),
    "kept, first token": together(*KEPT, first=True),
    "all, first token": together(segments(LOCAL), FAR, first=True),
    "all, each key once": together(segments(LOCAL), FAR, once=True),
    "all, one offset for all heads": together(segments(LOCAL), kept(TOKENS, RATE, is_rotated=False)),
    "last 512": last(LOCAL),
    "last 512, first token": together(last(LOCAL), first=True),
    "last 256, first token": together(last(LOCAL // 2), first=True),
    "last 256 and far, first token": together(last(LOCAL // 2), FAR, first=True, once=True),
    "own and previous 256 and far, first token": together(
        lambda q, k, head: (q // 256 - k // 256) <= 1, FAR, first=True, once=True
    ),
}


@functools.lru_cache(maxsize=512)
def bias(system: str, head: int, start: int) -> Tensor:
    """Return a mask (rows, keys up to the last row) for the rows from `start` on."""
    stop = min(TOKENS, start + ROWS)
    q, k = torch.arange(start, stop)[:, None], torch.arange(stop)[None]
    return (SYSTEMS[system](q, k, head) * (k <= q)).log()


def share_of_dense(system: str) -> float:
    """Return the pairs of a query and a key that a system counts, over those of dense causal attention."""
    heads = range(KV_HEADS * RATE)  # a period of the offsets
    masks = (bias(system, head, start) for head in heads for start in range(0, TOKENS, ROWS))
    pairs = sum(mask.exp().round().sum(dtype=torch.float64).item() for mask in masks)
    return pairs / len(heads) / (TOKENS * (TOKENS + 1) / 2)


def attend(module, query, key, value, attention_mask, scaling=None, **_):  # type: ignore[no-untyped-def]
    """Attend under the masks of the system that the configuration names."""
    group, tokens = query.shape[1] // KV_HEADS, query.shape[2]
    out = torch.empty_like(query)
    for head in range(KV_HEADS):
        own = slice(head * group, (head + 1) * group)
        for start in range(0, tokens, ROWS):
            rows, seen = slice(start, start + ROWS), slice(start + ROWS)
            mask = bias(module.config.masks, (head + KV_HEADS * module.layer_idx) % RATE, start)
            mask = mask[: tokens - start, :tokens].to(query)
            out[:, own, rows] = functional.scaled_dot_product_attention(
                query[:, own, rows], key[:, head : head + 1, seen].expand(-1, group, -1, -1),
                value[:, head : head + 1, seen].expand(-1, group, -1, -1), attn_mask=mask, scale=scaling,
            )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def losses_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the loss of each token (TOKENS,)."""
    ids = ids.to(model.device)
    return Scorer(model)(ids[:, :-1], ids[:, 1:])[0]


def under_masks(work: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return the model as converted, for masks that its configuration names."""
    model = load(work, "dense", dtype)
    model.set_attn_implementation("masks")
    return model


def check(work: Path, ids: Tensor) -> None:
    """Compare masks with the operator, or exit."""
    for system, pattern in OPERATORS.items():
        masked, same = under_masks(work, torch.float32), load(work, "dense", torch.float32)
        masked.config.masks = system
        longnet.use_dilated_attention(same, DilationPattern.parse(pattern), rotate_offsets=True)
        off = (losses_of(same, ids) - losses_of(masked, ids)).abs().mean().item()
        print(f"{system}: masks and operator differ by {off:.1e} nats a token, on average", flush=True)
        if off > GATE:
            sys.exit("so that no figure is written")
        bias.cache_clear()


@torch.inference_mode()
def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that smollm2.py fills")
    work = parser.parse_args().work
    file = work / "masks.jsonl"
    AttentionInterface.register("masks", attend)
    AttentionMaskInterface.register("masks", lambda *_, **__: None)
    held = list(json.loads((work / "held.json").read_text()).items())[:FILES]
    if not rows_of(file):
        check(work, torch.tensor(held[0][1][: TOKENS + 1])[None])
    model = under_masks(work, torch.bfloat16)
    for name, window in held:
        ids = torch.tensor(window[: TOKENS + 1])[None]
        for system in SYSTEMS:
            if any((row["system"], row["file"]) == (system, name) for row in rows_of(file)):
                continue
            model.config.masks = system
            loss = losses_of(model, ids)[TOKENS // 2 :].mean().item()
            flops = share_of_dense(system)
            add_row(file, {"system": system, "file": name, "tokens": TOKENS, "flops": flops, "loss": loss})
            bias.cache_clear()


if __name__ == "__main__":
    main()
