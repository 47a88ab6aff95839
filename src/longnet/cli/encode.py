"""`longnet encode`: feature files of slides → embeddings, with a slide encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from longnet.cli.check import at_least_one, check_folder, refuse_unused


def encode(
    model: Path,
    slides: Annotated[list[str], cyclopts.Parameter(negative=())],
    *,
    output: Annotated[Path, cyclopts.Parameter(("--output", "-o"))] = Path("embeddings"),
    layers: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    tiles: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    heat_map: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    format: Literal["safetensors", "h5"] = "safetensors",  # noqa: A002  # the option's name
    num_heads: int | None = None,
    segment_lengths: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    dilation_rates: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    max_wsi_size: int | None = None,
    tile_size: int | None = None,
    tail: Literal["torchscale", "exact"] | None = None,
    batch_tiles: int = 16_384,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Encode slides with GigaPath's slide encoder: a file of embeddings for each feature file.

    What is there already is not made again, so that the same command goes on after an interruption, unless the feature
    file has changed since; a folder of results of another model or other settings is refused. A file that is
    damaged, empty or has wrong coordinates is named, skipped and counted, and the exit status is 2.

    Args:
        model: slide_encoder.pth, or a folder that `longnet convert` or `save_pretrained` wrote.
        slides: Feature files, folders, globs: HDF5 with `features` and `coords` (CLAM, TRIDENT), .pt,
            .safetensors. Where a file says `patch_size_level0`, its tiles are that wide, and lie a position
            apart.
        output: Folder of the results.
        layers: Write the embeddings after each layer, too: `layers_mean` and `layers_cls` (L + 1, C).
        tiles: Write every tile in its context, too: `tiles` (N, C).
        heat_map: Draw the attention that each tile receives in the last layer, as a PNG.
        format: Of the results.
        num_heads: Of slide_encoder.pth, which does not say; 16 if not given.
        segment_lengths: In tiles; from --max-wsi-size and --tile-size if not given.
        dilation_rates: 1 2 4 8 16 if not given.
        max_wsi_size: Side of the largest slide in training, in pixels, which makes the segment lengths; 262144 of
            slide_encoder.pth if not given.
        tile_size: Side of a tile, in pixels of level 0, where a file does not say; 256 of slide_encoder.pth if not
            given.
        tail: "torchscale", as the published weights were trained, or "exact".
        batch_tiles: Tiles of a batch, padding included. Changes memory and speed, not the result.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        dtype: Of weights and states; results are float32.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from longnet.data.slides import find_slides
    from longnet.evaluation import slides as encoding
    from longnet.measurement import take_device
    from longnet.model.checkpoints import load_gigapath
    from longnet.model.slides import LongNetSlideModel

    given = {"num_heads": num_heads, "tile_size": tile_size, "max_wsi_size": max_wsi_size}
    at_least_one(batch_tiles=batch_tiles, **{name: size for name, size in given.items() if size is not None})
    if segment_lengths:
        refuse_unused("makes the segment lengths: give it or --segment-lengths", max_wsi_size=max_wsi_size)
    check_folder(output)
    place = take_device(device, option="--device")
    paths = find_slides(slides, apart=output)
    loaded = load_gigapath(
        model, num_heads, segment_lengths or None, dilation_rates or None, max_wsi_size, tile_size, tail
    )
    encoder = loaded if isinstance(loaded, LongNetSlideModel) else loaded.slides
    torch.nn.Module.to(encoder, place, getattr(torch, dtype))
    wanted = encoding.Wanted(layers, tiles, heat_map, format)
    about = encoding.settings_of(encoder)
    left = encoding.begin(output, paths, wanted, about)
    console = Console(stderr=True)
    skipped: list[Path] = []
    tiles_read = 0
    with Progress(
        TextColumn("slides"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(paths), completed=len(paths) - len(left))
        for slide in encoding.encode(encoder, left, output, wanted, batch_tiles=batch_tiles):
            for note in slide.notes:
                console.print(f"{slide.path}: {note}", markup=False, highlight=False, soft_wrap=True)
            if slide.notes:
                continue
            if slide.problem is not None:
                skipped.append(slide.path)
                console.print(f"skipped: {slide.problem}", markup=False, highlight=False, soft_wrap=True)
            tiles_read += slide.tiles
            progress.advance(task)
    done = len(left) - len(skipped)
    print(f"{done} slides, {tiles_read:,} tiles, in {output}; {len(paths) - len(left)} were there already")
    if skipped:
        more = f" and {len(skipped) - 8} more, each a line above that begins with skipped:" if len(skipped) > 8 else ""
        raise ValueError(
            f"{len(skipped)} of {len(paths)} slides were skipped, for the reasons above: "
            f"{', '.join(path.name for path in skipped[:8])}{more}"
        )
