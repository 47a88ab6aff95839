"""Feature files of slides, as pathologists keep them: one a slide, tile embeddings and the tiles' coordinates."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.tensors import first_line, read_pickle, reading

SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".safetensors")

_PICKLES = (".pt", ".pth")
_FEATURES = ("features", "feats", "tile_embeds", "embeddings")
_COORDS = ("coords", "coordinates")
_STEP = "patch_size_level0"


class SlideFeatures(NamedTuple):
    """One slide.

    Attributes:
        tile_embeds: (N, C), in the file's float dtype.
        coords: (N, 2), pixels of level 0.
        step: pixels of level 0 that a tile is wide, where the file says so.
    """

    tile_embeds: Tensor
    coords: Tensor
    step: float | None

    def scaled(self, tile_size: int) -> SlideFeatures:
        """Return the slide with coordinates that lie as if its tiles were `tile_size` wide: a tile, a position."""
        if self.step is None or self.step == tile_size:
            return self
        return self._replace(coords=self.coords.to(torch.float64) * (tile_size / self.step))


def find_slides(paths: Sequence[str], apart: Path | None = None) -> list[Path]:
    """Return the feature files that files, folders and globs name, in order, each once.

    Args:
        paths: files, folders and globs. In folders hidden files are passed over, those of macOS among them.
        apart: a folder of results, which folders that hold it do not mean.

    Raises:
        ValueError: a path that names no feature file, two files of one name, whose results would be one file, or HDF5
            without h5py.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.name[0] != ".")
            if apart is not None and path.resolve() in apart.resolve().parents:
                files = [file for file in files if apart.resolve() not in file.resolve().parents]
        else:
            files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        if not files:
            raise ValueError(f"{text} names no feature file: give .h5, .pt or .safetensors files, folders or globs")
        found += files
    found = list(dict.fromkeys(found))
    names: dict[str, Path] = {}
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is no feature file: known are {', '.join(SUFFIXES)}")
        if path.stem in names:
            raise ValueError(f"{names[path.stem]} and {path} would have one result, {path.stem}: encode them apart")
        names[path.stem] = path
    hdf5 = [path for path in found if path.suffix in (".h5", ".hdf5")]
    if hdf5:
        import_h5py(str(hdf5[0]))  # rather than skip every one
    return found


def count_tiles(path: Path) -> int:
    """Return how many tiles a file holds; of HDF5 and safetensors without reading them.

    Raises:
        ValueError: a damaged or empty file, or one of another kind.
        OSError: no such file, or one that is not ours to read.
    """
    if path.suffix in _PICKLES:
        return len(read_slide(path).tile_embeds)
    with open_names(path) as (names, file):
        name = _name(path, names, _FEATURES)
        with reading(path):
            shape = file.get_slice(name).get_shape() if path.suffix == ".safetensors" else _numbers(file[name]).shape
    return _tiles(path, shape)


def read_slide(path: Path) -> SlideFeatures:
    """Read a feature file.

    HDF5 and safetensors hold `features` (N, C) and `coords` (N, 2), or each with a leading 1, and may say
    `patch_size_level0`, as an attribute of `coords` or of the file; .pt holds a dictionary of the same names.

    Raises:
        ValueError: a damaged or empty file, one without features or coordinates, or whose numbers differ.
        OSError: no such file, or one that is not ours to read.
    """
    features, coords, step = (_read_pickle if path.suffix in _PICKLES else _read)(path)
    if any(x.layout != torch.strided or x.is_complex() for x in (features, coords)):
        raise ValueError(f"{path} holds features or coords that are sparse or complex: save dense, real ones")
    features, coords = (x[0] if x.ndim == 3 and len(x) == 1 else x for x in (features, coords))
    tiles = _tiles(path, features.shape)
    if features.ndim != 2 or coords.shape != (tiles, 2):
        raise ValueError(
            f"{path} must hold features (N, C) and coords (N, 2), got {tuple(features.shape)} and {tuple(coords.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{path} holds features that are not finite")
    if not coords.is_floating_point():
        coords = coords.to(torch.int64)  # some write uint32
    return SlideFeatures(features, coords, None if step is None else _pixels(path, step))


def _read(path: Path) -> tuple[Tensor, Tensor, Any]:
    held = []
    with open_names(path) as (names, file):
        step: Any = None
        for known in (_FEATURES, _COORDS):
            name = _name(path, names, known)
            with reading(path):
                if path.suffix == ".safetensors":
                    held.append(file.get_tensor(name))
                    step = (file.metadata() or {}).get(_STEP)
                else:
                    data = _numbers(file[name])
                    held.append(torch.from_numpy(data[()]))
                    step = data.attrs.get(_STEP, file.attrs.get(_STEP))  # that of coords counts, which comes last
    return held[0], held[1], step


def _read_pickle(path: Path) -> tuple[Tensor, Tensor, Any]:
    data = read_pickle(path)
    if not isinstance(data, dict):
        what = "features without coords" if isinstance(data, Tensor) else f"a {type(data).__name__}"
        raise ValueError(f"{path} holds {what}: save {{'features': …, 'coords': …}}")
    try:
        features, coords = (torch.as_tensor(data[_name(path, data, names)]) for names in (_FEATURES, _COORDS))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds features or coords that are no numbers: {first_line(error)}") from None
    return features, coords, data.get(_STEP)


def _pixels(path: Path, step: Any) -> float:
    try:
        pixels = float(step)
    except (TypeError, ValueError):
        pixels = math.nan
    if not 0 < pixels < math.inf:
        raise ValueError(f"{path} says {_STEP} = {step}, which must be a number of pixels above 0")
    return pixels


def _name(path: Path, held: Any, names: Sequence[str]) -> str:
    for name in names:
        if name in held:
            return name
    raise ValueError(f"{path} holds no {names[0]}: it holds {', '.join(sorted(map(str, held))) or 'nothing'}")


def _numbers(data: Any) -> Any:
    if not hasattr(data, "shape"):
        raise TypeError(f"{data.name} is a group, where numbers are expected")
    return data


def _tiles(path: Path, shape: Sequence[int]) -> int:
    tiles = shape[1] if len(shape) == 3 and shape[0] == 1 else shape[0] if len(shape) else 0
    if not tiles:
        raise ValueError(f"{path} holds no tiles")
    return int(tiles)


@contextmanager
def open_names(path: Path) -> Iterator[tuple[Sequence[str], Any]]:
    """Open HDF5 or safetensors, and list the names in it.

    Raises:
        ValueError: a damaged file, or h5py is missing.
        OSError: no such file, or one that is not ours to read.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with reading(path):
            opened: Any = safe_open(path, "pt")
    else:
        h5py = import_h5py(str(path))
        with reading(path):
            opened = h5py.File(path, "r")
    with opened as file:
        with reading(path):
            names = list(file.keys())
        yield names, file


def import_h5py(use: str) -> Any:
    """Return the module h5py, an extra; `use` says what needs it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{use} needs h5py: pip install 'longnet-torch[slides]'") from error
    return h5py
