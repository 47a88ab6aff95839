"""torchscale's checkpoints → our models, and back: GigaPath's slide encoder, LongViT, causal language models."""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from longnet.model.blocks import LongNetPreTrainedModel
from longnet.model.configuration import LongNetConfig, PositionEmbedding
from longnet.model.heads import LongNetForCausalLM
from longnet.model.images import SEGMENTS, LongNetForImageClassification, LongNetImageConfig, LongNetImageModel
from longnet.model.slides import (
    LongNetForSlideClassification,
    LongNetSlideConfig,
    LongNetSlideModel,
    segments_for,
)
from longnet.model.tails import TailKind
from longnet.model.weights import load_config, load_folder, read_weights, refuse_broken, refuse_no_floats

_Model = TypeVar("_Model", bound=LongNetPreTrainedModel)
_Config = TypeVar("_Config", bound=LongNetConfig)

_HEADS, _MAX_WSI_SIZE, _TILE_SIZE = 16, 262_144, 256  # the authors'
_RATES = (1, 2, 4, 8, 16)
_LAYER = re.compile(r"(.*?)layers\.(\d+)\.(.*)")
# Inside a layer: theirs, ours; the first that fits counts.
_OF_LAYER = (
    ("self_attn.out_proj.", "self_attn.o_proj."),
    ("self_attn.inner_attn_ln.", "self_attn.sub_layernorm."),
    ("self_attn_layer_norm.", "input_layernorm."),
    ("final_layer_norm.", "post_attention_layernorm."),
    ("ffn.ffn_layernorm.", "mlp.sub_layernorm."),
    ("ffn.", "mlp."),
)
# Outside: theirs, ours, of each kind of model.
_OF_MODEL: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    LongNetSlideModel: (
        ("patch_embed.proj.", "patch_embed."),
        ("encoder.layer_norm.", "layer_norm."),
        ("encoder.layers.", "layers."),
    ),
    LongNetForSlideClassification: (
        ("slide_encoder.patch_embed.proj.", "slides.patch_embed."),
        ("slide_encoder.encoder.layer_norm.", "slides.layer_norm."),
        ("slide_encoder.encoder.layers.", "slides.layers."),
        ("slide_encoder.", "slides."),
        ("classifier.0.", "classifier."),
    ),
    LongNetImageModel: (("patch_embed.proj.", "patch_embed."), ("encoder.layers.", "layers.")),
    LongNetForImageClassification: (
        ("backbone.patch_embed.proj.", "images.patch_embed."),
        ("backbone.encoder.layers.", "images.layers."),
        ("backbone.", "images."),
    ),
    LongNetForCausalLM: (
        ("embed_tokens.", "model.embed_tokens."),
        ("embed_positions.", "model.embed_positions."),
        ("layers.", "model.layers."),
        ("layer_norm.", "model.norm."),
        ("output_projection.", "lm_head."),
    ),
}


