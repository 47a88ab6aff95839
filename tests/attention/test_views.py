"""The tile plan against a count of pairs, and the folding of axes against plain indexing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention.plan import Run, plan, runs_of
from longnet.attention.reference import multiplicity
from longnet.attention.views import blocks


def pairs_of(tiles, batch, heads, kv_heads, queries, tokens, layout, max_rows):
    """Count how often each (query, key) pair is computed, by writing through the very views that kernels read."""
    shape_q, shape_k = (batch, heads, queries), (batch, kv_heads, tokens)
    q_ids = torch.arange(batch * heads * queries).view(shape_q)
    k_ids = torch.arange(batch * kv_heads * tokens).view(shape_k)
    if layout == "BTH":
        q_ids, k_ids = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q_ids, k_ids))
    count = torch.zeros(q_ids.numel(), k_ids.numel(), dtype=torch.int64)
    firsts = torch.zeros(q_ids.numel(), dtype=torch.int64)
    for tile in tiles:
        seen = 0
        for block in blocks(tile, (q_ids,), (k_ids,), max_rows):
            q, k = block.q(q_ids), block.kv(k_ids)
            assert q.shape[:2] == k.shape[:2]
            assert q.numel() <= max(max_rows, q.shape[1] * q.shape[2])
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            if tile.is_causal:
                causal = causal.tril()
            for i in range(q.shape[0]):
                for j in range(q.shape[1]):
                    count[q[i, j][:, None], k[i, j][None]] += causal
                    if block.q_first:
                        firsts[q[i, j]] += 1
            seen += q.shape[0] * q.shape[1] * int(causal.sum())
        assert tile.pairs == seen
    return count.view(*shape_q, *shape_k), firsts.view(shape_q)


@given(
    pattern=patterns(),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 2),
    tokens=st.integers(1, 30),
    is_causal=st.booleans(),
    layout=st.sampled_from(["BHT", "BTH"]),
    max_rows=st.sampled_from([1, 20, 2**31]),
    data=st.data(),
)
def test_the_plan_computes_each_pair_as_often_as_branches_see_it(
    pattern, batch, kv_heads, group, tokens, is_causal, layout, max_rows, data
):
    queries = data.draw(st.integers(1, tokens))
    heads = kv_heads * group
    tiles, is_complete = plan(
        pattern, runs=runs_of(None, batch, tokens), batch_size=batch, q_tokens=queries, k_tokens=tokens,
        num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal,
    )  # fmt: skip
    count, firsts = pairs_of(tiles, batch, heads, kv_heads, queries, tokens, layout, max_rows)
    positions = torch.arange(tokens)[None]
    expected = multiplicity(positions, torch.zeros_like(positions), pattern, num_kv_heads=kv_heads, is_causal=is_causal)
    for b in range(batch):
        for h in range(heads):
            for g in range(kv_heads):
                want = expected[0, g, tokens - queries :] if g == h // group else 0
                assert (count[b, h, :, b, g] == want).all()
    assert is_complete == (1 in pattern.dilation_rates)
    assert (firsts == int(is_complete)).all()


def test_heads_phases_and_segments_fold_into_few_calls():
    q = torch.empty(1, 4096, 12, 8).transpose(1, 2)

    def calls(text, x):
        tiles, _ = plan(
            DilationPattern.parse(text), runs=runs_of(None, x.shape[0], x.shape[2]), batch_size=x.shape[0],
            q_tokens=x.shape[2], k_tokens=x.shape[2], num_heads=x.shape[1], num_kv_heads=x.shape[1], is_causal=True,
        )  # fmt: skip
        return [len(list(blocks(tile, (x,), (x,), 2**31))) for tile in tiles]

    assert calls("512:1", q) == [1]  # segments × heads
    assert calls("512:1,1024:12", q) == [1, 1, 1]  # 12 phases of 85 or 86 rows, a head each, along the diagonal
    assert calls("512:1,1024:4", q) == [1, 3]  # segments × phases, a call for each of the 3 heads of a phase
    batch = torch.empty(4, 4096, 12, 8).transpose(1, 2)
    assert calls("512:1", batch) == [1]  # batch rows and segments are one stride apart
    assert calls("500:1", batch) == [4, 1]  # here they are not


def test_more_segments_than_a_cuda_grid_holds_are_cut():
    q = torch.empty(1, 1, 70_000, 8)
    tiles, _ = plan(
        DilationPattern((1,), (1,)), runs=(Run(0, 1, 0, 70_000),), batch_size=1, q_tokens=70_000, k_tokens=70_000,
        num_heads=1, num_kv_heads=1, is_causal=False,
    )  # fmt: skip
    assert [block.batch.size for block in blocks(tiles[0], (q,), (q,), 2**31)] == [65535, 4465]


def test_equal_neighbours_are_one_run():
    bounds = torch.tensor([[0, 0, 9], [1, 0, 9], [2, 4, 4], [3, 0, 9], [4, 1, 9]])
    assert runs_of(bounds, 5, 9) == (Run(0, 2, 0, 9), Run(3, 1, 0, 9), Run(4, 1, 1, 9))
    assert runs_of(None, 3, 7) == (Run(0, 3, 0, 7),)
    assert runs_of(None, 3, 0) == ()
