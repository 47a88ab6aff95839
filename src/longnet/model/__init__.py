"""LongNet in Hugging Face's terms. Importing this makes models and attention implementations known to transformers."""

from longnet.hook import name_in_transformers
from longnet.model import adapters, generation  # noqa: F401  # adapters keep patterns, generate() makes a DilatedCache
from longnet.model.blocks import LongNetPreTrainedModel
from longnet.model.cache import DilatedCache
from longnet.model.checkpoints import load_gigapath, load_longvit, load_torchscale_lm
from longnet.model.configuration import LongNetConfig
from longnet.model.heads import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
)
from longnet.model.images import LongNetForImageClassification, LongNetImageConfig, LongNetImageModel
from longnet.model.interface import use_dilated_attention, use_sparse_fixed_attention
from longnet.model.modeling import LongNetModel
from longnet.model.sequence_parallel import sequence_parallel
from longnet.model.slides import (
    LongNetForSlideClassification,
    LongNetSlideConfig,
    LongNetSlideModel,
    collate_slides,
)

__all__ = [
    "DilatedCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForImageClassification",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForSlideClassification",
    "LongNetForTokenClassification",
    "LongNetImageConfig",
    "LongNetImageModel",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "LongNetSlideConfig",
    "LongNetSlideModel",
    "collate_slides",
    "load_gigapath",
    "load_longvit",
    "load_torchscale_lm",
    "sequence_parallel",
    "use_dilated_attention",
    "use_sparse_fixed_attention",
]

# `transformers serve` looks the class of a checkpoint up by name in `transformers`.
name_in_transformers(
    value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, LongNetPreTrainedModel)
)
