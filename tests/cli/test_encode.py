"""`longnet encode` and `longnet convert`, from feature files to embeddings."""

import errno
import json
import sys

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import longnet
from longnet.data.slides import open_names, read_slide
from model.test_checkpoints import Golden

_SIZES = {
    "feature_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, and slides in every form, some of them no slides."""
    torch.manual_seed(0)
    at = tmp_path_factory.mktemp("slides")
    longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES)).save_pretrained(at / "model")
    (at / "h5").mkdir()
    for name, tiles in {"a": 40, "b": 23, "c": 41}.items():
        side = int(tiles**0.5) + 1
        places = np.stack([np.arange(tiles) // side, np.arange(tiles) % side], 1)
        with h5py.File(at / "h5" / f"{name}.h5", "w") as file:
            file["features"] = np.random.default_rng(tiles).normal(size=(tiles, 12)).astype(np.float16)
            file["coords"] = places * 512
            file["coords"].attrs["patch_size_level0"] = 512
    slide = read_slide(at / "h5" / "b.h5")
    torch.save({"features": slide.tile_embeds, "coords": slide.coords, "patch_size_level0": 512}, at / "d.pt")
    save_file(
        {"features": slide.tile_embeds, "coords": slide.coords}, at / "e.safetensors", {"patch_size_level0": "512"}
    )
    return at


def test_a_file_a_slide_and_each_as_if_alone(folder, tmp_path, call, capsys):
    out = tmp_path / "out"
    command = ("encode", folder / "model", folder / "h5", folder / "d.pt", folder / "e.safetensors", "-o", out)
    assert call(*command, "--layers", "--tiles", "--heat-map") == 0
    assert "5 slides, 150 tiles" in capsys.readouterr().out
    model = longnet.load_gigapath(folder / "model")
    for name, tiles in {"a": 40, "b": 23, "c": 41}.items():
        got = load_file(out / f"{name}.safetensors")
        slide = read_slide(folder / "h5" / f"{name}.h5")
        with torch.no_grad():
            want = model(slide.tile_embeds, slide.coords // 2)
            layers = model.layer_embeddings(slide.tile_embeds, slide.coords // 2, pool="cls")
        for key, value in (("pooled", want.pooled[0]), ("cls", want.cls[0]), ("tiles", want.last_hidden_state[0])):
            torch.testing.assert_close(got[key], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(got["layers_cls"], layers[:, 0], rtol=0, atol=1e-5)
        assert got["layers_mean"].shape == (3, 32)
        assert got["tiles"].shape == (tiles, 32)
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("d", "e"):
        for key, value in load_file(out / "b.safetensors").items():
            torch.testing.assert_close(load_file(out / f"{name}.safetensors")[key], value, rtol=0, atol=1e-5)
    (out / "b.safetensors").unlink()
    before = (out / "a.safetensors").stat().st_mtime_ns
    assert call(*command, "--layers", "--tiles", "--heat-map") == 0
    assert "1 slides, 23 tiles" in capsys.readouterr().out
    assert (out / "a.safetensors").stat().st_mtime_ns == before
    assert call(*command, "--tail", "exact") == 2
    assert "holds results of other settings" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_skipped_and_counted(folder, tmp_path, call, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    whole = (folder / "h5" / "a.h5").read_bytes()
    (bad / "good.h5").write_bytes(whole)
    (bad / "torn.h5").write_bytes(whole[: len(whole) // 2])
    (bad / "nothing.h5").write_bytes(b"")
    (bad / "torn.pt").with_name("broken.pt").write_bytes(b"PK\x03\x04")
    torch.save(torch.zeros(5, 12), bad / "tensor.pt")
    with h5py.File(bad / "empty.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((0, 12)), np.zeros((0, 2))
    with h5py.File(bad / "unplaced.h5", "w") as file:
        file["features"] = np.zeros((40, 12))
    with h5py.File(bad / "level.h5", "w") as file:
        slide = read_slide(folder / "h5" / "a.h5")
        file["features"], file["coords"] = slide.tile_embeds.numpy(), slide.coords.numpy() // 512
    with h5py.File(bad / "wide.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((5, 7)), np.arange(10).reshape(5, 2) * 256
    with h5py.File(bad / "huge.h5", "w") as file:
        file["features"], file["coords"] = np.full((5, 12), 1e300), np.arange(10).reshape(5, 2) * 256
    (bad / "._a.h5").write_bytes(b"of macOS")
    status = call("encode", folder / "model", bad, "-o", tmp_path / "out", "--format", "h5")
    said = capsys.readouterr()
    assert status == 2
    assert "9 of 10 slides were skipped" in said.err
    assert " and 1 more, each a line above that begins with skipped:" in said.err
    lines = [line for line in said.err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 9
    assert all(line.startswith(f"skipped: {bad}/") for line in lines)
    for reason in (
        "torn.h5 is damaged", "nothing.h5 is damaged", "broken.pt is damaged",
        "tensor.pt holds features without coords",
        "empty.h5 holds no tiles", "unplaced.h5 holds no coords", "multiply them by 256", "got 7: they are of another",
        "huge.h5: its embedding is NaN or infinite",
    ):  # fmt: skip
        assert reason in said.err
    with h5py.File(tmp_path / "out" / "good.h5") as file:
        assert file["pooled"].shape == (32,)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encode.json", "good.h5"]


def test_a_result_counts_for_the_file_and_the_settings_it_was_made_of(folder, tmp_path, call, capsys):
    slides, out = tmp_path / "slides", tmp_path / "slides" / "out"  # results among the features: not taken for any
    slides.mkdir()
    for name in "ab":
        (slides / f"{name}.h5").write_bytes((folder / "h5" / f"{name}.h5").read_bytes())
    command = ("encode", folder / "model", slides, "-o", out)
    assert call(*command) == 0
    assert call(*command) == 0
    assert "0 slides, 0 tiles" in capsys.readouterr().out.splitlines()[-1]
    assert call("encode", folder / "model", slides / "a.h5", "-o", tmp_path / "again") == 0
    assert (tmp_path / "again" / "a.safetensors").read_bytes() == (out / "a.safetensors").read_bytes()
    (slides / "a.h5").write_bytes((folder / "h5" / "c.h5").read_bytes())  # extracted anew
    settings = json.loads((out / "encode.json").read_text())
    assert settings.pop("global_tokens") == 0
    assert settings.pop("heat_map") is False
    (out / "encode.json").write_text(json.dumps(settings))  # as versions wrote it that knew neither
    (out / "b.safetensors").write_bytes(b"torn")
    (out / ".b.safetensors.partial").write_bytes(b"of a kill")
    assert call(*command) == 0
    assert "2 slides, 64 tiles" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["a.safetensors", "b.safetensors", "encode.json"]
    torch.manual_seed(1)
    longnet.LongNetSlideModel(longnet.LongNetSlideConfig(**_SIZES)).save_pretrained(tmp_path / "other")
    for change, what in (
        (("--format", "h5"), "format"), (("--layers",), "layers"), (("--tiles",), "tiles"),
        (("--heat-map",), "heat_map"), (("--dtype", "bfloat16"), "dtype, weights"),
        (("--tile-size", "512"), "tile_size"), (("--tail", "exact"), "tail"),
        (("--segment-lengths", "4,8,16"), "segment_lengths"),
    ):  # fmt: skip
        assert call(*command, *change) == 2
        assert f"holds results of other settings ({what})" in capsys.readouterr().err
    assert call("encode", tmp_path / "other", slides, "-o", out) == 2
    assert "holds results of other settings (weights)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["h5", "safetensors"])
def test_features_are_never_overwritten(form, folder, tmp_path, call, capsys):
    source = folder / ("h5/b.h5" if form == "h5" else "e.safetensors")
    slide = tmp_path / source.name
    slide.write_bytes(source.read_bytes())
    assert call("encode", folder / "model", slide, "-o", tmp_path, "--format", form) == 2
    assert "would take its place" in capsys.readouterr().err
    assert slide.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("form", ["h5", "safetensors"])
def test_bfloat16_and_every_option_together(form, folder, tmp_path, call):
    out = tmp_path / "out"
    options = ("--format", form, "--layers", "--tiles", "--heat-map", "--dtype", "bfloat16")
    assert call("encode", folder / "model", folder / "h5" / "b.h5", "-o", out, *options) == 0
    with open_names(out / f"b.{form}") as (names, file):
        held = {name: torch.tensor(file[name][()]) if form == "h5" else file.get_tensor(name) for name in names}
    shapes = {"pooled": (32,), "cls": (32,), "layers_mean": (3, 32), "layers_cls": (3, 32), "tiles": (23, 32)}
    assert {name: tuple(x.shape) for name, x in held.items()} == shapes
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in held.values())
    slide = read_slide(folder / "h5" / "b.h5").scaled(256)
    with torch.no_grad():
        want = longnet.load_gigapath(folder / "model")(slide.tile_embeds, slide.coords).pooled[0]
    torch.testing.assert_close(held["pooled"], want, rtol=0, atol=0.06)
    assert (out / "b.png").read_bytes().startswith(b"\x89PNG")


def test_where_nothing_can_be_written_one_line_says_so(folder, tmp_path, call, capsys, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    command = ("encode", folder / "model", folder / "h5" / "b.h5", "-o")
    assert call(*command, tmp_path / "file" / "out") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert call(*command, tmp_path / "out") == 0
    (tmp_path / "out" / "b.safetensors").unlink()
    capsys.readouterr()
    monkeypatch.setattr("os.fsync", full)
    assert call(*command, tmp_path / "out") == 2
    assert f"No space left on device: '{tmp_path / 'out' / 'b.safetensors'}'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["encode.json"]
    assert call("convert", folder / "model", tmp_path / "back.safetensors") == 2
    assert not (tmp_path / "back.safetensors").exists()


def test_without_h5py_one_line_says_what_to_install(folder, tmp_path, call, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for slide, options in ((folder / "h5" / "b.h5", ()), (folder / "e.safetensors", ("--format", "h5"))):
        assert call("encode", folder / "model", slide, "-o", tmp_path / "out", *options) == 2
        assert "needs h5py: pip install 'longnet-torch[slides]'" in capsys.readouterr().err


def test_convert_there_and_back(folder, tmp_path, call, capsys):
    assert call("convert", folder / "model", tmp_path / "slides.pth") == 0
    settings = ("--num-heads", 4, "--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4")
    assert call("convert", tmp_path / "slides.pth", tmp_path / "again", *settings) == 0
    before, after = (load_file(at / "model.safetensors") for at in (folder / "model", tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert call("convert", tmp_path / "slides.pth", tmp_path / "again") == 2
    assert "is there already" in capsys.readouterr().err
    assert call("convert", tmp_path / "slides.pth", tmp_path / "lm", "--kind", "lm") == 2
    assert "--segment-lengths" in capsys.readouterr().err


def test_convert_a_fine_tuned_file_and_encode_with_its_encoder(folder, tmp_path, call, capsys):
    config = longnet.LongNetSlideConfig(**_SIZES, classifier_layers=(0, 2), num_labels=3)
    model = longnet.LongNetForSlideClassification(config).eval()
    torch.save(longnet.model.checkpoints.to_torchscale(model), tmp_path / "tuned.pt")
    settings = ("--num-heads", 4, "--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4")
    assert call("convert", tmp_path / "tuned.pt", tmp_path / "tuned", *settings) == 2
    assert "reads 2 embeddings of 32, 64 in all, and classifier_layers names 1" in capsys.readouterr().err
    assert call("convert", tmp_path / "tuned.pt", tmp_path / "tuned", *settings, "--classifier-layers", "0,2") == 0
    assert call("encode", tmp_path / "tuned", folder / "h5" / "b.h5", "-o", tmp_path / "out") == 0
    slide = read_slide(folder / "h5" / "b.h5").scaled(256)
    with torch.no_grad():
        want = model.slides(slide.tile_embeds, slide.coords).pooled[0]
    torch.testing.assert_close(load_file(tmp_path / "out" / "b.safetensors")["pooled"], want, rtol=0, atol=1e-5)


def test_what_no_tensor_of_a_language_model_tells_is_an_option(tmp_path, call, capsys):
    """Every field of the configuration is read off the file, is an option, or is of training alone."""
    weights = Golden("decoder_lm_small").weights("deepnorm/weights/")
    torch.save({"model": weights}, tmp_path / "theirs.pt")
    command = ("convert", tmp_path / "theirs.pt", tmp_path / "ours", "--kind", "lm", "--num-heads", 4, "--deepnorm",
               "--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4")  # fmt: skip
    options = ("--xpos-scale-base", 300.5, "--pad-token-id", 3, "--eos-token-id", 2, "--activation", "relu",
               "--layernorm-eps", "1e-6")  # fmt: skip
    assert call(*command, *options) == 0
    config = longnet.LongNetConfig.from_pretrained(tmp_path / "ours")
    said = (config.xpos_scale_base, config.pad_token_id, config.eos_token_id, config.hidden_act, config.layer_norm_eps)
    assert said == (300.5, 3, 2, "relu", 1e-6)
    capsys.readouterr()
    for wrong in (("--activation", "gelo"), ("--layernorm-eps", "-1"), ("--xpos-scale-base", "0")):
        assert call(*(part if part != tmp_path / "ours" else tmp_path / "other" for part in command), *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert wrong[1] in error


@pytest.mark.parametrize("kind", ["longvit", "longvit classifier", "lm"])
def test_convert_the_other_kinds_there_and_back(kind, tmp_path, call):
    if kind == "lm":
        golden = Golden("decoder_lm_small")
        weights = golden.weights("deepnorm/weights/")
        options = ("--deepnorm", "--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4")
    else:
        golden = Golden("longvit_small")
        weights, options = golden.weights(), ("--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4")
        if kind == "longvit classifier":
            weights = {f"backbone.{name}": weight for name, weight in weights.items()} | golden.weights("classifier/")
    torch.save({"model": weights}, tmp_path / "theirs.pt")
    folder = tmp_path / "ours"
    assert call("convert", tmp_path / "theirs.pt", folder, "--kind", kind.split()[0], "--num-heads", 4, *options) == 0
    assert call("convert", folder, tmp_path / "back.safetensors") == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    if kind == "lm":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(golden["ragged/ids"]).logits
        torch.testing.assert_close(logits.double(), golden["deepnorm/ragged/logits"].double(), rtol=0, atol=2e-5)
