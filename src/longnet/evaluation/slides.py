"""Slides of feature files → their embeddings, a file a slide: `longnet encode`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from longnet.data.slides import SlideFeatures, count_tiles, import_h5py, open_names, read_slide
from longnet.data.writer import write_whole
from longnet.model.attention_maps import watch_received
from longnet.model.slides import LongNetSlideConfig, LongNetSlideModel, SlideOutput, collate_slides
from longnet.plots.heat_map import draw_heat_map

Format = Literal["safetensors", "h5"]

_SETTINGS = "encode.json"
_DECIDING = (
    "num_attention_heads", "segment_lengths", "dilation_rates", "head_offsets", "queries", "global_tokens",
    "rotate_offsets", "tail",
    "tile_size", "grid_size", "layer_norm_eps", "head_norm_eps", "hidden_act",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is written of each slide.

    Attributes:
        layers: the mean-pooled and the CLS embedding after each layer.
        tiles: every tile in its context.
        heat_map: a picture of the attention that each tile receives in the last layer.
        format: of the files.
    """

    layers: bool = False
    tiles: bool = False
    heat_map: bool = False
    format: Format = "safetensors"


class Encoded(NamedTuple):
    """What became of a slide.

    Attributes:
        path: the feature file.
        tiles: how many it holds; 0 where it could not be read.
        problem: why it was skipped, or None.
        notes: what was warned of.
    """

    path: Path
    tiles: int
    problem: str | None
    notes: tuple[str, ...] = ()


def begin(folder: Path, paths: Sequence[Path], wanted: Wanted, about: dict[str, Any]) -> list[Path]:
    """Return the slides that are still to be encoded, and note the settings in the folder.

    A slide is done where its result says that it was made of a file of this size and time.

    Args:
        folder: of the results.
        paths: feature files.
        wanted: what is written.
        about: the model's settings (`settings_of`); results of other settings are not mixed with these.

    Raises:
        ValueError: the folder holds results of other settings, or a feature file where a result would be.
    """
    if wanted.format == "h5":
        import_h5py("--format h5")
    for path in paths:
        if _result(folder, path, wanted).resolve() == path.resolve():
            raise ValueError(f"the result of {path} would take its place: choose another folder than {folder}")
    settings = json.loads(json.dumps({**about, **dataclasses.asdict(wanted)}))
    noted = folder / _SETTINGS
    if noted.exists():
        # What an earlier version knew no setting for had its default.
        defaults = {name: getattr(LongNetSlideConfig(), name) for name in _DECIDING} | dataclasses.asdict(Wanted())
        held = json.loads(json.dumps(defaults)) | json.loads(noted.read_text())
        other = sorted(name for name in settings.keys() | held.keys() if settings.get(name) != held.get(name))
        if other:
            raise ValueError(
                f"{folder} holds results of other settings ({', '.join(other)}): choose another folder, or delete it"
            )
    else:
        with write_whole(noted) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
    return [path for path in paths if not _is_done(path, _result(folder, path, wanted))]


