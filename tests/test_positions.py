"""RoPE and xPos against mpmath, from position 0 to 10¹²."""

import math
import random

import mpmath
import pytest
import torch

from longnet.positions import RotaryPositions, rotate, xpos_span

HALF_ULP = 2**-24  # a cosine rounded once to float32 errs by at most this
BFLOAT16_EPS = 2**-8
DOT_PRODUCT = 2e-6  # relative to the sum of the terms' sizes, float32

PERIOD = 32768  # of the paper's segments
FAR = 10**9 // PERIOD * PERIOD


def positions(head_dim=64, theta=10_000.0, xpos_scale_base=None, max_position_embeddings=32768):
    return RotaryPositions(
        head_dim, theta, xpos_scale_base=xpos_scale_base, max_position_embeddings=max_position_embeddings
    )


def drawn(limit, count=12):
    return [0, 1, limit - 1, *(random.Random(limit).randrange(limit) for _ in range(count))]


@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (500_000.0, 128), (1e6, 2), (1.0, 6)])
@pytest.mark.parametrize("limit", [100, 2**24 + 2, 10**9, 2**33, 10**12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_angles_are_exact_to_the_last_bit(theta, head_dim, limit, dtype):
    chosen = drawn(limit)
    rotation, _ = positions(head_dim, theta)(torch.tensor([chosen]), dtype=dtype)
    assert rotation.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The reduction itself errs by 2^-65 turns a position.
    allowed = (1e-15 if dtype == torch.float64 else HALF_ULP) + limit * 2**-65 * 2 * math.pi * 1.01
    with mpmath.workdps(50):
        for row, m in enumerate(chosen):
            for i in range(head_dim // 2):
                angle = m * mpmath.mpf(theta) ** (mpmath.mpf(-2 * i) / head_dim)
                assert abs(rotation.cos[0, 0, row, i].item() - mpmath.cos(angle)) <= allowed
                assert abs(rotation.sin[0, 0, row, i].item() - mpmath.sin(angle)) <= allowed


def test_float32_positions_would_be_wrong():
    """The fault that exact reduction is here for: angles of a float32 position, past 2^24."""
    m = 10**9 + 7
    right, _ = positions()(torch.tensor([[m]]), dtype=torch.float32)
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2).float() / 64)
    assert ((torch.tensor(float(m)) * frequencies).cos() - right.cos[0, 0, 0]).abs().max() > 0.5


def test_casting_the_module_changes_nothing():
    module, m = positions(xpos_scale_base=512.0), torch.tensor([[0, 5, 10**9]])
    before = module(m, dtype=torch.float32, period=PERIOD)
    for cast in (module.bfloat16, module.half, module.double):
        for got, kept in zip(cast()(m, dtype=torch.float32, period=PERIOD), before, strict=True):
            assert torch.equal(got.cos, kept.cos)
            assert torch.equal(got.sin, kept.sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_scores_are_relative_at_a_billion(dtype):
    q, k = torch.randn(1, 1, 1, 64).to(dtype), torch.randn(1, 1, 1, 64).to(dtype)
    for m, n in [(10**9 + 123, 10**9 - 4567), (10**9, 10**9), (2**33 + 1, 3)]:
        module = positions()
        turned_q = rotate(q, module(torch.tensor([[m]]), dtype=dtype)[0])
        turned_k = rotate(k, module(torch.tensor([[n]]), dtype=dtype)[1])
        assert turned_q.dtype == dtype
        exact, size = relative_score(q, k, m - n, None)
        rounding = DOT_PRODUCT if dtype == torch.float32 else BFLOAT16_EPS
        assert abs((turned_q.double() * turned_k.double()).sum().item() - exact) <= rounding * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, PERIOD, FAR])
def test_xpos_scores_decay_exactly_within_a_block_at_any_position(dtype, start):
    module = positions(xpos_scale_base=512.0)
    q, k = torch.randn(1, 1, 1, 64).to(dtype), torch.randn(1, 1, 1, 64).to(dtype)
    for m, n in [(0, 0), (1, 0), (700, 13), (PERIOD - 1, PERIOD - 2), (PERIOD - 1, 20_000), (PERIOD - 1, 0)]:
        module.refuse_beyond(start + m, dtype=dtype, period=PERIOD)
        turned_q = rotate(q, module(torch.tensor([[start + m]]), dtype=dtype, period=PERIOD)[0])
        turned_k = rotate(k, module(torch.tensor([[start + n]]), dtype=dtype, period=PERIOD)[1])
        assert turned_q.isfinite().all()
        assert turned_k.isfinite().all()
        exact, size = relative_score(q, k, m - n, 512.0)
        rounding = 4e-6 if dtype == torch.float32 else BFLOAT16_EPS
        assert abs((turned_q.double() * turned_k.double()).sum().item() - exact) <= rounding * size


