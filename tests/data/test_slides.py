"""Feature files that are none: each is a ValueError that names it, so that an encoding skips it and goes on."""

import random
import re
from pathlib import Path

import h5py
import pytest
import torch
from safetensors.torch import save_file

from longnet.data.slides import count_tiles, read_slide

GOOD = {"features": torch.ones(3, 4), "coords": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    "held",
    [
        b"", b"hello world", 7, None, [1, 2], ["features", "coords"], {1: 2, "a": 3}, torch.ones(3, 4),
        GOOD | {"features": "abc"}, GOOD | {"features": None}, GOOD | {"features": torch.ones(3, 4).to_sparse()},
        GOOD | {"features": torch.ones(3, 4, dtype=torch.complex64)}, GOOD | {"patch_size_level0": 0},
        GOOD | {"patch_size_level0": [512, 512]}, GOOD | {"patch_size_level0": "abc"}, GOOD | {"patch_size_level0": -5},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, held):
    path = tmp_path / "slide.pt"
    if isinstance(held, bytes):
        path.write_bytes(held)
    else:
        torch.save(held, path)
    for read in (read_slide, count_tiles):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize("kind", ["h5", "safetensors", "pt"])
def test_flipped_and_missing_bytes_are_a_slide_or_an_error_that_names_it(kind, tmp_path):
    path, draw = tmp_path / f"slide.{kind}", random.Random(0)
    held = {"features": torch.randn(40, 8), "coords": torch.arange(80).reshape(40, 2)}
    if kind == "h5":
        with h5py.File(path, "w") as file:
            for name, tensor in held.items():
                file.create_dataset(name, data=tensor.numpy(), chunks=(10, tensor.shape[1]), compression="gzip")
    else:
        (save_file if kind == "safetensors" else torch.save)(held, path)
    whole, refused = path.read_bytes(), 0
    for number in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
        path.write_bytes(data[: draw.randrange(len(data))] if number % 3 == 0 else data)
        for read in (read_slide, count_tiles):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
                refused += 1
    assert refused > 100


def test_a_pickle_that_can_run_code_is_refused_in_one_line(tmp_path):
    path = tmp_path / "slide.pt"
    torch.save({"features": torch.ones(3, 4).numpy(), "coords": Path()}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors \(\S+\), which is not read") as raised:
        read_slide(path)
    assert "\n" not in str(raised.value)


def test_a_group_in_place_of_numbers_is_named(tmp_path):
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file.create_group("features")
        file["coords"] = [[0, 0]]
    for read in (read_slide, count_tiles):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
