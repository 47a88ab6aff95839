"""LongNet (arXiv:2307.02486): Transformers on very long sequences through dilated attention.

What needs transformers is imported when it is first asked for, so that the op needs PyTorch alone.
"""

from typing import TYPE_CHECKING, Any

from longnet.attention.dilated import dilated_attention
from longnet.attention.pattern import DilationPattern

if TYPE_CHECKING:
    from longnet.model import (
        DilatedCache,
        LongNetConfig,
        LongNetForCausalLM,
        LongNetModel,
        sequence_parallel,
        use_dilated_attention,
    )

__all__ = [
    "DilatedCache",
    "DilationPattern",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "dilated_attention",
    "sequence_parallel",
    "use_dilated_attention",
]

_OF_MODEL = {
    "DilatedCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "sequence_parallel",
    "use_dilated_attention",
}


def __getattr__(name: str) -> Any:
    if name not in _OF_MODEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longnet import model

    return getattr(model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_MODEL})
