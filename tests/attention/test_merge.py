import torch

from longnet.attention.merge import merge_
from tolerances import FLOAT64


def test_merging_parts_is_the_softmax_of_their_union():
    scores, values = 9 * torch.randn(5, 30, dtype=torch.float64), torch.randn(5, 30, 4, dtype=torch.float64)
    out, lse = torch.zeros(5, 4, dtype=torch.float64), torch.full((5,), -torch.inf, dtype=torch.float64)
    for part in torch.arange(30).split([1, 7, 20, 2]):
        weights = scores[:, part].softmax(-1)
        tile_out = torch.einsum("rk,rkd->rd", weights, values[:, part])
        merge_(out, lse, tile_out, scores[:, part].logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("rk,rkd->rd", scores.softmax(-1), values), atol=FLOAT64, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=FLOAT64, rtol=0)


def test_the_first_part_over_nothing_is_taken_as_it_is():
    for lse_value in (0.0, -120.0, 120.0):  # an lse of 0 is a value like any other
        out, lse = torch.zeros(3, 2), torch.full((3,), -torch.inf)
        tile_out = torch.randn(3, 2)
        merge_(out, lse, tile_out, torch.full((3,), lse_value))
        assert torch.equal(out, tile_out)
        assert (lse == lse_value).all()


def test_low_precision_parts_are_merged_in_float32():
    parts = torch.randn(64, 10, 4).bfloat16()
    out, lse = torch.zeros(10, 4), torch.full((10,), -torch.inf)
    for part in parts:
        merge_(out, lse, part, torch.zeros(10))
    torch.testing.assert_close(out, parts.float().mean(0), atol=1e-6, rtol=0)
