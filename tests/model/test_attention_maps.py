"""Rows of the union softmax against the dense oracle, and the rollout against matrices."""

import pytest
import torch

import longnet
from longnet.attention.reference import multiplicity
from longnet.model.attention_maps import attention_map, attention_received, rollout, watch_received
from longnet.model.patterns import pattern_of
from model.test_slides import _SIZES, a_slide

_LM = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "segment_lengths": (8, 16, 32),
    "dilation_rates": (1, 2, 4), "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def dense_weights(attention, x, rotations, *, is_causal, tail=None):
    """Weights (B, H, T, T) of one layer from its input, through the oracle's multiplicities."""
    q, k, _ = attention.project(x, rotations)
    pattern = pattern_of(attention.config, attention.layer_idx)
    positions = torch.arange(x.shape[1])[None]
    count = multiplicity(positions, torch.zeros_like(positions), pattern, num_kv_heads=k.shape[1], is_causal=is_causal)
    group = q.shape[1] // k.shape[1]
    count, k = count.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    scores = q @ k.mT * attention.scaling + count.log()
    if tail is not None:
        scores = torch.cat([scores, tail.sinks[..., None]], -1)
    return scores.softmax(-1)[..., : x.shape[1]]


@pytest.mark.parametrize(
    "options", [{}, {"queries": "all"}, {"rotate_offsets": True}, {"is_causal": False}, {"global_tokens": 3}]
)
def test_rows_are_the_oracles(options):
    config = longnet.LongNetConfig(**_LM, **options)
    model = longnet.LongNetModel(config).eval()
    ids = torch.randint(0, 40, (2, 29))
    kept = {}
    hook = model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(x=args[0], **kwargs), with_kwargs=True
    )
    with torch.no_grad():
        rows = attention_map(model, ids, layer=-1, query=[0, 13, -1])
        hook.remove()
        expected = dense_weights(
            model.layers[1].self_attn, kept["x"], kept["rotations"], is_causal=options.get("is_causal", True)
        )
    torch.testing.assert_close(rows, expected[:, :, [0, 13, 28]], rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", ["torchscale", "exact"])
def test_maps_of_slides_leave_out_padding(tail):
    model = longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES, tail=tail)).eval()
    slides = [a_slide(20), a_slide(33)]
    rows = attention_map(model, **longnet.collate_slides(slides), layer=1, query=[0, 20])
    short = attention_map(model, *slides[0], layer=1, query=[0, 20])
    torch.testing.assert_close(rows[:1, ..., :21], short, rtol=0, atol=1e-6)
    assert not rows[0, ..., 21:].any()
    total = rows.sum(-1)
    assert (total <= 1 + 1e-6).all()
    if tail == "exact":
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert (total < 0.999).any()  # the rest went to zero keys


def test_rollout_is_a_product_of_matrices():
    model = longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES, tail="exact")).eval()
    tiles, coords = a_slide(40)
    r = torch.zeros(1, 41)
    r[0, 0] = 1
    for layer in (1, 0):
        rows = attention_map(model, tiles, coords, layer=layer, query=range(41)).mean(1)
        r = 0.5 * r + 0.5 * (r[:, None] @ rows)[:, 0]
    got = rollout(model, tiles, coords)
    torch.testing.assert_close(got, r, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(1))


@pytest.mark.parametrize("tail", ["torchscale", "exact"])
def test_what_is_received_is_a_mean_of_rows_and_costs_no_second_pass(tail):
    model = longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES, tail=tail)).eval()
    batch = longnet.collate_slides([a_slide(20), a_slide(33)])
    rows = attention_map(model, **batch, layer=1, query=range(34))
    expected = rows.mean(1).sum(1) / torch.tensor([[21], [34]])
    with torch.no_grad(), watch_received(model, layer=-1) as received:
        for _ in model.each_layer(**batch):
            pass
        got = received()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.equal(attention_received(model, **batch, layer=1), got)


def test_what_there_is_no_map_of_is_refused():
    model = longnet.LongNetModel(longnet.LongNetConfig(**_LM)).eval()
    ids = torch.randint(0, 40, (1, 9))
    with pytest.raises(ValueError, match="layer must be below the model's 2, got 5"):
        attention_map(model, ids, layer=5, query=0)
    with pytest.raises(ValueError, match="query must name tokens below 9"):
        attention_map(model, ids, layer=0, query=9)
    with pytest.raises(ValueError, match="a LongNet with dilated attention is expected, got Linear"):
        attention_map(torch.nn.Linear(1, 1), layer=0, query=0)
    shifted = longnet.LongNetSlideConfig(**{**_SIZES, "segment_lengths": (8, 18, 34)})
    with pytest.raises(ValueError, match='load the model with tail="exact"'):
        attention_map(longnet.LongNetSlideModel(shifted), *a_slide(60), layer=0, query=0)
