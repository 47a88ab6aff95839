"""A Llama becomes its dilated self, generates, is saved and loaded: `python examples/llama.py`.

The Llama is a small one with random weights, since nothing is fetched; `from_pretrained` of any name works alike.
"""

import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import longnet


def main() -> float:
    """Convert, compare with dense attention, generate, save, load; return the largest difference after loading."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 300, (1, 200))
    with torch.inference_mode():
        dense = model(ids).logits
        longnet.use_dilated_attention(model, longnet.DilationPattern((256,), (1,)))
        whole = model(ids).logits
        print(f"one branch over all tokens: {(whole - dense).abs().max():.1e} from dense attention")
        longnet.use_dilated_attention(model, longnet.DilationPattern.for_length(4096, num_kv_heads=4))
        print("now", longnet.DilationPattern.for_length(4096, num_kv_heads=4), "generates", end=" ")
        print(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -5:].tolist())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dilated").eval()
        return float((again(ids).logits - model(ids).logits).abs().max())


if __name__ == "__main__":
    print(f"loaded again: {main():.1e} from what was saved")
