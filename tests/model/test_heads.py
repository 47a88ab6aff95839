"""Encoders and heads: LongNet without causality, as transformers users expect it."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import longnet

_SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0,
    "segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4), "is_causal": False, "max_position_embeddings": 64,
}  # fmt: skip
_POSITIONS = ("xpos", "rope", "learned", "sinusoidal", "none")
_NORMS = ({}, {"sub_layernorm": False}, {"sub_layernorm": False, "deepnorm": True})


@pytest.mark.parametrize("norm", _NORMS, ids=("subln", "preln", "deepnorm"))
@pytest.mark.parametrize("position_embedding", _POSITIONS)
def test_an_encoder_sees_both_ways_and_padding_changes_nothing(position_embedding, norm):
    config = longnet.LongNetConfig(**_SIZES, **norm, position_embedding=position_embedding, embedding_scale=2.0)
    model = longnet.LongNetForMaskedLM(config).eval()
    ids = torch.randint(1, 40, (1, 21))
    changed = ids.clone()
    changed[0, -1] = ids[0, -1] % 39 + 1
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids, torch.zeros(1, 5, dtype=torch.int64)], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        logits = model(ids).logits
        assert (model(changed).logits[0, 16] - logits[0, 16]).abs().max() > 1e-4
        assert model(ids).logits.shape == (1, 21, 40)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 6:27], logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_branch_over_everything_is_a_dense_encoder(implementation):
    sizes = {**_SIZES, "segment_lengths": (64,), "dilation_rates": (1,)}
    dilated = longnet.LongNetForMaskedLM(longnet.LongNetConfig(**sizes)).eval()
    dense = longnet.LongNetForMaskedLM(longnet.LongNetConfig(**sizes, attn_implementation=implementation)).eval()
    dense.load_state_dict(dilated.state_dict())
    ids = torch.randint(1, 40, (2, 21))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (dilated, dense))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("auto", "labels", "logits"),
    [
        (AutoModelForMaskedLM, {"labels": torch.full((2, 9), 3)}, (2, 9, 40)),
        (AutoModelForSequenceClassification, {"labels": torch.tensor([1, 0])}, (2, 3)),
        (AutoModelForTokenClassification, {"labels": torch.full((2, 9), 2)}, (2, 9, 3)),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
            (2, 9),
        ),
    ],
)
def test_heads_learn_and_come_back_from_files(auto, labels, logits, tmp_path):
    model = auto.from_config(longnet.LongNetConfig(**_SIZES, num_labels=3, drop_path=0.2, hidden_dropout=0.1)).train()
    ids = torch.randint(1, 40, (2, 9))
    model(ids, **labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    model.eval()
    with torch.no_grad():
        output = model(ids)
    got = output.logits if "labels" in labels else output.start_logits
    assert got.shape == logits
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        output = again(ids)
    assert torch.equal(got, output.logits if "labels" in labels else output.start_logits)
    assert not AutoModel.from_pretrained(tmp_path).config.is_causal


def test_deepnorm_is_its_formula():
    config = longnet.LongNetConfig(**_SIZES, sub_layernorm=False, deepnorm=True, position_embedding="none")
    block = longnet.LongNetModel(config).eval().layers[0]
    x = torch.randn(1, 8, 32)
    keywords = {"attention_mask": None, "rotations": None, "cache": None, "columns": {}}
    alpha = (2 * 2) ** 0.25
    middle = block.input_layernorm(alpha * x + block.self_attn(x, **keywords)[0])
    expected = block.post_attention_layernorm(alpha * middle + block.mlp(middle))
    torch.testing.assert_close(block(x, **keywords), expected)


def test_stochastic_depth_drops_rows_of_later_layers_in_training_alone():
    config = longnet.LongNetConfig(**_SIZES, drop_path=0.5)
    first, last = longnet.LongNetModel(config).train().layers
    x = torch.randn(200, 8, 32)
    keywords = {"attention_mask": None, "rotations": None, "cache": None, "columns": {}}
    with torch.no_grad():
        assert (first(x, **keywords) != x).flatten(1).any(1).all()
        untouched = (last(x, **keywords) == x).flatten(1).all(1).float().mean()
        assert 0.15 < untouched < 0.35  # both sublayers, a half each
        assert (last.eval()(x, **keywords) != x).flatten(1).any(1).all()


def test_what_an_encoder_cannot_is_refused():
    config = longnet.LongNetConfig(**_SIZES, position_embedding="learned")
    model = longnet.LongNetModel(config).eval()
    ids = torch.randint(1, 40, (1, 9))
    with pytest.raises(ValueError, match="cannot be cached"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="an encoder needs cu_seq_lens_q"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="learned positions end at 63, got position 64"):
        model(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs is_causal=True"):
        longnet.LongNetForCausalLM(config)
    with pytest.raises(ValueError, match="must see both ways"):
        longnet.LongNetForMaskedLM(longnet.LongNetConfig(**{**_SIZES, "is_causal": True}))
