"""A model to be timed, whose weights are random."""

from __future__ import annotations

import warnings

from longnet.model import LongNetConfig, LongNetForCausalLM


def random_model(config: LongNetConfig) -> LongNetForCausalLM:
    """Return a model that learns nothing: its pattern may have rates above its few heads, which costs the same.

    Such a model is warned of, since no head keeps some positions; what it costs is that of the paper's many heads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="in the branch .* no head keeps", category=UserWarning)
        return LongNetForCausalLM(config)
