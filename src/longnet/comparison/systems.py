"""The systems that are compared: one model with another attention each, at matched cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from longnet.attention.pattern import DilationPattern
from longnet.attention.sparse_fixed import SparseFixedPattern
from longnet.model.configuration import LongNetConfig

SYSTEMS: dict[str, str] = {
    "sdpa": "Transformer",
    "window": "Window",
    "sparse_fixed": "Sparse Transformer",
    "dilated": "LongNet",
}


def check_systems(systems: Sequence[str], name: str) -> None:
    """Refuse systems that there are not, and the same one twice.

    Args:
        systems: names of SYSTEMS, or patterns as `DilationPattern.parse` reads them.
        name: of the setting, for the error.

    Raises:
        ValueError: one that is neither, or a pattern with a shift.
    """
    if not systems or len(set(systems)) != len(systems):
        raise ValueError(f"{name} must be different values, at least one, got {list(systems)}")
    for system in systems:
        if system in SYSTEMS:
            continue
        try:
            pattern = DilationPattern.parse(system)
            if pattern.offset_shift:
                raise ValueError("a model shifts offsets by layer, not all alike: leave out shift")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must be {', '.join(map(repr, SYSTEMS))}, or patterns like '64:1,512:8;all', got {system!r}: "
                f"{error}"
            ) from None


def title_of(system: str) -> str:
    """Return a system's name for people."""
    return SYSTEMS.get(system) or f"{SYSTEMS[kind_of(system)]} {system}"


def name_of(system: str) -> str:
    """Return a system's name for files."""
    return system.replace(":", "x").replace(",", "_").replace(";", "-")


@functools.cache
def kind_of(system: str) -> str:
    """Return which of SYSTEMS a system is: a pattern is a LongNet, or a window if it has one branch that keeps all."""
    if system in SYSTEMS:
        return system
    pattern = DilationPattern.parse(system)
    return "window" if pattern.dilation_rates == (1,) and not pattern.global_tokens else "dilated"


def order_of(system: str) -> tuple[int, str]:
    """Return a key that sorts systems as SYSTEMS does, LongNets by their patterns."""
    return list(SYSTEMS).index(kind_of(system)), system


def fields_of(system: str, config: LongNetConfig, *, tokens: int, sparse_block: int | None = None) -> dict[str, Any]:
    """Return the fields of a recipe's `[model]` that make a model this system.

    Args:
        system: a name of SYSTEMS, or a pattern.
        config: of LongNet, whose pattern the window and the Sparse Transformer match in FLOPs.
        tokens: at this length.
        sparse_block: of the Sparse Transformer; see `matching_pattern`.

    Raises:
        ValueError: no fixed pattern costs what LongNet's does.
    """
    if system == "window":
        return {"attention": "dilated", **_branches(matching_window(config, tokens))}
    if system == "sparse_fixed":
        sparse = matching_pattern(config, tokens, sparse_block)
        fields = {"sparse_block": sparse.block, "sparse_summary": sparse.summary, "sparse_stride": sparse.stride}
        return {"attention": "sparse_fixed", **fields}
    if system in SYSTEMS:
        return {"attention": system}
    return {"attention": "dilated", **_branches(DilationPattern.parse(system))}


def _branches(pattern: DilationPattern) -> dict[str, Any]:
    names = ("segment_lengths", "dilation_rates", "head_offsets", "queries", "global_tokens")
    return {name: getattr(pattern, name) for name in names}


def matching_window(config: LongNetConfig, tokens: int) -> DilationPattern:
    """Return blocks alone, one branch of rate 1, whose causal FLOPs come nearest to those of the dilated pattern.

    Args:
        config: with the dilated pattern.
        tokens: at this length.
    """
    sizes: dict[str, Any] = {"tokens": tokens, "num_heads": config.num_key_value_heads or 1, "head_dim": 1}
    wanted = config.pattern.flops(**sizes, is_causal=True)
    low, high = 1, tokens  # the cost grows with the block
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _blocks(middle).flops(**sizes, is_causal=True) < wanted else (low, middle)
    return min(
        (_blocks(size) for size in (max(1, low - 1), low)),
        key=lambda blocks: abs(blocks.flops(**sizes, is_causal=True) - wanted),
    )


def _blocks(size: int) -> DilationPattern:
    return DilationPattern((size,), (1,))


def matching_pattern(config: LongNetConfig, tokens: int, block: int | None) -> SparseFixedPattern:
    """Return a fixed pattern whose causal FLOPs are those of the dilated one, or near (arXiv:2307.02486 §4.1).

    The stride is the block, as in the paper, where that comes within 5 %; else one of its doublings that does, or that
    comes nearest: at lengths of many blocks a summary of each would cost more than dilated attention in all.

    Args:
        config: with the dilated pattern.
        tokens: at this length.
        block: of the fixed pattern; the shortest segment when None. Halved where no pattern comes within a fifth.

    Raises:
        ValueError: none does.
    """
    heads = config.num_key_value_heads or 1
    wanted = config.pattern.flops(tokens=tokens, num_heads=heads, head_dim=1, is_causal=True)

    def cost(pattern: SparseFixedPattern) -> int:
        return pattern.flops(tokens=tokens, num_heads=heads, head_dim=1)

    def distance(pattern: SparseFixedPattern) -> float:
        return abs(cost(pattern) / wanted - 1)

    first = size = block or min(config.segment_lengths)
    while size:
        found, stride = [], size
        while stride <= tokens:
            one, two = (cost(SparseFixedPattern(size, summary, stride)) for summary in (1, min(2, stride)))
            summary = 1 + round((wanted - one) / (two - one)) if two > one else 1
            found.append(SparseFixedPattern(size, min(stride, max(1, summary)), stride))
            if distance(found[-1]) <= 0.05:
                return found[-1]
            stride *= 2
        if found and distance(min(found, key=distance)) <= 0.2:
            return min(found, key=distance)
        size //= 2
    raise ValueError(
        f"no fixed pattern of blocks of up to {first} tokens costs within a fifth of what {config.pattern} does at "
        f"{tokens:,} tokens; attention to all tokens may cost less: leave the cell out with compare.cells"
    )