def load_gigapath(
    path: str | Path,
    num_heads: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    max_wsi_size: int | None = None,
    tile_size: int | None = None,
    tail: TailKind | None = None,
    classifier_layers: Sequence[int] = (11,),
) -> LongNetSlideModel | LongNetForSlideClassification:
    """Load prov-gigapath's slide encoder (LongNetViT), in eval mode.

    Widths and depth are read off the shapes; nothing else is in the file. Every tensor must find its place.

    Args:
        path: `slide_encoder.pth`, a .safetensors file with its names, or a folder that `save_pretrained` or
            `longnet convert` wrote, which knows its own settings; given ones replace them.
        num_heads: query heads of a file; 16 when None.
        segment_lengths: w_i in tiles; from max_wsi_size and tile_size when None, as the authors do
            (`longnet.model.slides.segments_for`).
        dilation_rates: r_i; 1, 2, 4, 8, 16 when None.
        max_wsi_size: side of the largest slide, in pixels, in place of segment_lengths; 262,144 when None.
        tile_size: pixels of level 0 of a tile; 256 when None.
        tail: `"torchscale"`, as the published weights were trained, and the default, or `"exact"`.
        classifier_layers: of a fine-tuned file, the entries of `layer_embeddings` that its classifier reads.

    Returns:
        The encoder; with its classifier where the file holds one.

    Raises:
        ValueError: tensors that are missing, left over, of the wrong shape or not finite, each named; a file that holds
            no slide encoder; other heads than a folder's, segment_lengths and max_wsi_size.
        FileNotFoundError: no such file.
    """
    replaced: dict[str, Any] = {}
    if segment_lengths is not None:
        if max_wsi_size is not None:
            raise ValueError("max_wsi_size makes the segment lengths: give it or segment_lengths")
        replaced["segment_lengths"] = tuple(segment_lengths)
    if dilation_rates is not None:
        replaced["dilation_rates"] = tuple(dilation_rates)
    if tail is not None:
        replaced["tail"] = tail
    if Path(path).is_dir():
        config = _config_in(path, LongNetSlideConfig)
        _refuse_other_heads(path, config, num_heads)
        if tile_size is not None:
            replaced["tile_size"] = tile_size
        if max_wsi_size is not None:
            replaced["segment_lengths"] = segments_for(
                max_wsi_size, config.tile_size if tile_size is None else tile_size
            )
        kind = LongNetForSlideClassification if _holds(config, LongNetForSlideClassification) else LongNetSlideModel
        return load_folder(kind, path, **replaced)  # type: ignore[no-any-return]
    num_heads = _HEADS if num_heads is None else num_heads
    tile_size = _TILE_SIZE if tile_size is None else tile_size
    max_wsi_size = _MAX_WSI_SIZE if max_wsi_size is None else max_wsi_size
    weights = read_weights(Path(path))
    prefix = "slide_encoder." if "slide_encoder.cls_token" in weights else ""
    embed = _need(weights, f"{prefix}patch_embed.proj.weight", "(width, feature width)", path)
    fc1 = _need(weights, f"{prefix}encoder.layers.0.ffn.fc1.weight", "(feed-forward width, width)", path)
    fields: dict[str, Any] = {
        "feature_size": embed.shape[1],
        "hidden_size": embed.shape[0],
        "num_hidden_layers": _depth(weights, path),
        "num_attention_heads": num_heads,
        "intermediate_size": fc1.shape[0],
        "tile_size": tile_size,
        "segment_lengths": segments_for(max_wsi_size, tile_size) if segment_lengths is None else segment_lengths,
        "dilation_rates": _RATES,
    }
    weights.pop(f"{prefix}pos_embed", None)  # the table, which a formula gives
    if not prefix:
        return _fill(LongNetSlideModel, {**fields, **replaced}, weights, path)
    head = _need(weights, "classifier.0.weight", "(labels, embeddings side by side)", path)
    if head.shape[1] != len(classifier_layers) * embed.shape[0]:
        raise ValueError(
            f"the classifier of {path} reads {head.shape[1] // embed.shape[0]} embeddings of {embed.shape[0]}, "
            f"{head.shape[1]} in all, and classifier_layers names {len(classifier_layers)}: give those of its training"
        )
    fields |= {**replaced, "classifier_layers": tuple(classifier_layers), "num_labels": head.shape[0]}
    return _fill(LongNetForSlideClassification, fields, weights, path)


def _refuse_other_heads(path: str | Path, config: LongNetConfig, num_heads: int | None) -> None:
    if num_heads not in (None, config.num_attention_heads):
        raise ValueError(f"{path} is of {config.num_attention_heads} heads, got num_heads={num_heads}: leave it out")