def settings_of(model: LongNetSlideModel) -> dict[str, Any]:
    """Return what decides a model's results: a digest of its weights, and the fields of its configuration."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy())
    return {
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(model.config, name) for name in _DECIDING},
    }


def encode(
    model: LongNetSlideModel, paths: Sequence[Path], folder: Path, wanted: Wanted, *, batch_tiles: int
) -> Iterator[Encoded]:
    """Encode slides, those of like length together, and write a file for each, whole or not at all.

    Args:
        model: the slide encoder.
        paths: feature files.
        folder: of the results: `pooled` and `cls` (C,), on request `layers_mean` and `layers_cls` (L + 1, C), `tiles`
            (N, C), all float32.
        wanted: what is written.
        batch_tiles: tiles of a batch, padding included; a longer slide goes alone.

    Yields:
        What became of each slide; one that cannot be read or has wrong coordinates is skipped and says why.
    """
    lengths: dict[Path, int] = {}
    for path in paths:
        try:
            lengths[path] = count_tiles(path)
        except (ValueError, OSError) as error:
            yield Encoded(path, 0, str(error))
    for batch in _batches(lengths, batch_tiles):
        slides: list[SlideFeatures] = []
        read: list[Path] = []
        for path in batch:
            try:
                slide = read_slide(path).scaled(model.config.tile_size)
            except (ValueError, OSError) as error:
                yield Encoded(path, 0, str(error))
                continue
            try:
                notes = _try(model, slide)
            except ValueError as error:
                yield Encoded(path, 0, f"{path}: {error}")
                continue
            slides.append(slide)
            read.append(path)
            lengths[path] = len(slide.tile_embeds)
            if notes:
                yield Encoded(path, 0, None, notes)
        if slides:
            for path, is_finite in zip(read, _encode(model, slides, read, folder, wanted), strict=True):
                problem = f"{path}: its embedding is NaN or infinite, as of features too large for {model.dtype}"
                yield Encoded(path, lengths[path], None) if is_finite else Encoded(path, 0, problem)


def _encode(
    model: LongNetSlideModel, slides: list[SlideFeatures], paths: list[Path], folder: Path, wanted: Wanted
) -> Iterator[bool]:
    """Write each slide's result where it is finite; yield whether it is."""
    sources = [_source(path) for path in paths]
    inputs = collate_slides([(slide.tile_embeds.float(), slide.coords) for slide in slides])
    if len(slides) == 1:
        inputs.pop("padding_mask")
    maps = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # each slide's were noted when it was read
        stack.enter_context(torch.no_grad())
        watched = stack.enter_context(watch_received(model, layer=-1)) if wanted.heat_map else None
        layers: dict[str, list[Tensor]] = {"mean": [], "cls": []}
        output = SlideOutput()
        for output in model.each_layer(**inputs):
            if wanted.layers:
                layers["mean"].append(output.pooled)
                layers["cls"].append(output.cls)
        final = model.final(output)
        if watched is not None:
            maps = watched()
    for row, (slide, source, path) in enumerate(zip(slides, sources, paths, strict=True)):
        tensors = {"pooled": final.pooled[row], "cls": final.cls[row]}
        for pool, states in layers.items() if wanted.layers else ():
            tensors[f"layers_{pool}"] = torch.stack([state[row] for state in states])
        if wanted.tiles:
            tensors["tiles"] = final.last_hidden_state[row, : len(slide.tile_embeds)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            yield False
            continue
        result = _result(folder, path, wanted)
        if maps is not None:
            received = maps[row, 1 : len(slide.tile_embeds) + 1].float().cpu()
            with write_whole(result.with_suffix(".png")) as file:
                draw_heat_map(slide.coords.numpy(), received.numpy(), model.config.tile_size, file)
        held = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        _write(result, held, wanted.format, source)
        yield True


def _try(model: LongNetSlideModel, slide: SlideFeatures) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.check(slide.tile_embeds[None].float(), slide.coords[None])
    return tuple(str(warning.message) for warning in caught)


def _batches(lengths: dict[Path, int], batch_tiles: int) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for path in sorted(lengths, key=lambda path: (lengths[path], path)):
        if batch and lengths[path] * (len(batch) + 1) > batch_tiles:
            yield batch
            batch = []
        batch.append(path)
    if batch:
        yield batch


def _result(folder: Path, path: Path, wanted: Wanted) -> Path:
    return folder / f"{path.stem}.{wanted.format}"


def _source(path: Path) -> dict[str, str]:
    about = path.stat()  # in one value: of several, safetensors draws the order anew each time
    return {"source": json.dumps({"file": str(path), "bytes": about.st_size, "mtime_ns": about.st_mtime_ns})}


def _is_done(path: Path, result: Path) -> bool:
    if not result.exists():
        return False
    try:
        with open_names(result) as (_, file):
            about = file.metadata() or {} if result.suffix == ".safetensors" else file.attrs
            held = json.loads(about.get("source", "{}"))
    except ValueError:  # it is damaged, or none of ours
        return False
    wanted = json.loads(_source(path)["source"])
    return all(held.get(name) == wanted[name] for name in ("bytes", "mtime_ns"))


def _write(path: Path, tensors: dict[str, Tensor], form: Format, source: dict[str, str]) -> None:
    if form == "safetensors":
        data = save(tensors, source)
    else:
        h5py = import_h5py("--format h5")
        held = io.BytesIO()
        with h5py.File(held, "w") as file:
            for name, tensor in tensors.items():
                file[name] = tensor.numpy()
            file.attrs.update(source)
        data = held.getvalue()
    with write_whole(path) as file:
        file.write(data)
