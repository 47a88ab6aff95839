"""A tile's output folded into the rows so far, in one pass over memory where plain PyTorch takes seven launches."""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import load_rows, store_rows


@triton.jit(do_not_specialize=["count"])
def merge(
    OUT, LSE, PART, PART_LSE, count,
    o_b, o_h, o_t, l_b, l_h, l_t, p_b, p_h, p_t, m_b, m_h, m_t,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, heads, batch). OUT and LSE, float32, in place; a row whose LSE is −inf is taken over."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < count
    lse_at, part_at = LSE + b * l_b + h * l_h + row.to(tl.int64) * l_t, PART_LSE + b * m_b + h * m_h
    so_far = tl.load(lse_at, mask=live, other=0.0)
    newcomer = tl.load(part_at + row.to(tl.int64) * m_t, mask=live, other=0.0).to(tl.float32)
    most = tl.maximum(so_far, newcomer)
    total = most + tl.log(tl.exp(so_far - most) + tl.exp(newcomer - most))
    out_base = OUT + b * o_b + h * o_h
    part = load_rows(PART + b * p_b + h * p_h, row, p_t, live, D, DP, True).to(tl.float32)
    out = load_rows(out_base, row, o_t, live & (so_far > float("-inf")), D, DP, True)
    share = tl.exp(newcomer - total)
    store_rows(out_base, row, o_t, out + share[:, None] * (part - out), live, D, DP)
    tl.store(lse_at, total, mask=live)