def load_longvit(
    path: str | Path,
    num_heads: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    tail: TailKind | None = None,
) -> LongNetImageModel | LongNetForImageClassification:
    """Load torchscale's LongViT, in eval mode; with its classifier where the file holds one.

    Args:
        path: its checkpoint, or a folder that `save_pretrained` or `longnet convert` wrote.
        num_heads: query heads of a file; 16 when None.
        segment_lengths: w_i in patches; those of the image size (`longnet.model.images.SEGMENTS`) when None.
        dilation_rates: r_i; 1, 2, 4, 8, 16 when None.
        tail: `"torchscale"`, as the published weights were trained, and the default, or `"exact"`.

    Raises:
        ValueError: tensors that are missing, left over, of the wrong shape, or not finite, each named; an image size
            whose segments are unknown.
        FileNotFoundError: no such file.
    """
    replaced: dict[str, Any] = {}
    if segment_lengths is not None:
        replaced["segment_lengths"] = tuple(segment_lengths)
    if dilation_rates is not None:
        replaced["dilation_rates"] = tuple(dilation_rates)
    if tail is not None:
        replaced["tail"] = tail
    if Path(path).is_dir():
        config = _config_in(path, LongNetImageConfig)
        _refuse_other_heads(path, config, num_heads)
        kind = LongNetForImageClassification if _holds(config, LongNetForImageClassification) else LongNetImageModel
        return load_folder(kind, path, **replaced)  # type: ignore[no-any-return]
    weights = {name.removeprefix("module."): weight for name, weight in read_weights(Path(path)).items()}
    has_head = "head.weight" in weights
    if has_head and "pos_embed" in weights:
        weights = {
            name if name.startswith(("fc_norm.", "head.")) else f"backbone.{name}": weight
            for name, weight in weights.items()
        }
    elif not has_head:
        weights = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
    prefix = "backbone." if has_head else ""
    embed = _need(weights, f"{prefix}patch_embed.proj.weight", "(width, channels, side, side)", path)
    patches = _need(weights, f"{prefix}pos_embed", "(1, patches, width)", path).shape[1]
    fc1 = _need(weights, f"{prefix}encoder.layers.0.ffn.fc1.weight", "(feed-forward width, width)", path)
    size = math.isqrt(patches) * embed.shape[2]
    if segment_lengths is None:
        if size not in SEGMENTS:
            raise ValueError(
                f"{path} is for images of {size} pixels, whose segments are unknown (known: {list(SEGMENTS)}): give "
                "segment_lengths and dilation_rates"
            )
        replaced["segment_lengths"] = SEGMENTS[size]
    fields: dict[str, Any] = {
        "image_size": size,
        "patch_size": embed.shape[2],
        "num_channels": embed.shape[1],
        "hidden_size": embed.shape[0],
        "num_hidden_layers": _depth(weights, path),
        "num_attention_heads": _HEADS if num_heads is None else num_heads,
        "intermediate_size": fc1.shape[0],
        "dilation_rates": _RATES,
        **replaced,
    }
    if not has_head:
        return _fill(LongNetImageModel, fields, weights, path)
    fields["num_labels"] = _need(weights, "head.weight", "(labels, width)", path).shape[0]
    return _fill(LongNetForImageClassification, fields, weights, path)


