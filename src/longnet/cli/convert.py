"""`longnet convert`: torchscale's checkpoints → folders that from_pretrained reads, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts

from longnet.cli.check import at_least_one, refuse_unused


def convert(
    source: Path,
    target: Path,
    *,
    kind: Literal["gigapath", "longvit", "lm"] | None = None,
    num_heads: int | None = None,
    segment_lengths: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    dilation_rates: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    max_wsi_size: int | None = None,
    tile_size: int | None = None,
    classifier_layers: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")] = (),
    deepnorm: bool | None = None,
    scale_embedding: bool = False,
    sinusoidal: bool = False,
    xpos_scale_base: float | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    activation: str | None = None,
    layernorm_eps: float | None = None,
) -> None:
    """Convert a checkpoint of torchscale into a folder that from_pretrained reads, or such a folder back.

    A folder becomes torchscale's file: a .pth or .pt with the weights under "model", or a .safetensors of its names.
    No number changes.

    Args:
        source: A checkpoint of torchscale, or a folder.
        target: A folder that is not there yet, or for a folder a file.
        kind: What the checkpoint is: GigaPath's slide encoder if not given, LongViT, or a causal language model.
        num_heads: Query heads; no tensor tells. 16 if not given.
        segment_lengths: Of language models, and where they are not the usual ones.
        dilation_rates: Likewise.
        max_wsi_size: Of GigaPath: side of the largest slide in training, in pixels, which makes the segment
            lengths; 262144 if not given.
        tile_size: Of GigaPath: side of a tile, in pixels; 256 if not given.
        classifier_layers: Of fine-tuned GigaPath files: which of the L + 1 embeddings the classifier reads; 11 if
            not given.
        deepnorm: Of language models without sub-LayerNorms: DeepNorm's factor (2L)^¼, or 1 with --no-deepnorm; no
            tensor tells.
        scale_embedding: Of language models: embeddings × √C.
        sinusoidal: Of language models: fairseq's sinusoidal positions.
        xpos_scale_base: Of language models with xPos: torchscale's xpos_scale_base; 512 if not given.
        pad_token_id: Of language models: torchscale's padding index, after which positions are counted; 1, which is
            fairseq's, if not given.
        eos_token_id: Of language models: the token that ends generation, which is 2 in fairseq; none if not given.
        activation: Of language models: torchscale's activation_fn, gelu if not given.
        layernorm_eps: Of language models: torchscale's layernorm_eps, 1e-5 if not given.
    """
    import torch
    from safetensors.torch import save

    import longnet
    from longnet.data.writer import write_whole, write_whole_folder
    from longnet.model.checkpoints import to_torchscale
    from longnet.model.weights import load_config, load_folder

    if not source.exists():
        raise FileNotFoundError(f"there is no {source}")
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another name")
    sizes = {"num_heads": num_heads, "max_wsi_size": max_wsi_size, "tile_size": tile_size}
    at_least_one(**{name: size for name, size in sizes.items() if size is not None})
    of_slides = {"max_wsi_size": max_wsi_size, "tile_size": tile_size, "classifier_layers": classifier_layers}
    fields: dict[str, Any] = {
        "xpos_scale_base": xpos_scale_base, "pad_token_id": pad_token_id, "eos_token_id": eos_token_id,
        "hidden_act": activation, "layer_norm_eps": layernorm_eps,
    }  # fmt: skip
    of_lm = {
        "deepnorm": None if deepnorm is None else "said", "scale_embedding": scale_embedding, "sinusoidal": sinusoidal,
        "xpos_scale_base": xpos_scale_base, "pad_token_id": pad_token_id, "eos_token_id": eos_token_id,
        "activation": activation, "layernorm_eps": layernorm_eps,
    }  # fmt: skip
    if source.is_dir():
        refuse_unused(
            f"is of torchscale's files, and the folder {source} says it itself: leave it away", kind=kind,
            num_heads=num_heads, segment_lengths=segment_lengths, dilation_rates=dilation_rates, **of_slides, **of_lm,
        )  # fmt: skip
        if target.suffix not in (".pth", ".pt", ".safetensors"):
            raise ValueError(f"a folder becomes a .pth, .pt or .safetensors file, got {target}")
        name = (load_config(source).architectures or ["?"])[0]
        kind_of_model = getattr(longnet, name, None)
        if kind_of_model is None:
            raise ValueError(f"{source} holds a {name}, which torchscale has no format for")
        weights = to_torchscale(load_folder(kind_of_model, source))
        with write_whole(target) as file:
            if target.suffix == ".safetensors":
                file.write(save({name: weight.clone() for name, weight in weights.items()}))
            else:
                torch.save({"model": weights}, file)
        print(f"{len(weights)} tensors in {target}")
        return
    if segment_lengths:
        refuse_unused("makes the segment lengths: give it or --segment-lengths", max_wsi_size=max_wsi_size)
    branches = segment_lengths or None, dilation_rates or None
    model: torch.nn.Module
    if kind in (None, "gigapath"):
        refuse_unused("is of language models: leave it away, or give --kind lm", **of_lm)
        model = longnet.load_gigapath(
            source, num_heads, *branches, max_wsi_size, tile_size, classifier_layers=classifier_layers or (11,)
        )
    elif kind == "longvit":
        refuse_unused("is of other kinds than LongViT: leave it away", **of_slides, **of_lm)
        model = longnet.load_longvit(source, num_heads, *branches)
    else:
        refuse_unused("is of GigaPath's slide encoder: leave it away", **of_slides)
        if not segment_lengths or not dilation_rates:
            raise ValueError("a language model needs --segment-lengths and --dilation-rates, which no tensor tells")
        model = longnet.load_torchscale_lm(
            source, 16 if num_heads is None else num_heads, segment_lengths, dilation_rates,
            deepnorm=deepnorm, scale_embedding=scale_embedding, sinusoidal=sinusoidal,
            **{name: value for name, value in fields.items() if value is not None},
        )  # fmt: skip
    with write_whole_folder(target) as folder:
        model.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {parameters:,} parameters, in {target}")
