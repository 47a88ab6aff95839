"""Feature files that are none: each is a ValueError that names it, so that an encoding skips it and goes on."""

import re

import h5py
import pytest
import torch

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


def test_a_group_in_place_of_numbers_is_named(tmp_path):
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file.create_group("features")
        file["coords"] = [[0, 0]]
    for read in (read_slide, count_tiles):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
