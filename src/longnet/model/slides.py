"""The slide encoder: tile embeddings and their coordinates → an embedding of a whole slide (GigaPath's LongNetViT)."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from longnet.model.blocks import LongNetBlock, LongNetPreTrainedModel, see_both_ways
from longnet.model.configuration import LongNetConfig
from longnet.model.tails import TailKind
from longnet.positions import grid

Pool = Literal["mean", "cls"]

_FEW = 16  # tiles below which nothing is concluded from how they lie
_TILES_A_CELL = 5  # overlapping by half, tiles lie four to a cell of the grid


def segments_for(max_wsi_size: int, tile_size: int, branches: int = 5) -> tuple[int, ...]:
    """Return the segment lengths that GigaPath's authors derive from the largest slide, in tiles.

    Lengths 2^x for x evenly from 10 to int(log2((max_wsi_size // tile_size)²)), truncated.

    Args:
        max_wsi_size: side of the largest slide, in pixels.
        tile_size: side of a tile, in pixels.
        branches: how many.

    Raises:
        ValueError: a slide of fewer than 32 tiles a side.
    """
    side = max_wsi_size // tile_size if tile_size > 0 else 0
    if side < 32:
        raise ValueError(
            f"max_wsi_size must be at least 32 tiles of tile_size, got max_wsi_size={max_wsi_size}, "
            f"tile_size={tile_size}"
        )
    last = int(math.log2(side**2))
    return tuple(int(2 ** (10 + (last - 10) * i / (branches - 1))) for i in range(branches))


class LongNetSlideConfig(LongNetConfig):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Configuration of a slide encoder; the defaults are GigaPath's.

    Args:
        feature_size: width of the tile embeddings.
        tile_size: pixels of level 0 from one position to the next.
        grid_size: positions a side.
        head_norm_eps: added to the variance of the last LayerNorm, that of the pooled vector.
        classifier_layers: the entries of `layer_embeddings` that a classifier reads, side by side.
        classifier_pool: how they are pooled, `"mean"` or `"cls"`.
        **kwargs: `LongNetConfig`'s; num_labels is the classifier's.
    """

    model_type = "longnet_slides"

    feature_size: int = 1536
    tile_size: int = 256
    grid_size: int = 1000
    head_norm_eps: float = 1e-6
    classifier_layers: tuple[int, ...] = (11,)
    classifier_pool: Literal["mean", "cls"] = "mean"
    vocab_size: int = 1
    hidden_size: int = 768
    num_attention_heads: int = 16
    segment_lengths: tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: Literal["mod", "block"] = "block"
    is_causal: bool = False
    tail: TailKind = "torchscale"
    position_embedding: Literal["xpos", "rope", "learned", "sinusoidal", "none"] = "none"
    hidden_dropout: float = 0.25
    drop_path: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("feature_size", "tile_size", "grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.head_norm_eps < math.inf:
            raise ValueError(f"head_norm_eps must be above 0, got {self.head_norm_eps}")
        self.classifier_layers = tuple(self.classifier_layers)
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, for 2-D positions, got {self.hidden_size}")
        if self.is_causal or self.position_embedding != "none":
            raise ValueError("a slide encoder sees both ways, and its positions are those of the tiles' coordinates")


@dataclass
class SlideOutput(ModelOutput):
    """What a slide encoder says of a batch of slides.

    Attributes:
        pooled: (B, C), mean over the tiles, then LayerNorm.
        cls: (B, C), the CLS token's. GigaPath's authors say that it was not trained.
        last_hidden_state: (B, N, C), each tile in the context of its slide, after the encoder's LayerNorm.
        hidden_states: L + 1 of (B, N + 1, C), CLS first, before any LayerNorm; with output_hidden_states alone.
        padding_mask: (B, N) bool, as it was given.
    """

    pooled: Tensor = None  # type: ignore[assignment]  # transformers wants defaults
    cls: Tensor = None  # type: ignore[assignment]
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    padding_mask: Tensor | None = None


class LongNetSlideModel(LongNetPreTrainedModel):
    """Tile embeddings (B, N, C) and coordinates (B, N, 2) → a slide's embedding, and each tile's in its context."""

    config: LongNetSlideConfig
    base_model_prefix = "slides"
    main_input_name = "tile_embeds"

    def __init__(self, config: LongNetSlideConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Linear(config.feature_size, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(LongNetBlock(config, index) for index in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.head_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        tile_embeds: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> SlideOutput | tuple[Tensor, ...]:
        """Return the embeddings of slides and of their tiles.

        Args:
            tile_embeds: (B, N, feature_size), or (N, feature_size) of one slide; any float dtype.
            coords: (B, N, 2) or (N, 2), pixels of level 0 of each tile's corner, the order of the axes as in training
                (x first for GigaPath); integers, float32 or float64.
            padding_mask: (B, N) bool, true for real tiles, which come first; as `collate_slides` makes it.
            output_hidden_states: return the L + 1 states too.
            return_dict: False for a tuple.

        Returns:
            `SlideOutput`; of one slide without a batch its batch has size 1.

        Raises:
            ValueError: widths, shapes or coordinates that do not fit (`check_coordinates`), a slide without tiles.
        """
        states: list[Tensor] = []
        layer = SlideOutput()
        for layer in self.each_layer(tile_embeds, coords, padding_mask):  # the last remains
            if output_hidden_states:
                states += layer.hidden_states or ()
        output = self.final(layer)
        output.hidden_states = tuple(states) if output_hidden_states else None
        return output.to_tuple() if return_dict is False else output

    def layer_embeddings(
        self,
        tile_embeds: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None = None,
        *,
        pool: Pool = "mean",
    ) -> Tensor:
        """Return the slides' embedding after each layer, as the authors' `all_layer_embed` does.

        States are pooled as they come, without the encoder's LayerNorm, so that the last entry is not `forward`'s.

        Args:
            tile_embeds: as `forward`'s, and so the next two.
            coords: (B, N, 2) or (N, 2).
            padding_mask: (B, N) bool.
            pool: `"mean"` over tiles, or `"cls"`.

        Returns:
            (L + 1, B, C): entry 0 is of the embeddings, entry l of layer l. GigaPath's users take entry 11 of 13.
        """
        if pool not in ("mean", "cls"):
            raise ValueError(f'pool must be "mean" or "cls", got {pool!r}')
        name = "pooled" if pool == "mean" else "cls"
        return torch.stack([layer[name] for layer in self.each_layer(tile_embeds, coords, padding_mask)])

    def each_layer(
        self, tile_embeds: Tensor, coords: Tensor, padding_mask: Tensor | None = None
    ) -> Iterator[SlideOutput]:
        """Yield what the embeddings, and then each layer, say of the slides: L + 1 outputs, of which one is held.

        Args:
            tile_embeds: as `forward`'s, and so the next two.
            coords: (B, N, 2) or (N, 2).
            padding_mask: (B, N) bool.

        Yields:
            pooled and cls (B, C) as `layer_embeddings` has them; last_hidden_state (B, N, C) and the one of
            hidden_states (B, N + 1, C) as they leave the layer, without LayerNorm.
        """
        if tile_embeds.ndim == 2:
            tile_embeds, coords = tile_embeds[None], coords[None]
        rows, columns = self.check(tile_embeds, coords, padding_mask)
        weight = self.patch_embed.weight
        tiles = tile_embeds.to(weight.device, weight.dtype)
        if padding_mask is not None:  # what lies in padding is never read, NaN included
            padding_mask = padding_mask.to(weight.device)
            tiles = tiles.masked_fill(~padding_mask[..., None], 0)
        tiles = self.patch_embed(tiles)
        tiles = tiles + grid(rows.to(tiles.device), columns.to(tiles.device), self.config.hidden_size).to(tiles.dtype)
        hidden_states = torch.cat([self.cls_token.to(tiles.dtype).expand(len(tiles), -1, -1), tiles], dim=1)
        mask = None if padding_mask is None else nn.functional.pad(padding_mask, (1, 0), value=True)
        visible = see_both_ways(self.config, hidden_states, mask)
        hidden_states = self.dropout(hidden_states)
        yield self._output(hidden_states, padding_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **visible, rotations=None, cache=None, columns={})
            yield self._output(hidden_states, padding_mask)

    def final(self, last: SlideOutput) -> SlideOutput:
        """Return what `forward` returns, of the last output of `each_layer`."""
        (hidden_states,) = last.hidden_states or ()
        return self._output(self.layer_norm(hidden_states), last.padding_mask)

    def check(self, tile_embeds: Tensor, coords: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raise, or warn, of what `forward` would of a batch; return `check_coordinates`' rows and columns."""
        _check_shapes(self.config, tile_embeds, coords, padding_mask)
        return check_coordinates(self.config, coords, padding_mask)

    def _output(self, hidden_states: Tensor, padding_mask: Tensor | None) -> SlideOutput:
        return SlideOutput(
            pooled=self._pool(hidden_states, padding_mask, "mean"),
            cls=self._pool(hidden_states, padding_mask, "cls"),
            last_hidden_state=hidden_states[:, 1:],
            hidden_states=(hidden_states,),
            padding_mask=padding_mask,
        )

    def _pool(self, hidden_states: Tensor, padding_mask: Tensor | None, pool: Pool) -> Tensor:
        if pool == "cls":
            pooled = hidden_states[:, 0]
        elif padding_mask is None:
            pooled = hidden_states[:, 1:].mean(1)
        else:
            real = padding_mask[..., None]
            tiles = torch.where(real, hidden_states[:, 1:], 0)
            pooled = tiles.sum(1) / real.sum(1)
        return self.norm(pooled)  # type: ignore[no-any-return]


class LongNetForSlideClassification(LongNetPreTrainedModel):
    """One label a slide: a linear layer on the embeddings after some layers, as GigaPath's fine-tuning has it."""

    config: LongNetSlideConfig
    base_model_prefix = "slides"
    main_input_name = "tile_embeds"

    def __init__(self, config: LongNetSlideConfig) -> None:
        super().__init__(config)
        outside = [layer for layer in config.classifier_layers if not 0 <= layer <= config.num_hidden_layers]
        if outside or not config.classifier_layers:
            raise ValueError(
                f"classifier_layers must be entries 0 … {config.num_hidden_layers} of layer_embeddings, got "
                f"{config.classifier_layers}"
            )
        self.slides = LongNetSlideModel(config)
        self.classifier = nn.Linear(len(config.classifier_layers) * config.hidden_size, cast("int", config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, tile_embeds: Tensor, coords: Tensor, padding_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits (B, labels), and the cross entropy of `labels` (B,) where given; the rest as the encoder's."""
        layers = self.slides.layer_embeddings(tile_embeds, coords, padding_mask, pool=self.config.classifier_pool)
        logits = self.classifier(torch.cat([layers[layer] for layer in self.config.classifier_layers], -1))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def check_coordinates(
    config: LongNetSlideConfig, coords: Tensor, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the row and column of each tile in the grid of positions.

    Args:
        config: of the slide encoder.
        coords: (B, N, 2), pixels of level 0.
        padding_mask: (B, N) bool; padding gets (0, 0).

    Returns:
        floor(coords / tile_size) of the first and of the second axis, (B, N) int64 each, on the CPU.

    Raises:
        ValueError: half-precision coordinates, coordinates that are not finite or beyond the grid, tiles that nearly
            all share a few positions.
    """
    _refuse_half(coords)
    places = coords.detach().to("cpu", torch.float64)
    real = torch.ones(places.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask.cpu()
    places = torch.where(real[..., None], places, 0.0)
    if not bool(torch.isfinite(places).all()):
        raise ValueError("coords must be finite: some are infinite or NaN")
    cells = (places / config.tile_size).floor().to(torch.int64)
    reach = config.grid_size * config.tile_size
    if bool(((cells < 0) | (cells >= config.grid_size)).any()):
        raise ValueError(
            f"coords must lie in [0, {reach}) pixels, {config.grid_size} positions of tile_size={config.tile_size}, "
            f"got {places.amin().item():.0f} … {places.amax().item():.0f}: give pixels of level 0, or a larger "
            "tile_size where tiles lie further apart"
        )
    for row in range(len(cells)):
        _check_spread(config, places[row][real[row]], cells[row][real[row]])
    return cells[..., 0], cells[..., 1]


def _refuse_half(coords: Tensor) -> None:
    if coords.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"coords must be int64, float32 or float64, got {coords.dtype}, which cannot tell tiles apart: "
            "keep coordinates out of autocast and of model.half()"
        )


def _check_spread(config: LongNetSlideConfig, places: Tensor, cells: Tensor) -> None:
    tiles = len(cells)
    if tiles < _FEW:
        return
    index = cells[:, 0] * config.grid_size + cells[:, 1]
    occupied = len(torch.unique(index))
    if tiles >= _TILES_A_CELL * occupied:
        gaps = torch.cat([torch.unique(places[:, axis]).diff() for axis in (0, 1)])
        step = float(gaps.quantile(0.1)) if len(gaps) and len(gaps) < 2**20 else 0.0
        seems = "all the same"
        if step:
            seems = f"{step:g} apart where tile_size={config.tile_size} pixels of level 0 are expected"
        if 0.5 < step < 2:
            seems = f"positions in a grid, not pixels: multiply them by {config.tile_size}"
        elif 0 < step <= config.tile_size / 2:
            seems += (
                f", as in pixels of a level downsampled {config.tile_size / step:g} times: multiply them by that, or "
                f"set tile_size={max(1, round(step))}"
            )
        raise ValueError(f"the {tiles} tiles fall into {occupied} positions of the grid; coords seem to be {seems}")
    if not any(_is_sorted(x[:, axes]) for x in (cells, places) for axes in ([0, 1], [1, 0])):
        warnings.warn(
            "tiles are not in row-major order (by the first coordinate, then the second, or the other way about), and "
            "order decides which segments they share, hence the result: sort them as in training",
            stacklevel=2,
        )


def _is_sorted(places: Tensor) -> bool:
    first, second = places.diff(dim=0).unbind(1)
    return bool(((first > 0) | ((first == 0) & (second >= 0))).all())


def _check_shapes(config: LongNetSlideConfig, tiles: Tensor, coords: Tensor, padding_mask: Tensor | None) -> None:
    if tiles.ndim != 3 or not tiles.is_floating_point():
        raise ValueError(
            f"tile_embeds must be (batch, tiles, {config.feature_size}) floats, got {tuple(tiles.shape)} {tiles.dtype}"
        )
    if tiles.shape[2] != config.feature_size:
        raise ValueError(
            f"the slide encoder takes tile embeddings {config.feature_size} wide, got {tiles.shape[2]}: they are of "
            "another tile encoder"
        )
    if coords.shape != (*tiles.shape[:2], 2):
        raise ValueError(
            f"coords must be {(*tiles.shape[:2], 2)}, two a tile, got {tuple(coords.shape)} for tile_embeds "
            f"{tuple(tiles.shape)}"
        )
    if padding_mask is not None and (padding_mask.dtype != torch.bool or padding_mask.shape != tiles.shape[:2]):
        raise ValueError(
            f"padding_mask must be {tuple(tiles.shape[:2])} bool, true for real tiles, got "
            f"{tuple(padding_mask.shape)} {padding_mask.dtype}"
        )
    if not tiles.shape[1] or (padding_mask is not None and not bool(padding_mask[:, 0].all())):
        raise ValueError("every slide needs a tile, and real tiles come before padding; got a slide without, or late")


def collate_slides(slides: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad slides to one length, so that a batch gives what each slide gives alone.

    Args:
        slides: (tile_embeds (N, C), coords (N, 2)) of each, N ≥ 1 its own.

    Returns:
        tile_embeds (B, max N, C), coords (B, max N, 2), padding_mask (B, max N), for `LongNetSlideModel`.

    Raises:
        ValueError: no slide, or one without tiles, or with other widths.
    """
    if not slides:
        raise ValueError("collate_slides needs a slide, got none")
    for number, (tiles, coords) in enumerate(slides):
        if (
            tiles.ndim != 2
            or not len(tiles)
            or coords.shape != (len(tiles), 2)
            or tiles.shape[1] != len(slides[0][0].T)
        ):
            raise ValueError(
                f"slide {number} must be (tiles (N, {len(slides[0][0].T)}), coords (N, 2)) with N ≥ 1, got "
                f"{tuple(tiles.shape)}, {tuple(coords.shape)}"
            )
        _refuse_half(coords)
    if len({coords.dtype for _, coords in slides}) > 1:
        slides = [(tiles, coords.to(torch.float64)) for tiles, coords in slides]
    longest = max(len(tiles) for tiles, _ in slides)
    mask = torch.arange(longest) < torch.tensor([len(tiles) for tiles, _ in slides])[:, None]
    padded = [nn.utils.rnn.pad_sequence([slide[part] for slide in slides], batch_first=True) for part in (0, 1)]
    return {"tile_embeds": padded[0], "coords": padded[1], "padding_mask": mask.to(padded[0].device)}


AutoConfig.register("longnet_slides", LongNetSlideConfig, exist_ok=True)
AutoModel.register(LongNetSlideConfig, LongNetSlideModel, exist_ok=True)
