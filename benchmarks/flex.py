"""FlexAttention asked for the same attention: `python benchmarks/flex.py`, which appends to results/flex.jsonl.

The multiset of keys is a score_mod that adds the logarithm of how often a branch sees a key, so that both compute the
same function, which is checked before anything is timed. FlexAttention skips blocks of 128 × 128 pairs that are empty,
and a dilated branch leaves none empty within its segment.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longnet import DilationPattern, dilated_attention
from longnet.measurement import provenance

HEADS, HEAD_DIM, ROUNDS = 4, 64, 5
OUTPUT = Path(__file__).parent / "results" / "flex.jsonl"


def measure(tokens: int) -> dict[str, object]:
    """Return seconds of a forward pass of both, and of dense SDPA, in turn."""
    pattern = DilationPattern.geometric(512, tokens)
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD_DIM).unbind()

    def count(h, q_at, k_at):
        seen = 0
        for w, r in pattern.branches:
            meets = (q_at // w == k_at // w) & (q_at % w % r == h % r) & (k_at % w % r == h % r)
            seen = seen + meets.to(torch.float32)
        return seen

    mask = create_block_mask(
        lambda _, h, q_at, k_at: (count(h, q_at, k_at) > 0) & (q_at >= k_at), None, HEADS, tokens, tokens, device="cpu"
    )
    flex = torch.compile(flex_attention, dynamic=False)

    def through_flex() -> torch.Tensor:
        return flex(
            q, k, v, score_mod=lambda score, _, h, q_at, k_at: score + count(h, q_at, k_at).log(), block_mask=mask
        )

    cases = {
        "dilated_s": lambda: dilated_attention(q, k, v, pattern, is_causal=True),
        "flex_s": through_flex,
        "dense_s": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    off = (cases["flex_s"]() - cases["dilated_s"]()).abs().max().item()
    if off > 1e-5:
        sys.exit(f"FlexAttention and the op differ by {off:.1e}: nothing is timed")
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS):
        for name in sorted(cases, key=lambda name: (list(cases).index(name) + number) % len(cases)):
            start = time.perf_counter()
            cases[name]()
            spent[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    sparsity = mask.sparsity()
    return {"case": "flex", "tokens": tokens, "pattern": str(pattern), "difference": off,
            "empty_blocks_percent": round(float(sparsity), 2), **medians,
            "flex_over_dilated": medians["flex_s"] / medians["dilated_s"]}  # fmt: skip


def main() -> None:
    """Measure some lengths and append the rows."""
    torch.manual_seed(0)
    with torch.inference_mode(), OUTPUT.open("a") as file:
        for tokens in (2048, 4096):  # at 8,192 a round takes minutes on a CPU
            row = {**measure(tokens), **provenance(torch.device("cpu"))}
            print(row)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
