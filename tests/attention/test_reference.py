"""The oracle against the definition, written out in loops, and against torchscale's own numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from longnet import DilationPattern, dilated_attention
from longnet.attention.dilated import attend_within
from tolerances import FLOAT64, TORCHSCALE


def in_loops(q, k, v, pattern, is_causal):
    """DESIGN's words, one (query, key, branch) at a time."""
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(tokens):
                weights, values = [], []
                for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
                    s = g % r if pattern.head_offsets == "mod" else g // math.ceil(kv_heads / r)
                    for j in range(tokens):
                        kept = (i % w) % r == s and (j % w) % r == s
                        if kept and i // w == j // w and (j <= i or not is_causal):
                            weights.append(math.exp(float(q[b, h, i] @ k[b, g, j]) / math.sqrt(dim)))
                            values.append(v[b, g, j])
                for weight, value in zip(weights, values, strict=True):
                    out[b, h, i] += weight / sum(weights) * value
    return out


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("text", ["4:1,8:2", "5:1,9:2,11:3", "4:1,6:4;block", "3:1,2:5"])
def test_the_oracle_is_the_definition(text, is_causal):
    pattern = DilationPattern.parse(text)
    q = torch.randn(2, 6, 13, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 13, 4, dtype=torch.float64)
    got = dilated_attention(q, k, v, pattern, is_causal=is_causal, backend="reference")
    torch.testing.assert_close(got, in_loops(q, k, v, pattern, is_causal), atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("number", range(5))
def test_torchscale_agrees_where_it_is_right(number, backend):
    golden = np.load(Path(__file__).parent / "torchscale_attention.npz")
    meta = json.loads(golden["meta"].tobytes())[number]
    q, k, v, out = (torch.from_numpy(golden[f"{number}/{name}"]) for name in ("q", "k", "v", "out"))
    pattern = DilationPattern(
        tuple(meta["segment_lengths"]), tuple(meta["dilation_rates"]), head_offsets=meta["head_offsets"]
    )
    got = dilated_attention(q, k, v, pattern, is_causal=meta["is_causal"], backend=backend)
    torch.testing.assert_close(got, out, atol=TORCHSCALE, rtol=0)


def test_the_oracle_does_not_read_padding():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    mask = torch.tensor([[False, True, True, True, True, True, False, False, False]])
    clean = dilated_attention(q, k, v, DilationPattern((4,), (1,)), padding_mask=mask, backend="reference")
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = torch.nan, torch.inf
    dirty = dilated_attention(q, k, v, DilationPattern((4,), (1,)), padding_mask=mask, backend="reference")
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_without_any_run_nothing_is_seen(backend):
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    out, lse = attend_within(q, k, v, DilationPattern((4,), (1,)), bounds=nothing, is_causal=False, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
