"""FLOPs in closed form against the counter of PyTorch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.model.cost import attention_flops, matrix_parameters, training_flops

# Pairs of a query and a visible key among 256 tokens, one by one.
CAUSAL = [(q, k) for q in range(256) for k in range(q + 1)]
PAIRS = {
    "sdpa": len(CAUSAL),
    "dilated": sum((q // 32 == k // 32) + (q // 128 == k // 128 and q % 4 == k % 4 == 1) for q, k in CAUSAL),
    "sparse_fixed": sum(q // 32 == k // 32 or k % 32 >= 28 for q, k in CAUSAL),
}


@pytest.mark.parametrize("attention", ["dilated", "sparse_fixed", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(attention, tied):
    config = LongNetConfig.preset(
        "tiny", segment_lengths=(32, 128), dilation_rates=(1, 4), sparse_block=32, sparse_summary=4,
        attn_implementation=attention, tie_word_embeddings=tied, vocab_size=500, num_key_value_heads=2,
    )  # fmt: skip
    model = LongNetForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 256, dtype=torch.int64))
    forward = counter.get_total_flops()
    closed = training_flops(model, config, tokens=256) / 3
    if attention == "sdpa":  # whose operator on the CPU PyTorch does not count
        forward += attention_flops(config, tokens=256)
    assert closed == pytest.approx(forward, rel=0.03)  # biases and LayerNorms are parameters, and no matrix products
    assert attention_flops(config, tokens=256) == 2 * 4 * 4 * 16 * PAIRS[attention]  # layers, heads, FLOPs, head_dim
    everything = sum(weight.numel() for weight in model.parameters())
    assert everything - matrix_parameters(model, config) == (0 if tied else 500 * 64)