def load_torchscale_lm(
    path: str | Path,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    deepnorm: bool | None = None,
    scale_embedding: bool = False,
    sinusoidal: bool = False,
    xpos_scale_base: float = 512.0,
    pad_token_id: int | None = 1,
    eos_token_id: int | None = None,
    hidden_act: str = "gelu",
    layer_norm_eps: float = 1e-5,
) -> LongNetForCausalLM:
    """Load a causal language model of torchscale's LongNetDecoder, in eval mode.

    Sub-LayerNorms, LayerNorms behind the sublayers (their files then have no last `layer_norm`), xPos, learned
    positions, tied heads and widths are read off the tensors. Their xPos turns neighbouring components of a head, ours
    component i with i + D / 2: the rows of q and k are reordered.

    Args:
        path: .pt, .pth or .safetensors; fairseq's prefix `decoder.` is taken off.
        num_heads: query heads.
        segment_lengths: w_i, in tokens.
        dilation_rates: r_i.
        deepnorm: DeepNorm's factor (2L)^¼ on what goes past a sublayer (arXiv:2203.00555 §4), or 1 where False. No
            tensor tells, so that it must be said of files without sub-LayerNorms; those with them have none.
        scale_embedding: embeddings × √C, fairseq's default (`no_scale_embedding` switches it off); no tensor tells.
        sinusoidal: fairseq's sinusoidal positions, which are not stored.
        xpos_scale_base: tokens over which xPos decays.
        pad_token_id: of the vocabulary; fairseq's is 1, and positions are counted from the one after it.
        eos_token_id: token that ends generation; fairseq's is 2.
        hidden_act: torchscale's `activation_fn`; no tensor tells, nor the next.
        layer_norm_eps: torchscale's `layernorm_eps`.

    Raises:
        ValueError: tensors that are missing, left over, of the wrong shape, or not finite, each named; deepnorm where
            it must be said, or cannot be.
        FileNotFoundError: no such file.
    """
    weights = {name.removeprefix("decoder."): weight for name, weight in read_weights(Path(path)).items()}
    embed = _need(weights, "embed_tokens.weight", "(tokens, width)", path)
    fc1 = _need(weights, "layers.0.ffn.fc1.weight", "(feed-forward width, width)", path)
    has_xpos = any(name.endswith("xpos.scale") for name in weights)
    weights = {
        name: weight
        for name, weight in weights.items()
        if not name.endswith(("xpos.scale", "version", "_float_tensor"))
    }
    has_sublayernorm = "layers.0.ffn.ffn_layernorm.weight" in weights
    _check_deepnorm(deepnorm, path, layers=_depth(weights, path), has_sublayernorm=has_sublayernorm)
    head = weights.get("output_projection.weight")
    is_tied = head is None or _equal(head, embed)
    if is_tied:
        weights.pop("output_projection.weight", None)
    learned = None
    if "embed_positions.weight" in weights:
        learned = _need(weights, "embed_positions.weight", "(positions, width)", path)
    first = 0 if pad_token_id is None else pad_token_id + 1
    longest = max(segment_lengths) if learned is None else learned.shape[0] - first
    kind: PositionEmbedding = "sinusoidal" if sinusoidal else "none"
    if has_xpos or learned is not None:
        kind = "xpos" if has_xpos else "learned"
    fields = {
        "vocab_size": embed.shape[0],
        "hidden_size": embed.shape[1],
        "num_hidden_layers": _depth(weights, path),
        "num_attention_heads": num_heads,
        "intermediate_size": fc1.shape[0],
        "max_position_embeddings": longest,
        "segment_lengths": tuple(segment_lengths),
        "dilation_rates": tuple(dilation_rates),
        "head_offsets": "block",
        "position_embedding": kind,
        "first_position": first if kind in ("learned", "sinusoidal") else 0,
        "embedding_scale": math.sqrt(embed.shape[1]) if scale_embedding else 1.0,
        "sub_layernorm": has_sublayernorm,
        "deepnorm": bool(deepnorm),
        "post_layernorm": not has_sublayernorm and "layer_norm.weight" not in weights,
        "xpos_scale_base": xpos_scale_base,
        "hidden_act": hidden_act,
        "layer_norm_eps": layer_norm_eps,
        "tie_word_embeddings": is_tied,
        "pad_token_id": pad_token_id,
        "eos_token_id": eos_token_id,
    }
    return _fill(LongNetForCausalLM, fields, weights, path)


