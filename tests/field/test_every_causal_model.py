"""Every causal class of transformers that builds from a tiny configuration.

| source | instance | right value |
|---|---|---|
| tried here | generate() of models that change keys after the cache (JetMoe, DeepSeek-V3) | the dense truth |
| tried here | … of models with a cache of their own (MiniMax) | the dense truth |
| tried here | models that compute with their mask (Doge, DeepSeek-V3.2) | one line |
| tried here | windows, soft caps, shared keys | one line, or the dense truth |
"""

import inspect

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from longnet import DilationPattern, use_dilated_attention
from longnet.attention.reference import multiplicity

PATTERN = DilationPattern((4, 8, 64), (1, 2, 2))
PROMPT, NEW = 11, 6
SETTINGS = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "moe_intermediate_size": 16, "num_local_experts": 2, "num_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "layer_types": ["full_attention"] * 2,
    "sliding_window": 64, "attention_dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2,
    "kv_channels": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_layers": 2, "n_heads": 4,
    "d_model": 32, "rotary_dim": 4, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "is_decoder": True,
    "is_encoder_decoder": False, "dropout": 0.0, "attn_pdrop": 0.0, "attention_probs_dropout_prob": 0.0,
    "n_shared_experts": 1,
}  # fmt: skip
CLASSES = {
    kind.__name__: (config, kind)
    for config, kinds in MODEL_FOR_CAUSAL_LM_MAPPING.items()
    for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
}
# These build, and are not refused: so that a change of transformers cannot leave nothing to test unseen.
CERTAIN = {
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "LongNetForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "PhiForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM",
}  # fmt: skip


def fields_of(config):
    return {name for kind in config.__mro__ for name in vars(kind).get("__annotations__", {})} | set(
        inspect.signature(config.__init__).parameters
    )


def built(name):
    """The class with tiny random weights, or None where these settings do not make one."""
    config, kind = CLASSES[name]
    settings = {key: value for key, value in SETTINGS.items() if key in fields_of(config)}
    if "kv_lora_rank" in settings:  # every head has keys of its own
        settings["num_key_value_heads"] = 4
    try:
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in kind(config(**settings)).parameters()) > 10**7:
                return None
        torch.manual_seed(0)
        model = kind(config(**settings)).eval()
        model(torch.arange(3, 9)[None])
        return model
    except Exception:  # noqa: BLE001  # transformers' own, of settings that do not fit each other
        return None


def sharpen(model):
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            parameter.mul_(3.0)


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.filterwarnings("ignore")  # of tiny configurations
@torch.no_grad()
def test_text_is_that_of_a_dense_softmax(name):
    if name == "DoryForCausalLM":
        pytest.skip("its loops share a layer's cache in this configuration, and eager attention fails, too")
    model = built(name)
    if model is None:
        assert name not in CERTAIN
        pytest.skip("builds from none of these settings")
    sharpen(model)
    ids = torch.randint(3, 100, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_attention_heads", None) is None:
        pytest.skip("has no attention")
    refusal = None
    try:
        use_dilated_attention(model, PATTERN)
        model(ids)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert name not in CERTAIN
        assert "\n" not in refusal
        assert "ttention" in refusal
        return
    if any(getattr(m, "is_causal", None) is False for m in model.modules() if hasattr(m, "layer_idx")):
        pytest.skip("is no causal model in this configuration")
    # RoBERTa and its kin begin behind the row for padding, of which generate() of transformers knows nothing.
    tables = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding) and "position" in name]
    first = max([0, *(table.padding_idx + 1 for table in tables if table.padding_idx is not None)])
    told = {"position_ids": torch.arange(PROMPT)[None] + first} if first else {}
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **told
    )
    positions = torch.arange(text.shape[1])[None]
    placed = (
        {"position_ids": positions + first} if "position_ids" in inspect.signature(model.forward).parameters else {}
    )
    heads = config.num_attention_heads
    layers = {m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")}
    kv_heads = heads // layers.pop() if len(layers) == 1 else heads
    dilated = model(text, use_cache=False).logits
    model.set_attn_implementation("eager")
    differences = []
    for count in {kv_heads, heads}:  # some repeat keys before they attend
        seen = multiplicity(positions, torch.zeros_like(positions), PATTERN, num_kv_heads=count, is_causal=True)
        bias = seen.double().log().float().repeat_interleave(heads // count, 1)
        dense = model(text, attention_mask=bias, use_cache=False, **placed).logits
        chosen = dense[0, PROMPT - 1 : -1].gather(1, text[0, PROMPT:, None])[:, 0]
        of_text = (dense[0, PROMPT - 1 : -1, 3:].amax(1) - chosen).max().item()
        differences.append(max((dense - dilated).abs().max().item(), of_text))
    assert min(differences) <= 1e-4 * max(1.0, dilated.abs().max().item()), differences
