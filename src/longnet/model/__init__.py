"""LongNet in Hugging Face's terms. Importing this makes models and attention implementations known to transformers."""

from longnet.model import generation  # noqa: F401  # generate() makes a DilatedCache
from longnet.model.cache import DilatedCache
from longnet.model.configuration import LongNetConfig
from longnet.model.interface import use_dilated_attention, use_sparse_fixed_attention
from longnet.model.modeling import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from longnet.model.sequence_parallel import sequence_parallel

__all__ = [
    "DilatedCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "sequence_parallel",
    "use_dilated_attention",
    "use_sparse_fixed_attention",
]