def to_torchscale(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model under torchscale's names, in torchscale's layout; what the loaders read.

    Args:
        model: one that a loader of this module returned, or of its kind.

    Raises:
        TypeError: another kind of model.
    """
    kind = next((kind for kind in _OF_MODEL if type(model) is kind), None)
    if kind is None:
        raise TypeError(
            f"torchscale has no format for {type(model).__name__}: one of {[kind.__name__ for kind in _OF_MODEL]}"
        )
    weights = {}
    config: Any = model.config
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            weight = model.get_parameter("model.embed_tokens.weight").detach()  # noqa: PLW2901
        theirs = _renamed(name, [(ours, theirs) for theirs, ours in _OF_MODEL[kind]], [(b, a) for a, b in _OF_LAYER])
        weights[theirs] = _reordered(theirs, weight, config, back=True)
    if config.position_embedding == "xpos":
        half = torch.arange(0, config.head_dim, 2)
        for layer in range(config.num_hidden_layers):
            scale = (half + 0.4 * config.head_dim) / (1.4 * config.head_dim)
            weights[f"layers.{layer}.self_attn.xpos.scale"] = scale
    return weights


def _fill(kind: type[_Model], fields: dict[str, Any], weights: dict[str, Tensor], path: str | Path) -> _Model:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if heads < 1 or width % heads:
        raise ValueError(
            f"{path} is {width} wide, which num_heads={heads} does not divide: give the number of its heads"
        )
    try:
        config = cast("type[LongNetConfig]", kind.config_class)(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):  # made without memory, then given the file's tensors
        model = kind(config)
    named = {_renamed(name, _OF_MODEL[kind], _OF_LAYER): (name, weight) for name, weight in weights.items()}
    wanted = model.state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    complaints = [f"missing {name}" for name in wanted if name not in named]
    complaints += [f"left over {theirs}" for name, (theirs, _) in named.items() if name not in wanted]
    complaints += [
        f"{theirs} is {tuple(weight.shape)} where {tuple(wanted[name].shape)} is expected"
        for name, (theirs, weight) in named.items()
        if name in wanted and wanted[name].shape != weight.shape
    ]
    if complaints:
        more = f" and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise ValueError(f"{path} does not fit {kind.__name__}: {'; '.join(complaints[:8])}{more}")
    refuse_no_floats(path, weights.items())
    refuse_broken(path, weights.items())
    dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights.values()))  # of one kind inside
    filled = {name: _reordered(theirs, weight, config).to(dtype) for name, (theirs, weight) in named.items()}
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train(mode=False)
    return model


def _renamed(name: str, of_model: Iterable[tuple[str, str]], of_layer: Iterable[tuple[str, str]]) -> str:
    for before, after in of_model:
        if name.startswith(before):
            name = after + name[len(before) :]
            break
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    inside = layer[3]
    for before, after in of_layer:
        if inside.startswith(before):
            inside = after + inside[len(before) :]
            break
    return f"{layer[1]}layers.{layer[2]}.{inside}"


def _reordered(name: str, weight: Tensor, config: LongNetConfig, *, back: bool = False) -> Tensor:
    if config.position_embedding != "xpos" or not re.search(r"self_attn\.[qk]_proj\.", name):
        return weight
    half = (config.head_dim or 0) // 2
    pairs = (2, half) if back else (half, 2)  # (head, pair, 2) ↔ (head, 2, pair)
    by_head = weight.reshape(-1, *pairs, *weight.shape[1:])
    return by_head.transpose(1, 2).flatten(0, 2).contiguous()


def _depth(weights: dict[str, Tensor], path: str | Path) -> int:
    found = {int(layer[2]) for layer in map(_LAYER.fullmatch, weights) if layer}
    missing = set(range(len(found))) - found
    if missing:
        raise ValueError(
            f"{path} holds {len(found)} layers, up to layer {max(found)}, and none is layer {min(missing)}"
        )
    return len(found)


def _need(weights: dict[str, Tensor], name: str, shape: str, path: str | Path) -> Tensor:
    """Return a tensor that the widths are read off, which must have as many axes as `shape` names."""
    if name not in weights:
        raise ValueError(f"{path} holds no {name}: is it another model's? It begins with {sorted(weights)[:4]}")
    weight = weights[name]
    if weight.ndim != shape.count(",") + 1 or not weight.numel():
        raise ValueError(f"{path} holds a {name} of shape {tuple(weight.shape)} where {shape} is expected")
    return weight


def _check_deepnorm(deepnorm: bool | None, path: str | Path, *, layers: int, has_sublayernorm: bool) -> None:
    if deepnorm and has_sublayernorm:
        raise ValueError(f"{path} has sub-LayerNorms, and torchscale has DeepNorm without them: leave deepnorm out")
    if deepnorm is None and not has_sublayernorm:
        raise ValueError(
            f"{path} has no sub-LayerNorms, so it may have DeepNorm, which no tensor tells: give deepnorm=True "
            f"(--deepnorm: what goes past a sublayer is scaled by (2·{layers})^¼ = {(2 * layers) ** 0.25:.4g}) or "
            "deepnorm=False (--no-deepnorm: by 1), as it was trained"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout) and bool((a == b).all())


def _config_in(folder: str | Path, kind: type[_Config]) -> _Config:
    config = load_config(folder)
    if not isinstance(config, kind):
        raise ValueError(f"{folder} holds a model of type {config.model_type!r}, where {kind.model_type!r} is expected")
    return config


def _holds(config: LongNetConfig, kind: type[nn.Module]) -> bool:
    return kind.__name__ in (config.architectures or [])
