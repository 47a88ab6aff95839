import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention.reference import multiplicity


def kept(pattern, tokens, heads):
    """[branch][head] → the kept positions, from the definition."""
    return [
        [{p for p in range(tokens) if (p % w) % r == pattern.offset(r, g, heads)} for g in range(heads)]
        for w, r in pattern.branches
    ]


@given(patterns(), st.integers(0, 60), st.integers(1, 5), st.integers(1, 2), st.booleans())
def test_flops_count_every_pair(pattern, tokens, kv_heads, group, is_causal):
    positions = torch.arange(tokens)[None]
    count = multiplicity(positions, torch.zeros_like(positions), pattern, num_kv_heads=kv_heads, is_causal=is_causal)
    flops = pattern.flops(
        tokens=tokens, num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=7, is_causal=is_causal
    )
    assert flops == 4 * 7 * group * int(count.sum())


@given(patterns(), st.integers(1, 60), st.integers(1, 6))
def test_coverage_counts_positions_that_some_head_keeps(pattern, tokens, heads):
    shares = [len(set().union(*branch)) / tokens for branch in kept(pattern, tokens, heads)]
    assert pattern.coverage(tokens=tokens, num_kv_heads=heads) == pytest.approx(shares)


@given(patterns(), st.integers(1, 60))
def test_state_rows_are_the_most_that_a_current_segment_can_hold(pattern, tokens):
    rows = 0
    for branch, (w, r) in enumerate(pattern.branches):
        by_head = kept(pattern, tokens, r)[branch]  # r heads, so that one has each offset
        rows += max(len({p for p in head if p // w == now // w <= now}) for head in by_head for now in range(tokens))
    assert pattern.state_rows(tokens=tokens) == rows + min(pattern.global_tokens, tokens)


def hops_by_search(pattern, tokens):
    """Breadth-first search over the pairs themselves, every phase some head's."""
    p = torch.arange(tokens)
    joined = torch.eye(tokens, dtype=torch.bool)
    for w, r in pattern.branches:
        meet = ((p[:, None] % w) % r == (p % w) % r) | (pattern.queries == "all")
        joined |= (p[:, None] // w == p // w) & meet
    hops, reached = 0, torch.eye(tokens, dtype=torch.bool)
    while not reached.all():
        further = (reached.float() @ joined.float()) > 0
        if torch.equal(further, reached):
            return math.inf
        hops, reached = hops + 1, further
    return hops


@given(patterns(), st.integers(0, 40))
def test_hops_of_any_pattern(pattern, tokens):
    assert pattern.hops(tokens=tokens) == hops_by_search(pattern, tokens)


@pytest.mark.parametrize(("segment_length", "factor"), [(2, 2), (4, 2), (8, 2), (3, 3), (9, 3), (4, 4)])
def test_hops_of_geometric_patterns_in_closed_form(segment_length, factor):
    pattern = DilationPattern.geometric(segment_length, 100, factor)
    for tokens in (1, 2, 3, 5, 16, 31, 64, 81, 99, 100):
        assert pattern.hops(tokens=tokens) == hops_by_search(pattern, tokens)


def test_hops_grow_like_the_logarithm_of_the_length():
    # With 4 rows a segment a hop settles two of a position's bits: half of log2(tokens) hops, brute force included.
    for bits in range(2, 9):
        pattern = DilationPattern.geometric(4, 2**bits)
        assert pattern.hops(tokens=2**bits) == hops_by_search(pattern, 2**bits) == math.ceil(bits / 2)
    assert DilationPattern.geometric(4, 2**30).hops(tokens=2**30) == 15
    assert DilationPattern.geometric(2048, 2**30).hops(tokens=10**9) == 3
    assert DilationPattern.paper().hops(tokens=32768) == 2
    assert DilationPattern.paper().hops(tokens=32769) == math.inf


def test_hops_that_cannot_be_had_say_so():
    with pytest.raises(ValueError, match="no closed form for hops"):
        DilationPattern((2048, 3000), (1, 7)).hops(tokens=10**6)


@given(patterns(), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 12))
def test_grids_hold_each_head_once_with_its_offset(pattern, heads, before, after, rate):
    pattern = pattern.shard(before, before + heads + after)
    offsets = {}
    for grid in pattern.offset_grids(rate, heads):
        for i, j in itertools.product(range(grid.offsets), range(grid.heads)):
            head = grid.head + i * grid.offset_step + j * grid.head_step
            assert head not in offsets
            offsets[head] = grid.offset + i
    assert offsets == {head: pattern.offset(rate, head, heads) for head in range(heads)}
    assert all(0 <= offset < rate for offset in offsets.values())


@given(patterns())
def test_text_and_repr_read_back(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert DilationPattern.parse(str(pattern)) == pattern
        assert eval(repr(pattern)) == pattern  # noqa: S307
    assert hash(pattern) == hash(eval(repr(pattern))) if 1 in pattern.dilation_rates else True  # noqa: S307


@given(
    st.integers(2, 5000), st.integers(2, 40), st.sampled_from([0.1, 0.25, 0.6, 1.0]), st.sampled_from(["kept", "all"]),
    st.booleans(), st.sampled_from([0, 1]),
)  # fmt: skip
def test_a_recommended_pattern_keeps_to_its_budget_and_reaches_everything(
    tokens, heads, budget, queries, rotates, global_tokens
):
    def cost(pattern):
        return pattern.flops(tokens=tokens, num_heads=heads, head_dim=1, is_causal=True)

    try:
        pattern = DilationPattern.for_length(
            tokens, heads, budget=budget, queries=queries, rotate_offsets=rotates, global_tokens=global_tokens
        )
    except ValueError:
        assert budget < 1 or (global_tokens and tokens < 16)  # at 1 dense attention itself would do
        return
    assert pattern.global_tokens == global_tokens
    assert cost(pattern) <= budget * cost(DilationPattern((tokens,), (1,)))
    assert pattern.dilation_rates[0] == 1
    assert pattern.segment_lengths[-1] == tokens
    if not rotates:
        assert pattern.coverage(tokens=tokens, num_kv_heads=heads) == (1.0,) * len(pattern.branches)


def test_recommended_patterns():
    def of(*arguments, **options):
        return str(DilationPattern.for_length(*arguments, **options))

    assert of(512, 8) == "64:1,512:8;all"
    assert of(32768, 12) == "4096:1,32768:8;all"
    assert of(32768, 12, global_tokens=1) == "4096:1,32768:8;all;global=1"
    assert of(2**20, 8, budget=0.01, rotate_offsets=True) == "2048:1,16384:8,131072:64,1048576:512;all"
    with pytest.raises(ValueError, match=r"rates up to 2.* costs 0.26 .* some more than 1/2"):
        of(4096, 2)
    with pytest.raises(ValueError, match="for_length needs"):
        of(0, 2)


def test_known_patterns():
    assert str(DilationPattern.paper()) == "2048:1,4096:2,8192:4,16384:6,32768:12"
    assert str(DilationPattern.geometric(2048, 8192)) == "2048:1,4096:2,8192:4"
    billion = DilationPattern.geometric(2048, 2**30)
    assert len(billion.branches) == 20
    assert billion.branches[-1] == (2**30, 2**19)
    assert billion.state_rows(tokens=10**9) == 19 * 2048 + math.ceil(10**9 / 2**19)
    assert repr(DilationPattern((4,), (1,))) == ("DilationPattern(segment_lengths=(4,), dilation_rates=(1,))")
    assert DilationPattern([4, 8], [1, 2]) == DilationPattern((4, 8), (1, 2))


def test_block_offsets_are_torchscales():
    pattern = DilationPattern((8, 8), (1, 3), "block")
    assert [pattern.offset(3, head, 8) for head in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [pattern.shifted(2).offset(3, head, 8) for head in range(8)] == [2, 2, 2, 0, 0, 0, 1, 1]
    assert [pattern.shard(2, 8).offset(3, head, 3) for head in range(3)] == [0, 1, 1]
    assert [DilationPattern.paper().offset(12, head, 16) for head in (0, 11, 12, 15)] == [0, 11, 0, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), ()), ValueError, "at least one branch"),
        (((4, 8), (1,)), ValueError, "one dilation rate per segment length"),
        (((0,), (1,)), ValueError, "at least 1, got 0"),
        (((4,), (-1,)), ValueError, "at least 1, got -1"),
        (((4.0,), (1,)), TypeError, "must hold ints, got 4.0"),
        (((True,), (1,)), TypeError, "must hold ints, got True"),
        ((4, 1), TypeError, "must be a tuple of ints, got 4"),
        (((4, 4), (1, 1)), ValueError, "given twice"),
        (((4,), (1,), "modulo"), ValueError, "head_offsets must be one of"),
        (((4,), (1,), "mod", "some"), ValueError, "queries must be one of"),
        (((4,), (1,), "mod", "all", -1), ValueError, r"offset_shift must be at least 0 .* got -1"),
        (((4,), (1,), "mod", "all", 1.0), TypeError, "offset_shift must be an int, got 1.0"),
        (((4,), (1,), "mod", "all", 0, (4, 4)), ValueError, "head_shard must be"),
        (((4,), (1,), "mod", "all", 0, None, -1), ValueError, r"global_tokens must be at least 0 .* got -1"),
        (((4,), (1,), "mod", "all", 0, None, 2**63), ValueError, "global_tokens must be at least 0 and below 2"),
        (((4,), (1,), "mod", "all", 2**63), ValueError, "offset_shift must be at least 0 and below 2"),
        (((4,), (1,), "mod", "all", 0, None, True), TypeError, "global_tokens must be an int, got True"),
    ],
)
def test_wrong_patterns_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DilationPattern(*arguments)


@pytest.mark.parametrize(
    "text", ["", "4", "4:1,", "4:1:2", "a:b", "4:1;sideways", "4:1;shift=a", "4:1;global=-1", "0:1"]
)
def test_wrong_text_is_refused(text):
    with pytest.raises(ValueError, match=r"cannot read|at least 1"):
        DilationPattern.parse(text)


@pytest.mark.parametrize("arguments", [(0, 8, 2), (4, 0, 2), (4, 8, 1)])
def test_wrong_geometry_is_refused(arguments):
    with pytest.raises(ValueError, match="geometric needs"):
        DilationPattern.geometric(*arguments)


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        DilationPattern.paper().flops(tokens=8, num_heads=4, num_kv_heads=3, head_dim=8, is_causal=True)
    with pytest.raises(ValueError, match="coverage needs"):
        DilationPattern.paper().coverage(tokens=0, num_kv_heads=1)


def test_a_pattern_that_leaves_queries_out_warns():
    with pytest.warns(UserWarning, match="no branch of dilation rate 1"):
        DilationPattern((8,), (2,))


def test_every_phase_is_seen_where_heads_suffice():
    for rates in itertools.combinations((1, 2, 4, 6, 12), 3):
        pattern = DilationPattern((16, 32, 48), (1, *rates[1:]))
        assert pattern.coverage(tokens=480, num_kv_heads=12) == (1.0, 1.0, 1.0)
