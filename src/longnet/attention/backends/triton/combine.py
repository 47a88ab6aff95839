"""The results of all tiles put together in one pass: each row is read where its kernel left it, and written once.

A row of the output is a softmax, or a sum, over as many parts as there are branches that keep it. Where a part's rows
lie, a table of addresses says, an entry for each segment and head, so nothing is copied and no sum lies in memory.
"""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import store_rows


@triton.jit
def combine(
    OUT, LSE, SINKS, LIKE, ENTRIES, LAYERS, BASES, WORK, n_layers, H,
    o_b, o_h, o_t, l_b, l_h, l_t, s_b, s_h, s_t,
    SOFTMAX: tl.constexpr, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS positions, heads).

    WORK (blocks, 5): batch row, document's start, its tokens, the block's first position in it, which document.
    LAYERS (n_layers, 2): a branch's length and rate; of a branch whose rows have several parts there are several.
    BASES (documents, n_layers): where its entries begin, one for each segment and head. ENTRIES (n, 6): address of the
    part's first row and distance of its rows in elements, the same of its log-sum-exp, the first row's position in the
    document, how many there are. LIKE: of the parts' dtype. LSE and SINKS are those of the softmax.
    """
    h = tl.program_id(1)
    work = WORK + 5 * tl.program_id(0)
    b, doc, tokens = tl.load(work).to(tl.int64), tl.load(work + 1), tl.load(work + 2)
    p, document = tl.load(work + 3) + tl.arange(0, ROWS), tl.load(work + 4)
    live = p < tokens
    d = tl.arange(0, DP)
    acc = tl.zeros([ROWS, DP], tl.float32)
    m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for layer in range(n_layers):
        length, rate = tl.load(LAYERS + 2 * layer), tl.load(LAYERS + 2 * layer + 1)
        base = tl.load(BASES + document * n_layers + layer)
        entry = ENTRIES + 6 * (base + p // length * H + h).to(tl.int64)
        inside = p - tl.load(entry + 4, mask=live, other=0).to(tl.int32)
        row = inside // rate
        there = live & (inside >= 0) & (inside % rate == 0) & (row < tl.load(entry + 5, mask=live, other=0))
        at = tl.load(entry, mask=there, other=0).to(LIKE.dtype)
        at += row.to(tl.int64) * tl.load(entry + 1, mask=there, other=0)
        at = tl.multiple_of(at, 16)  # of bytes
        part = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if SOFTMAX:
            lse_at = tl.load(entry + 2, mask=there, other=0).to(LSE.dtype)
            lse_at += row.to(tl.int64) * tl.load(entry + 3, mask=there, other=0)
            lse = tl.load(lse_at, mask=there, other=float("-inf"))
            m_new = tl.maximum(m, lse)
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight, shrink = tl.exp(lse - finite), tl.exp(m - finite)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + part * weight[:, None]
            m = m_new
        else:
            acc += part
    at_row = (doc + p).to(tl.int64)
    if SOFTMAX:
        if HAS_SINKS:
            sink_at = SINKS + b * s_b + h.to(tl.int64) * s_h + at_row * s_t
            sink = tl.load(sink_at, mask=live, other=0.0).to(tl.float32)
            m_new = tl.maximum(m, sink)
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            shrink = tl.exp(m - finite)
            total = total * shrink + tl.exp(sink - finite)
            acc = acc * shrink[:, None]
            m = m_new
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        acc = acc / total[:, None]
        lse = tl.where(some, m + tl.log(total), float("-inf"))
        tl.store(LSE + b * l_b + h.to(tl.int64) * l_h + at_row * l_t, lse, mask=live)
    store_rows(OUT + b * o_b + h.to(tl.int64) * o_h, doc + p, o_t, acc, live, D, DP)
