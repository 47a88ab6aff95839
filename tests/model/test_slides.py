"""The slide encoder's border: coordinates, padding, dtypes, fine-tuning."""

import time

import pytest
import torch

import longnet
from longnet.model.slides import check_coordinates

_SIZES = {
    "feature_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4), "classifier_layers": (1,), "num_labels": 3,
}  # fmt: skip


def a_slide(tiles: int, features: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    side = int(tiles**0.5) + 1
    places = torch.stack([torch.arange(tiles) // side, torch.arange(tiles) % side], 1)
    return torch.randn(tiles, features), places * 256


@pytest.fixture
def model():
    return longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES)).eval()


def test_one_slide_is_a_batch_of_one_in_any_dtype(model):
    tiles, coords = a_slide(30)
    with torch.no_grad():
        expected = model(tiles[None], coords[None])
        for dtype in (torch.float64, torch.float32):
            assert torch.equal(model(tiles.to(dtype), coords.to(dtype)).pooled, expected.pooled)
        torch.testing.assert_close(model(tiles.half(), coords).pooled, expected.pooled, rtol=0, atol=5e-3)
        brief = model.to(torch.bfloat16)(tiles, coords).pooled
    assert brief.dtype == torch.bfloat16
    torch.testing.assert_close(brief.float(), expected.pooled, rtol=0, atol=0.1)
    assert expected.last_hidden_state.shape == (1, 30, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.half(), "coords must be int64, float32 or float64, got torch.float16"),
        (lambda c: c + 256_000, "coords must lie in"),
        (lambda c: c - 300, "coords must lie in"),
        (lambda c: c.float().where(c > 0, torch.nan), "coords must be finite"),
        (lambda c: c // 256, "positions in a grid, not pixels: multiply them by 256"),
        (
            lambda c: c // 16,
            "16 apart where tile_size=256 pixels of level 0 are expected, as in pixels of a level down",
        ),
        (lambda c: c * 0, "coords seem to be all the same"),
    ],
)
def test_coordinates_of_another_kind_are_refused_with_the_unit_that_seems_meant(model, change, message):
    _, coords = a_slide(400)
    with pytest.raises(ValueError, match=message):
        check_coordinates(model.config, change(coords)[None])


def test_tiles_that_overlap_by_half_are_fine(model):
    _, coords = a_slide(400)
    check_coordinates(model.config, coords[None] // 2)


def test_a_batch_of_coordinates_of_several_dtypes_keeps_them():
    slides = [a_slide(20), a_slide(33)]
    mixed = longnet.collate_slides([slides[0], (slides[1][0], slides[1][1].double() + 0.5)])
    assert mixed["coords"].dtype == torch.float64
    assert torch.equal(mixed["coords"][1], slides[1][1] + 0.5)
    with pytest.raises(ValueError, match=r"got torch\.float16"):
        longnet.collate_slides([slides[0], (slides[1][0], slides[1][1].half())])


def test_order_is_warned_of(model):
    tiles, coords = a_slide(40)
    other = coords[:, 1].argsort(stable=True)
    model(tiles[other], coords[other])  # column by column is an order, too
    mixed = torch.randperm(40)
    with pytest.warns(UserWarning, match="not in row-major order"):
        model(tiles[mixed], coords[mixed])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, c: m(x[:, :5], c), "takes tile embeddings 12 wide, got 5: they are of another tile encoder"),
        (lambda m, x, c: m(x, c[:-1]), "coords must be"),
        (lambda m, x, c: m(x[:0], c[:0]), "every slide needs a tile"),
        (lambda m, x, c: m(x[None], c[None], torch.zeros(1, 30, dtype=torch.bool)), "every slide needs a tile"),
        (lambda m, x, c: m(x[None], c[None], torch.ones(1, 29, dtype=torch.bool)), "padding_mask must be"),
        (lambda m, x, c: m.layer_embeddings(x, c, pool="max"), 'pool must be "mean" or "cls"'),
        (lambda m, x, c: longnet.collate_slides([]), "needs a slide"),
        (lambda m, x, c: longnet.collate_slides([(x, c), (x[:, :3], c)]), "slide 1 must be"),
    ],
)
def test_what_does_not_fit_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, *a_slide(30))


def test_the_real_shape_is_constructed_at_once():
    began = time.process_time()
    with torch.device("meta"):
        model = longnet.LongNetSlideModel(longnet.LongNetSlideConfig())
    assert time.process_time() - began < 2
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_330_880
    assert len(model.state_dict()) == 247


@pytest.mark.parametrize("tail", ["torchscale", "exact"])
def test_fine_tuning_learns_on_batches_with_padding(tail):
    torch.manual_seed(1)
    model = longnet.LongNetForSlideClassification(
        longnet.LongNetSlideConfig(**_SIZES, tail=tail, hidden_dropout=0.0, drop_path=0.0)
    ).train()
    slides = [a_slide(tiles) for tiles in (20, 33, 47, 26, 39, 50)]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for (tiles, _), label in zip(slides, labels.tolist(), strict=True):
        tiles[::3, label] += 4.0  # a third of the tiles say what the slide is
    batch = longnet.collate_slides(slides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_checkpointed_layers_change_no_gradient():
    torch.manual_seed(1)
    config = longnet.LongNetSlideConfig(**_SIZES, hidden_dropout=0.0, drop_path=0.0)
    model = longnet.LongNetForSlideClassification(config).train()
    batch = longnet.collate_slides([a_slide(20), a_slide(33)])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            longnet.model.versions.checkpoint_layers(model)
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.slides.layers[0].parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
