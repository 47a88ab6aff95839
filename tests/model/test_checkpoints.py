"""torchscale's models through our loaders, against what their own code computed (tests/model/torchscale/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import longnet
from longnet.model import checkpoints, slides
from longnet.model.versions import CACHE

GOLDEN = Path(__file__).parent / "torchscale"
_ENCODERS = {
    "small": ("exact", "exact_b2", "ragged", "ragged_b2", "short", "one"),
    "16heads": ("exact", "ragged", "ragged_long"),
    "shifted": ("below", "shifted", "shifted_b2"),
}
_KINDS = {
    "subln_xpos": {},
    "subln_nopos_tied": {},
    "preln_learned_scaled_tied": {"scale_embedding": True, "deepnorm": False},
    "deepnorm": {"deepnorm": True},
}


class Golden:
    """One file of tensors, and the settings that no tensor tells."""

    def __init__(self, name: str) -> None:
        self.file = np.load(GOLDEN / f"{name}.npz")
        self.meta = json.loads(bytes(self.file["meta"]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.file[name])

    def weights(self, prefix: str = "weights/") -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.file.files if name.startswith(prefix)}


def load_slides(name: str, path: Path, **options):
    golden = Golden(f"longnetvit_{name}")
    torch.save({"model": golden.weights()}, path / "slide_encoder.pth")
    config = golden.meta["config"]
    model = longnet.load_gigapath(
        path / "slide_encoder.pth", config["num_heads"], config["segment_lengths"], config["dilation_rates"], **options
    )
    return golden, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _ENCODERS)
def test_gigapath_is_what_its_own_code_computes(name, dtype, tmp_path):
    golden, model = load_slides(name, tmp_path)
    model = model.to(dtype)
    floor = (
        5e-6 if dtype == torch.float32 else 1e-6
    )  # the file's own float32 run errs by 3e-6, its position table by 5e-7
    for case in _ENCODERS[name]:
        x, coords = golden[f"{case}/x"].to(dtype), golden[f"{case}/coords"]
        with torch.no_grad():
            output = model(x, coords, output_hidden_states=True)
            layers = {pool: model.layer_embeddings(x, coords, pool=pool) for pool in ("mean", "cls")}
        pairs = [
            (output.pooled, "final_pool"),
            (output.cls, "final_cls"),
            (layers["mean"], "layers_pool"),
            (layers["cls"], "layers_cls"),
        ]
        if f"{case}/states" in golden.file:
            pairs += [(torch.stack(output.hidden_states), "states"), (output.last_hidden_state, "encoder_out")]
        for got, key in pairs:
            expected = golden[f"{case}/{key}"]
            expected = expected[:, 1:] if key == "encoder_out" else expected
            allowed = 2 * floor if key == "states" else floor
            torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=allowed)


def test_only_where_no_segment_is_cut_is_the_exact_tail_theirs(tmp_path):
    golden, model = load_slides("small", tmp_path, tail="exact")
    with torch.no_grad():
        whole = model(golden["exact/x"], golden["exact/coords"]).pooled
        cut = model(golden["ragged/x"], golden["ragged/coords"]).pooled
    torch.testing.assert_close(whole.double(), golden["exact/final_pool"], rtol=0, atol=5e-6)
    assert (cut - golden["ragged/final_pool"]).abs().max() > 1e-3


@pytest.mark.parametrize("tail", ["torchscale", "exact"])
@pytest.mark.parametrize("name", ["16heads", "shifted"])
def test_a_batch_is_each_slide_alone(name, tail, tmp_path):
    golden, model = load_slides(name, tmp_path, tail=tail)
    case = "padded" if name == "16heads" else "shifted_b2"
    lengths = [100, 61] if name == "16heads" else [57, 20]
    alone = [(golden[f"{case}/x"][row, :n], golden[f"{case}/coords"][row, :n]) for row, n in enumerate(lengths)]
    batch = longnet.collate_slides(alone)
    batch["tile_embeds"][~batch["padding_mask"]] = torch.nan
    with torch.no_grad():
        together = model(**batch)
        layers = model.layer_embeddings(**batch)
        for row, (x, coords) in enumerate(alone):
            one = model(x, coords)
            for name_of_output in ("pooled", "cls"):
                torch.testing.assert_close(together[name_of_output][row], one[name_of_output][0], rtol=0, atol=3e-6)
            n = len(x)
            torch.testing.assert_close(together.last_hidden_state[row, :n], one.last_hidden_state[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(layers[:, row], model.layer_embeddings(x, coords)[:, 0], rtol=0, atol=3e-6)
    if name == "16heads" and tail == "torchscale":  # and what their code gives each row alone
        torch.testing.assert_close(together.pooled.double(), golden["padded/alone/final_pool"], rtol=0, atol=5e-6)
        torch.testing.assert_close(together.cls.double(), golden["padded/alone/final_cls"], rtol=0, atol=5e-6)


def test_positions_are_their_table(tmp_path):
    golden = Golden("longnetvit_small")
    coords, index, rows = golden["positions/coords"], golden["positions/index"], golden["positions/embedding"]
    config = slides.LongNetSlideConfig(hidden_size=48, num_attention_heads=4)
    inside = coords[:, 1] < 256_000  # beyond, theirs wraps into the next row
    i, j = slides.check_coordinates(config, coords[inside][None])
    assert torch.equal((i * 1000 + j + 1)[0], index[inside])
    got = longnet.positions.grid(i[0], j[0], 48)
    torch.testing.assert_close(got, rows[inside], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="coords must lie in"):
        slides.check_coordinates(config, coords[~inside][None])


def test_longvit_is_what_its_own_code_computes(tmp_path):
    golden = Golden("longvit_small")
    config = golden.meta["config"]
    settings = config["num_heads"], config["segment_lengths"], config["dilation_rates"]
    torch.save({"teacher": {f"backbone.{k}": v for k, v in golden.weights().items()}}, tmp_path / "longvit.pt")
    model = longnet.load_longvit(tmp_path / "longvit.pt", *settings)
    for case in ("exact", "exact_b2", "interpolated_ragged"):
        with torch.no_grad():
            output = model(golden[f"{case}/image"], output_hidden_states=True)
        torch.testing.assert_close(torch.stack(output.hidden_states), golden[f"{case}/states"], rtol=0, atol=2e-5)
        torch.testing.assert_close(output.last_hidden_state.double(), golden[f"{case}/out"], rtol=0, atol=2e-5)
    weights = {**golden.weights(), **golden.weights("classifier/")}
    torch.save({"module": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "classifier.pt")
    classifier = longnet.load_longvit(tmp_path / "classifier.pt", *settings)
    with torch.no_grad():
        logits = classifier(golden["exact_b2/image"]).logits
    torch.testing.assert_close(logits.double(), golden["exact_b2/logits"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="images of 64 pixels"):
        longnet.load_longvit(tmp_path / "longvit.pt", 4)


def load_lm(kind: str, path: Path):
    golden = Golden("decoder_lm_small")
    weights = {f"decoder.{name}": weight for name, weight in golden.weights(f"{kind}/weights/").items()}
    torch.save({"model": weights}, path / "lm.pt")
    return golden, longnet.load_torchscale_lm(path / "lm.pt", 4, (8, 16, 32), (1, 2, 4), **_KINDS[kind])


@pytest.mark.parametrize("kind", _KINDS)
def test_language_models_are_what_their_own_code_computes(kind, tmp_path):
    golden, model = load_lm(kind, tmp_path)
    for case in ("exact", "ragged"):
        with torch.no_grad():
            output = model(golden[f"{case}/ids"], output_hidden_states=True)
        torch.testing.assert_close(output.logits.double(), golden[f"{kind}/{case}/logits"].double(), rtol=0, atol=2e-5)
        states = torch.stack(output.hidden_states[:-1])  # transformers' last one is behind the last LayerNorm
        torch.testing.assert_close(states, golden[f"{kind}/{case}/states"][:-1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_language_models_generate_from_the_cache_of_constant_size(kind, tmp_path):
    golden, model = load_lm(kind, tmp_path)
    ids = golden["ragged/ids"][:1]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    mask = torch.ones_like(ids)
    cache = longnet.DilatedCache(model.config)
    got = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    rows = model.config.pattern.state_rows(tokens=64)
    assert cache.nbytes <= 2 * 2 * rows * 48 * 4 + 4096  # two layers, keys and values, float32


def test_what_does_not_fit_is_named(tmp_path):
    golden, _ = load_slides("small", tmp_path)
    weights = golden.weights()
    del weights["encoder.layers.1.ffn.fc2.bias"]
    weights["decoder.embed"] = torch.zeros(1)
    weights["norm.weight"] = torch.zeros(3)
    torch.save({"model": weights}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"broken\.pth does not fit") as raised:
        longnet.load_gigapath(tmp_path / "broken.pth", 4)
    for part in (r"missing layers.1.mlp.fc2.bias", "left over decoder.embed", "norm.weight is (3,) where (48,)"):
        assert part in str(raised.value)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"model": Path("anything")}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match=r"holds no patch_embed\.proj\.weight"):
        longnet.load_gigapath(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"pickle\.pth holds more than tensors \(pathlib\.\w+\), which is not read"):
        longnet.load_gigapath(tmp_path / "pickle.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        longnet.load_gigapath(tmp_path / "nothing.pth")


LOADERS = {
    "gigapath": (
        lambda: Golden("longnetvit_small").weights(),
        lambda path: longnet.load_gigapath(path, 4, (8, 16, 32), (1, 2, 4)),
        ("patch_embed.proj.weight", "encoder.layers.0.ffn.fc1.weight"),
    ),
    "longvit": (
        lambda: {**Golden("longvit_small").weights(), **Golden("longvit_small").weights("classifier/")},
        lambda path: longnet.load_longvit(path, 4, (8, 16, 32), (1, 2, 4)),
        ("backbone.patch_embed.proj.weight", "backbone.pos_embed", "backbone.encoder.layers.0.ffn.fc1.weight",
         "head.weight"),
    ),
    "lm": (
        lambda: Golden("decoder_lm_small").weights("preln_learned_scaled_tied/weights/"),
        lambda path: longnet.load_torchscale_lm(path, 4, (8, 16, 32), (1, 2, 4), deepnorm=False),
        ("embed_tokens.weight", "embed_positions.weight", "layers.0.ffn.fc1.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x.new_ones(()), torch.flatten, lambda x: x[None], lambda x: x[:0]],
    ids=["no axis", "one axis", "an axis more", "no row"],
)
def test_a_tensor_of_other_axes_is_named_with_what_is_expected(loader, spoil, tmp_path):
    make, load, sized = LOADERS[loader]
    weights = make()
    for name, weight in weights.items():
        if spoil(weight).shape == weight.shape:
            continue
        torch.save(weights | {name: spoil(weight)}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match="is expected") as raised:
            load(tmp_path / "file.pth")
        said = str(raised.value)
        assert str(tmp_path / "file.pth") in said
        assert name in said
        assert str(tuple(spoil(weight).shape)) in said
        assert ("does not fit" in said) is not any(known.endswith(name) for known in sized)


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_no_model_computes_with_are_named(loader, tmp_path):
    make, load, _ = LOADERS[loader]
    weights = make()
    name = next(name for name in weights if name.endswith("layers.1.ffn.fc2.weight"))
    for change, says in (
        (lambda x: x.index_fill(0, torch.tensor(3), torch.nan), r"NaN or infinite, 1 in all \("),
        (lambda x: x / 0, r"NaN or infinite, 1 in all \("),
        (lambda x: x.long(), r"not dense floating-point numbers, 1 in all \(.*: int64\)"),
        (lambda x: x.to(torch.float8_e4m3fn), r"1 in all \(.*: float8_e4m3fn\)"),
        (lambda x: x.to_sparse(), r"1 in all \(.*: float32, sparse\)"),
        (lambda x: x.to(torch.complex64), r"1 in all \(.*: complex64\)"),
    ):
        torch.save(weights | {name: change(weights[name])}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=says) as raised:
            load(tmp_path / "file.pth")
        assert str(tmp_path / "file.pth") in str(raised.value)
        assert "layers.1.ffn.fc2.weight" in str(raised.value)
    torch.save(weights | {name: weights[name].half()}, tmp_path / "mixed.pth")
    dtypes = {parameter.dtype for parameter in load(tmp_path / "mixed.pth").parameters()}
    assert dtypes == {torch.float32}  # nothing is lost, and a layer finds its input in its dtype


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_file_is_named(loader, tmp_path):
    make, load, _ = LOADERS[loader]
    weights = make()
    save_file(weights, tmp_path / "cut.safetensors")
    torch.save(weights, tmp_path / "cut.pth")
    for path in (tmp_path / "cut.safetensors", tmp_path / "cut.pth"):
        whole = path.read_bytes()
        for part in (b"", whole[:7], whole[: len(whole) // 2], b"hello" * 99):
            path.write_bytes(part)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
                load(path)
    with pytest.raises(ValueError, match="is a folder" if loader == "lm" else "cannot be loaded"):
        load(tmp_path)


def test_heads_and_layers_that_cannot_be_are_told(tmp_path):
    weights = Golden("longnetvit_small").weights()
    torch.save(weights, tmp_path / "file.pth")
    for heads in (0, 5):
        with pytest.raises(ValueError, match=rf"file\.pth is 48 wide, which num_heads={heads} does not divide"):
            longnet.load_gigapath(tmp_path / "file.pth", heads)
    torch.save(
        {name.replace("layers.1.", "layers.7."): weight for name, weight in weights.items()}, tmp_path / "gap.pth"
    )
    with pytest.raises(ValueError, match=r"gap\.pth holds 2 layers, up to layer 7, and none is layer 1"):
        longnet.load_gigapath(tmp_path / "gap.pth", 4)


def test_a_folder_is_loaded_whole_or_not_at_all(tmp_path):
    _, model = load_slides("small", tmp_path)
    model.save_pretrained(tmp_path / "folder")
    held = load_file(tmp_path / "folder" / "model.safetensors")
    name = "layers.1.mlp.fc2.weight"
    for change, says in (
        ({name: None}, r"1 missing \(layers\.1\.mlp\.fc2\.weight\)"),
        ({name: held[name][:-1].clone()}, r"1 of another shape \(layers\.1\.mlp\.fc2\.weight \[47, 192\]"),
        ({name: held[name] / 0}, r"NaN or infinite, 1 in all \(layers\.1\.mlp\.fc2\.weight\)"),
        ({"more": torch.zeros(1)}, r"1 of no use to this model \(more\)"),
    ):
        changed = {key: weight for key, weight in (held | change).items() if weight is not None}
        save_file(changed, tmp_path / "folder" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=says):
            longnet.load_gigapath(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"the weights in .*folder are damaged"):
        longnet.load_gigapath(tmp_path / "folder")
    longnet.LongNetConfig.preset("tiny").save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="holds a model of type 'longnet', where 'longnet_slides' is expected"):
        longnet.load_gigapath(tmp_path / "lm")
    with pytest.raises(ValueError, match="where 'longnet_images' is expected"):
        longnet.load_longvit(tmp_path / "lm")


@pytest.mark.parametrize("kind", ["deepnorm", "deepnorm, behind the sublayers", "preln_learned_scaled_tied"])
def test_deepnorm_is_asked_for_where_no_tensor_tells(kind, tmp_path):
    settings = 4, (8, 16, 32), (1, 2, 4)
    weights = Golden("decoder_lm_small").weights(f"{kind.split(',')[0]}/weights/")
    if "behind" in kind:
        del weights["layer_norm.weight"], weights["layer_norm.bias"]
    torch.save(weights, tmp_path / "lm.pt")
    with pytest.raises(ValueError, match=r"lm\.pt has no sub-LayerNorms.*deepnorm=True .*= 1\.414.*deepnorm=False"):
        longnet.load_torchscale_lm(tmp_path / "lm.pt", *settings)
    for answer in (True, False):
        config = longnet.load_torchscale_lm(tmp_path / "lm.pt", *settings, deepnorm=answer).config
        assert (config.deepnorm, config.post_layernorm) == (answer, "behind" in kind)
    torch.save(Golden("decoder_lm_small").weights("subln_xpos/weights/"), tmp_path / "magneto.pt")
    assert not longnet.load_torchscale_lm(tmp_path / "magneto.pt", *settings).config.deepnorm
    with pytest.raises(ValueError, match=r"magneto\.pt has sub-LayerNorms, .*: leave deepnorm out"):
        longnet.load_torchscale_lm(tmp_path / "magneto.pt", *settings, deepnorm=True)


def test_segments_are_the_authors():
    assert slides.segments_for(262_144, 256) == (1024, 5792, 32768, 185363, 1048576)
    assert slides.segments_for(250_000, 256) == (1024, 4870, 23170, 110217, 524288)
    with pytest.raises(ValueError, match="at least 32 tiles"):
        slides.segments_for(4096, 256)


def test_converted_there_and_back_no_bit_changes(tmp_path):
    golden, model = load_slides("small", tmp_path)
    back = checkpoints.to_torchscale(model)
    assert back.keys() == golden.weights().keys()
    assert all(torch.equal(back[name], weight) for name, weight in golden.weights().items())
    model.save_pretrained(tmp_path / "folder")
    again = longnet.load_gigapath(tmp_path / "folder", tail="exact")
    assert again.config.tail == "exact"
    other = longnet.load_gigapath(tmp_path / "folder", tile_size=512, segment_lengths=(8, 16), dilation_rates=(1, 2))
    assert (other.config.tile_size, other.config.segment_lengths) == (512, (8, 16))
    with pytest.raises(ValueError, match="is of 4 heads, got num_heads=8"):
        longnet.load_gigapath(tmp_path / "folder", num_heads=8)
    with pytest.raises(ValueError, match="is of 4 heads, got num_heads=16"):  # not taken for one that was left out
        longnet.load_gigapath(tmp_path / "folder", num_heads=16)
    with pytest.raises(ValueError, match="give it or segment_lengths"):
        longnet.load_gigapath(tmp_path / "folder", segment_lengths=(8,), max_wsi_size=512)
    assert again.config.segment_lengths == model.config.segment_lengths
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    for kind in _KINDS:
        golden, lm = load_lm(kind, tmp_path)
        weights = golden.weights(f"{kind}/weights/")
        back = checkpoints.to_torchscale(lm)
        assert back.keys() == weights.keys()
        for name, weight in weights.items():
            if name.endswith("xpos.scale"):
                torch.testing.assert_close(back[name], weight)
            else:
                assert torch.equal(back[name], weight), name
