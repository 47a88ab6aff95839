"""LongNet (arXiv:2307.02486): Transformers on very long sequences through dilated attention.

A name is imported when it is first asked for: the op and the layer need PyTorch alone, the models transformers. Where
transformers is used at all, it knows LongNet's models and attention implementations (`longnet.hook`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longnet import hook

if TYPE_CHECKING:
    from longnet.attention.dilated import dilated_attention
    from longnet.attention.pattern import DilationPattern
    from longnet.layer import DilatedSelfAttention
    from longnet.model import (
        DilatedCache,
        LongNetConfig,
        LongNetForCausalLM,
        LongNetForImageClassification,
        LongNetForMaskedLM,
        LongNetForQuestionAnswering,
        LongNetForSequenceClassification,
        LongNetForSlideClassification,
        LongNetForTokenClassification,
        LongNetImageConfig,
        LongNetImageModel,
        LongNetModel,
        LongNetSlideConfig,
        LongNetSlideModel,
        collate_slides,
        load_gigapath,
        load_longvit,
        load_torchscale_lm,
        sequence_parallel,
        use_dilated_attention,
    )

__version__ = "0.1.0"

__all__ = [
    "DilatedCache",
    "DilatedSelfAttention",
    "DilationPattern",
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
    "LongNetSlideConfig",
    "LongNetSlideModel",
    "collate_slides",
    "dilated_attention",
    "load_gigapath",
    "load_longvit",
    "load_torchscale_lm",
    "sequence_parallel",
    "use_dilated_attention",
]

_HOMES = {
    "DilatedCache": "longnet.model",
    "DilatedSelfAttention": "longnet.layer",
    "DilationPattern": "longnet.attention.pattern",
    "LongNetConfig": "longnet.model",
    "LongNetForCausalLM": "longnet.model",
    "LongNetForImageClassification": "longnet.model",
    "LongNetForMaskedLM": "longnet.model",
    "LongNetForQuestionAnswering": "longnet.model",
    "LongNetForSequenceClassification": "longnet.model",
    "LongNetForSlideClassification": "longnet.model",
    "LongNetForTokenClassification": "longnet.model",
    "LongNetImageConfig": "longnet.model",
    "LongNetImageModel": "longnet.model",
    "LongNetModel": "longnet.model",
    "LongNetSlideConfig": "longnet.model",
    "LongNetSlideModel": "longnet.model",
    "collate_slides": "longnet.model",
    "dilated_attention": "longnet.attention.dilated",
    "load_gigapath": "longnet.model",
    "load_longvit": "longnet.model",
    "load_torchscale_lm": "longnet.model",
    "sequence_parallel": "longnet.model",
    "use_dilated_attention": "longnet.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


hook.introduce()
