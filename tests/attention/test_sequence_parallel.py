"""dilated_attention across real processes: what one device computes, with the traffic of the closed form."""

import pytest

from longnet.attention.sequence_parallel import group_of
from ranks import run_ranks

# Of the largest value. In bfloat16 either result is rounded, and a gradient once more for each rank that it comes from.
LIMITS = {"torch.float64": 1e-12, "torch.float32": 1e-6, "torch.bfloat16": 2**-6}


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks_and_results(request, tmp_path_factory):
    return request.param, run_ranks("parallel_checks:attention", request.param, tmp_path_factory.mktemp("ranks"))


def test_every_rank_computes_what_one_device_does(ranks_and_results):
    ranks, results = ranks_and_results
    assert len(results[0][0]) == 3 * 2 * 3 * (5 + 6)  # of all queries, the sinks' gradient too
    for worst, _ in results:
        for (dtype, *case), error in worst.items():
            limit = 0.0 if ranks == 1 else LIMITS[dtype]  # the tiles of one rank are those of no rank: bitwise
            if case[-1] == "dsinks":  # a sum over all queries whose terms have both signs: what is left is smaller
                limit *= 4
            assert error <= limit, (dtype, *case, error)


def test_traffic_is_the_closed_form(ranks_and_results):
    ranks, results = ranks_and_results
    back = [0] * 12
    for _, traffic in results:
        # The same rows travel whether all queries attend or those kept.
        assert [closed for _, closed, *_ in traffic[:6]] == [closed for _, closed, *_ in traffic[6:]]
        for index, (received, closed, sent_back, _) in enumerate(traffic):
            assert received == (closed if ranks > 1 else [])
            back[index] += sum(sent_back)
    # Backward every row's gradient goes home once.
    assert back == [sum(traffic[index][0][0] if ranks > 1 else 0 for _, traffic in results) for index in range(12)]


def test_rows_travel_while_local_branches_are_computed(ranks_and_results):
    ranks, results = ranks_and_results
    for _, traffic in results:
        for *_, order in traffic:
            told, *rest = order
            assert told == "_wait"  # how long the slices are
            if ranks == 1:
                assert "_exchange" not in order
                continue
            assert rest[:4] == ["_exchange", "attend_tiles", "_wait", "attend_tiles"]  # own tiles, the halo's
            assert rest[4:] == ["differentiate_tiles", "_exchange", "differentiate_tiles", "_wait"]  # the halo's, own


def test_what_does_not_fit_is_said_on_every_rank(tmp_path):
    for messages in run_ranks("parallel_checks:failures", 2, tmp_path):
        gaps, queries, backend = messages
        assert "side by side across all ranks" in gaps
        assert "as many queries as keys" in queries
        assert '"auto"' in backend


def test_a_mesh_has_one_axis():
    with pytest.raises(TypeError, match="DeviceMesh or a ProcessGroup"):
        group_of("sp")