def test_xpos_scores_in_float32_do_not_overflow_even_where_they_are_masked():
    """Kernels that mask by adding −inf compute the scores of later keys first, which xPos blows up."""
    module, ends = positions(xpos_scale_base=512.0), torch.tensor([[0, PERIOD - 1]])
    q, k = module(ends, dtype=torch.float32, period=PERIOD)
    later = rotate(torch.full((1, 1, 2, 64), 8.0), q) @ rotate(torch.full((1, 1, 2, 64), 8.0), k).mT
    assert later.isfinite().all()
    assert later.abs().max() > 1e30  # it is indeed near the edge


@pytest.mark.parametrize("period", [None, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_xpos_with_one_centre_serves_its_span_and_refuses_the_rest(dtype, period):
    span = xpos_span(512.0, dtype)
    assert span == {torch.float32: 32_861, torch.bfloat16: 32_859, torch.float16: 1_132}[dtype]
    module = positions(xpos_scale_base=512.0, max_position_embeddings=10**6)
    q, k = module(torch.tensor([[0, span - 2]]), dtype=dtype, period=period)
    for rotation in (q, k):
        assert rotate(torch.ones(1, 1, 2, 64, dtype=dtype), rotation).isfinite().all()
    module.refuse_beyond(span - 2, dtype=dtype, period=period)
    with pytest.raises(ValueError, match="overflows"):
        module.refuse_beyond(span + 2, dtype=dtype, period=period)
    beyond, _ = module(torch.tensor([[span + 2]]), dtype=dtype, period=period)
    assert beyond.cos.isnan().all()  # where a compiled graph cannot raise, it does not go on in silence


def test_the_refusal_says_what_to_do():
    module = positions(xpos_scale_base=512.0, max_position_embeddings=2048)
    with pytest.raises(ValueError, match=r"served as long as .* and there are no global tokens"):
        module.refuse_beyond(30_000, dtype=torch.float32)
    with pytest.raises(ValueError, match="max_position_embeddings of at least 30001"):
        module.refuse_beyond(30_000, dtype=torch.float32)
    positions(xpos_scale_base=512.0, max_position_embeddings=30_001).refuse_beyond(30_000, dtype=torch.float32)
    with pytest.raises(ValueError, match="xpos_scale_base of at least") as refusal:
        module.refuse_beyond(10**6, dtype=torch.float32)
    base = int(str(refusal.value).split("at least ")[1].split(",")[0])
    positions(xpos_scale_base=base, max_position_embeddings=10**6 + 1).refuse_beyond(10**6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 instead"):
        module.refuse_beyond(30_000, dtype=torch.float16)


def test_the_centre_does_not_change_the_model():
    q, k = torch.randn(1, 2, 300, 32, dtype=torch.float64), torch.randn(1, 2, 300, 32, dtype=torch.float64)
    m = torch.arange(300)[None]
    scores = []
    for limit, period in [(300, None), (30_000, None), (300, 300), (300, 1024)]:
        rotations = positions(32, xpos_scale_base=64.0, max_position_embeddings=limit)(m, dtype=q.dtype, period=period)
        scores.append((rotate(q, rotations[0]) @ rotate(k, rotations[1]).mT).tril())
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-9, rtol=1e-9)


def relative_score(q, k, distance, scale_base):
    """Σ_i ζ_i^(distance / scale_base) Re(q_i conj(k_i) e^(i·distance·θ_i)), and Σ_i of its sizes, by mpmath."""
    q, k, half = q.double().flatten(), k.double().flatten(), q.shape[-1] // 2
    score = size = mpmath.mpf(0)
    with mpmath.workdps(50):
        for i in range(half):
            angle = distance * mpmath.mpf(10_000) ** (mpmath.mpf(-i) / half)
            zeta = (mpmath.mpf(i) / half + mpmath.mpf("0.4")) / mpmath.mpf("1.4")
            decay = zeta ** (mpmath.mpf(distance) / scale_base) if scale_base else mpmath.mpf(1)
            pair_q = mpmath.mpc(q[i].item(), q[i + half].item())
            pair_k = mpmath.mpc(k[i].item(), k[i + half].item())
            score += decay * mpmath.re(pair_q * mpmath.conj(pair_k) * mpmath.expj(angle))
            size += decay * abs(pair_q) * abs(pair_k)
    return score, size
