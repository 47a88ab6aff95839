"""Checkpoints that no golden file holds, and gradients of whole models, against torchscale's models written out."""

import pytest
import torch

import longnet
from longnet.model import checkpoints
from longnet.model.versions import CACHE
from model import plain_torchscale as plain
from model.test_checkpoints import Golden

_BRANCHES = [(8, 1), (16, 2), (32, 4)]
_SLIDES = {
    "small": (4, _BRANCHES),
    "16heads": (16, [(8, 1), (16, 2), (32, 4), (64, 8), (128, 16)]),
    "shifted": (4, [(8, 1), (18, 2), (34, 4)]),
}


def double(weights):
    return {name: weight.double().requires_grad_(True) for name, weight in weights.items()}


def in_their_names(model):
    """Return the gradients of a model's parameters under torchscale's names."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return checkpoints.to_torchscale(model)


def assert_same_gradients(model, weights):
    got = in_their_names(model)
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            got[name], weight.grad, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize(("kind", "scale"), [("deepnorm", 1.0), ("preln_learned_scaled_tied", 48**0.5)])
def test_what_is_written_out_is_what_torchscale_computed_of_language_models(kind, scale):
    golden = Golden("decoder_lm_small")
    weights = double(golden.weights(f"{kind}/weights/"))
    alpha = 4**0.25 if kind == "deepnorm" else 1.0
    with torch.no_grad():
        logits, states = plain.decoder_lm(weights, golden["ragged/ids"], 4, _BRANCHES, alpha=alpha, scale=scale)
    torch.testing.assert_close(logits, golden[f"{kind}/ragged/logits"].double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(states, golden[f"{kind}/ragged/states"].double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "case"), [("small", "ragged_b2"), ("16heads", "ragged"), ("shifted", "shifted"), ("shifted", "shifted_b2")]
)
def test_what_is_written_out_is_what_torchscale_computed_of_slides(name, case):
    golden = Golden(f"longnetvit_{name}")
    weights = double(golden.weights())
    with torch.no_grad():
        states = plain.slide_encoder(weights, golden[f"{case}/x"].double(), golden[f"{case}/coords"], *_SLIDES[name])
        pooled, cls, _ = plain.embeddings_of(weights, states[-1])
        layers = torch.stack([plain.pools_of(weights, x)[0] for x in states])
    for got, key in ((pooled, "final_pool"), (cls, "final_cls"), (layers, "layers_pool")):
        torch.testing.assert_close(got, golden[f"{case}/{key}"].double(), rtol=0, atol=1e-6)


def post_layernorm(*, tied: bool, positions: bool):
    """A checkpoint as torchscale writes it with decoder_normalize_before=False: without a last layer_norm."""
    weights = Golden("decoder_lm_small").weights("deepnorm/weights/")
    del weights["layer_norm.weight"], weights["layer_norm.bias"]
    if tied:
        weights["output_projection.weight"] = weights["embed_tokens.weight"]
    if positions:
        weights["embed_positions.weight"] = 0.3 * torch.randn(66, 48)
    return weights


@pytest.mark.parametrize("deepnorm", [True, False], ids=["deepnorm", "plain"])
@pytest.mark.parametrize(("tied", "positions"), [(False, False), (True, True)], ids=["own head", "tied, learned"])
def test_post_layernorm_language_models(deepnorm, tied, positions, tmp_path):
    weights = post_layernorm(tied=tied, positions=positions)
    torch.save({"model": {f"decoder.{name}": weight for name, weight in weights.items()}}, tmp_path / "lm.pt")
    options = {"deepnorm": deepnorm, "scale_embedding": positions}
    model = longnet.load_torchscale_lm(tmp_path / "lm.pt", 4, (8, 16, 32), (1, 2, 4), **options)
    theirs = checkpoints.to_torchscale(model)
    assert theirs.keys() == weights.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())
    model.save_pretrained(tmp_path / "folder")
    model = longnet.LongNetForCausalLM.from_pretrained(tmp_path / "folder").double()
    ids = Golden("decoder_lm_small")["ragged/ids"]
    weights = double(weights)
    if tied:
        weights["output_projection.weight"] = weights["embed_tokens.weight"]
    logits, states = plain.decoder_lm(
        weights, ids, 4, _BRANCHES, alpha=4**0.25 if deepnorm else 1.0, normalize_before=False,
        scale=48**0.5 if positions else 1.0,
    )  # fmt: skip
    output = model(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.stack(output.hidden_states), states, rtol=0, atol=1e-11)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    expected.backward()
    assert_same_gradients(model, weights)


def test_post_layernorm_language_models_generate_from_the_cache(tmp_path):
    torch.save({"model": post_layernorm(tied=False, positions=False)}, tmp_path / "lm.pt")
    model = longnet.load_torchscale_lm(tmp_path / "lm.pt", 4, (8, 16, 32), (1, 2, 4), deepnorm=True)
    ids = Golden("decoder_lm_small")["ragged/ids"][:1]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    got = model.generate(ids, **{CACHE: longnet.DilatedCache(model.config)}, **options)
    assert torch.equal(got, model.generate(ids, use_cache=False, **options))


def test_a_sub_layernorm_model_without_its_last_one_is_damaged(tmp_path):
    weights = Golden("decoder_lm_small").weights("subln_nopos_tied/weights/")
    del weights["layer_norm.weight"]
    torch.save({"model": weights}, tmp_path / "lm.pt")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        longnet.load_torchscale_lm(tmp_path / "lm.pt", 4, (8, 16, 32), (1, 2, 4))


@pytest.mark.parametrize(
    ("name", "case", "lengths"),
    [
        ("small", "exact", [63]),
        ("small", "ragged_b2", [49, 30]),
        ("small", "short", [10]),
        ("16heads", "padded", [100, 61]),
        ("shifted", "shifted_b2", [57, 20]),
    ],
)
def test_gradients_of_a_whole_slide_encoder_are_the_written_out_models(name, case, lengths, tmp_path):
    golden = Golden(f"longnetvit_{name}")
    heads, branches = _SLIDES[name]
    torch.save({"model": golden.weights()}, tmp_path / "slide_encoder.pth")
    model = longnet.load_gigapath(tmp_path / "slide_encoder.pth", heads, *zip(*branches, strict=True)).double()
    assert model.config.tail == "torchscale"
    weights = double(golden.weights())
    slides = [
        (golden[f"{case}/x"][row, :tiles].double().requires_grad_(True), golden[f"{case}/coords"][row, :tiles])
        for row, tiles in enumerate(lengths)
    ]
    output = model(**longnet.collate_slides(slides), output_hidden_states=True)
    loss = expected = torch.zeros((), dtype=torch.float64)
    for row, (tiles, coords) in enumerate(slides):
        states = plain.slide_encoder(weights, tiles[None], coords[None], heads, branches)
        pooled, cls, in_context = plain.embeddings_of(weights, states[-1])
        n = len(tiles)
        pairs = [
            (output.pooled[row], pooled[0]),
            (output.cls[row], cls[0]),
            (output.last_hidden_state[row, :n], in_context[0]),
            (output.hidden_states[1][row, : n + 1], states[1, 0]),
        ]
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            weight = torch.randn_like(want)
            loss, expected = loss + (weight * got).sum(), expected + (weight * want).sum()
    ours = torch.autograd.grad(loss, [tiles for tiles, _ in slides], retain_graph=True)
    theirs = torch.autograd.grad(expected, [tiles for tiles, _ in slides], retain_graph=True)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    loss.backward(inputs=list(model.parameters()))
    expected.backward(inputs=list(weights.values()))
    assert_same_gradients(model, weights)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_a_fine_tuned_slide_encoder_with_its_classifier(layers, tmp_path):
    golden = Golden("longnetvit_small")
    weights = {f"slide_encoder.{name}": weight for name, weight in golden.weights().items()}
    weights["classifier.0.weight"] = torch.randn(3, 48 * len(layers))
    weights["classifier.0.bias"] = torch.randn(3)
    path = tmp_path / "fine-tuned.pt"
    torch.save(weights, path)  # as their fine-tuning saves it: the state dictionary alone
    settings = (4, (8, 16, 32), (1, 2, 4))
    model = longnet.load_gigapath(path, *settings, classifier_layers=layers)
    assert isinstance(model, longnet.LongNetForSlideClassification)
    x, coords = golden["ragged_b2/x"], golden["ragged_b2/coords"]
    with torch.no_grad():
        got = model(x, coords).logits
        states = plain.slide_encoder(double(golden.weights()), x.double(), coords, 4, _BRANCHES)
        read = torch.cat([plain.pools_of(double(golden.weights()), states[layer])[0] for layer in layers], -1)
    expected = read @ weights["classifier.0.weight"].double().T + weights["classifier.0.bias"].double()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    back = checkpoints.to_torchscale(model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    model.save_pretrained(tmp_path / "folder")
    again = longnet.load_gigapath(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(again(x, coords).logits, got)
    with pytest.raises(ValueError, match="classifier_layers must be entries 0 … 2"):
        longnet.load_gigapath(path, *settings, classifier_layers=(11,) * len(layers))
    with pytest.raises(ValueError, match=rf"reads {len(layers)} embeddings .* classifier_layers names 3"):
        longnet.load_gigapath(path, *settings, classifier_layers=(0, 1, 2))
