"""Models that have no attention to exchange.

| source | instance | right value |
|---|---|---|
| tried here | `use_dilated_attention` on Mamba, Mamba-2, RWKV | one line, and the model as it was |
"""

import pytest
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from longnet import DilationPattern, use_dilated_attention
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model import use_sparse_fixed_attention

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
