"""LongViT: an image as one long sequence of patches (torchscale's examples/longvit), and its classifier."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import ModelOutput

from longnet.model.blocks import LongNetBlock, LongNetPreTrainedModel, see_both_ways
from longnet.model.configuration import LongNetConfig
from longnet.model.tails import TailKind

# Segment lengths by the side of the image that the model was trained on; the rates are 1, 2, 4, 8, 16.
SEGMENTS = {
    1024: (64, 128, 256, 512, 1024),
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}


class LongNetImageConfig(LongNetConfig):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Configuration of an image encoder; the defaults are LongViT's small one for images of 1,024 pixels.

    Args:
        image_size: side of the images of training, which the learned positions are for.
        patch_size: side of a patch.
        num_channels: of an image.
        **kwargs: `LongNetConfig`'s; num_labels is the classifier's.
    """

    model_type = "longnet_images"

    image_size: int = 1024
    patch_size: int = 32
    num_channels: int = 3
    vocab_size: int = 1
    hidden_size: int = 384
    num_attention_heads: int = 16
    segment_lengths: tuple[int, ...] = SEGMENTS[1024]
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    head_offsets: Literal["mod", "block"] = "block"
    is_causal: bool = False
    tail: TailKind = "torchscale"
    position_embedding: Literal["xpos", "rope", "learned", "sinusoidal", "none"] = "none"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("image_size", "patch_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.is_causal or self.position_embedding != "none":
            raise ValueError("an image encoder sees both ways, and its positions are those of the patches")


@dataclass
class ImageOutput(ModelOutput):
    """What an image encoder says.

    Attributes:
        last_hidden_state: (B, patches, C), row by row; no LayerNorm after the last layer.
        pooled: (B, C), their mean.
        hidden_states: L + 1 of (B, patches, C), with output_hidden_states alone.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]  # transformers wants defaults
    pooled: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None


class LongNetImageModel(LongNetPreTrainedModel):
    """Images (B, 3, height, width) → patches in context (B, patches, C)."""

    config: LongNetImageConfig
    base_model_prefix = "images"
    main_input_name = "pixel_values"

    def __init__(self, config: LongNetImageConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        side = config.image_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(LongNetBlock(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool = False) -> ImageOutput:
        """Return the patches in context.

        Args:
            pixel_values: (B, 3, height, width), both multiples of patch_size; positions are resized bicubically where
                they are not those of training.
            output_hidden_states: return the states of all layers.

        Raises:
            ValueError: an image of another shape.
        """
        config = self.config
        if (
            pixel_values.ndim != 4
            or pixel_values.shape[1] != config.num_channels
            or min(pixel_values.shape) < 1
            or any(side % config.patch_size for side in pixel_values.shape[2:])
        ):
            raise ValueError(
                f"pixel_values must be (batch, {config.num_channels}, height, width), both sides multiples of "
                f"patch_size={config.patch_size}, got {tuple(pixel_values.shape)}"
            )
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden_states = patches.flatten(2).transpose(1, 2) + self._positions(*patches.shape[2:])
        visible = see_both_ways(config, hidden_states, None)
        hidden_states = self.dropout(hidden_states)
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **visible, rotations=None, cache=None, columns={})
            if output_hidden_states:
                states.append(hidden_states)
        return ImageOutput(
            last_hidden_state=hidden_states,
            pooled=hidden_states.mean(1),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _positions(self, rows: int, columns: int) -> Tensor:
        side = self.config.image_size // self.config.patch_size
        if rows == columns == side:
            return self.pos_embed
        table = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        # A tenth of a patch more, as in training: it keeps floor(side · factor) from losing a row.
        factors = [(rows + 0.1) / side, (columns + 0.1) / side]
        resized = functional.interpolate(table, scale_factor=factors, mode="bicubic")
        return resized.permute(0, 2, 3, 1).flatten(1, 2)


class LongNetForImageClassification(LongNetPreTrainedModel):
    """The mean over the patches, a LayerNorm, a linear layer: LongViT's classifier."""

    config: LongNetImageConfig
    base_model_prefix = "images"
    main_input_name = "pixel_values"

    def __init__(self, config: LongNetImageConfig) -> None:
        super().__init__(config)
        self.images = LongNetImageModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, cast("int", config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return logits (B, labels), and the cross entropy of `labels` (B,) where given."""
        output = cast("ImageOutput", self.images(pixel_values))
        logits = self.head(self.fc_norm(output.pooled))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("longnet_images", LongNetImageConfig, exist_ok=True)
AutoModel.register(LongNetImageConfig, LongNetImageModel, exist_ok=True)
AutoModelForImageClassification.register(LongNetImageConfig, LongNetForImageClassification, exist_ok=True)
