"""Models whose attention cannot be exchanged, or not in all that they do.

| source | instance | right value |
|---|---|---|
| tried here | `use_dilated_attention` on Mamba, Mamba-2, RWKV | one line, and the model as it was |
| tried here | Swin, whose heads are a list: TypeError of a list | one line, and the model as it was |
| tried here | BEiT's relative positions, Doge, Siglip2's pooling compute with the mask: AttributeError | one line |
| tried here | LayoutLM and Pixtral make a dense mask: "pass a 2-D mask", which nobody passed | a line that says so |
| tried here | generate() of Gemma 4, whose last layers take earlier ones' keys | the tokens that no cache gives |
"""

import pytest
import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from longnet import DilationPattern, use_dilated_attention
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import use_sparse_fixed_attention
from model.families import tokens_of

BUILDS = {
    "Mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4)),
    "Mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4, num_heads=4, head_dim=16)
    ),
    "Rwkv": lambda: RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)),
}


@pytest.mark.parametrize("name", list(BUILDS))
@pytest.mark.parametrize(
    ("use", "pattern"),
    [
        (use_dilated_attention, DilationPattern((8, 32), (1, 2))),
        (use_sparse_fixed_attention, SparseFixedPattern(8, 2)),
    ],
    ids=["dilated", "sparse_fixed"],
)
def test_it_is_refused_and_the_model_left_as_it_was(name, use, pattern):
    model = BUILDS[name]()
    before = (model.config.to_dict(), model.config._attn_implementation)
    with pytest.raises(TypeError, match=rf"^{name}ForCausalLM has no attention heads .* could be exchanged$"):
        use(model, pattern)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATTERN = DilationPattern((8, 32), (1, 2))
IDS = tokens_of(2, 12)
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
WHOLE = {"image_size": 32, "patch_size": 8}


def made(name, config, **settings):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def test_stages_with_heads_of_their_own_are_refused():
    model = made(
        "SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
        window_size=4,
    )  # fmt: skip
    before = (model.config.to_dict(), model.config._attn_implementation)
    with pytest.raises(TypeError, match=r"^SwinModel has stages with numbers of heads of their own, \[2, 2\]: [^\n]*$"):
        use_dilated_attention(model, PATTERN)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


OWN_MASKS = {
    "BeitModel": ("BeitConfig", {**WHOLE, "use_relative_position_bias": True}, {"pixel_values": PIXELS}),
    "DogeForCausalLM": ("DogeConfig", {"vocab_size": 101, "head_dim": 8}, {"input_ids": IDS}),
    "Siglip2VisionModel": (
        "Siglip2VisionConfig",
        {"num_patches": 16, "patch_size": 8},
        {
            "pixel_values": PIXELS.reshape(1, 16, 192),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        },
    ),
    "LayoutLMModel": (
        "LayoutLMConfig",
        {"vocab_size": 101, "attention_probs_dropout_prob": 0.0},
        {"input_ids": IDS, "bbox": torch.zeros(2, 12, 4, dtype=torch.long)},
    ),
    "PixtralVisionModel": (
        "PixtralVisionConfig",
        {**WHOLE, "head_dim": 8},
        {"pixel_values": PIXELS, "image_sizes": torch.tensor([[32, 32]])},
    ),
}


@pytest.mark.parametrize("name", list(OWN_MASKS))
def test_a_mask_of_the_models_own_is_said_to_be_its_own(name):
    config, settings, inputs = OWN_MASKS[name]
    model = made(name, config, **SIZES, **settings)
    assert model(**inputs)[0].isfinite().all()
    use_dilated_attention(model, PATTERN)
    said = r"^[^\n]*(made by the model itself, cannot be honoured|this model computes with its attention mask)[^\n]*$"
    with pytest.raises(ValueError, match=said):
        model(**inputs)


def test_layers_that_take_the_keys_of_others():
    model = made(
        "Gemma4ForCausalLM", "Gemma4TextConfig", **{**SIZES, "num_hidden_layers": 4}, vocab_size=101, head_dim=8,
        num_key_value_heads=2, global_head_dim=8, vocab_size_per_layer_input=101, hidden_size_per_layer_input=8,
        sliding_window=512, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
    )  # fmt: skip
    use_dilated_attention(model, PATTERN)
    ids = tokens_of(1, 21)
    found = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
