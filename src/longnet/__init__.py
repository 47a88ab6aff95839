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
        LongNetModel,
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
    "LongNetModel",
    "dilated_attention",
    "sequence_parallel",
    "use_dilated_attention",
]

_HOMES = {
    "DilatedCache": "longnet.model",
    "DilatedSelfAttention": "longnet.layer",
    "DilationPattern": "longnet.attention.pattern",
    "LongNetConfig": "longnet.model",
    "LongNetForCausalLM": "longnet.model",
    "LongNetModel": "longnet.model",
    "dilated_attention": "longnet.attention.dilated",
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
