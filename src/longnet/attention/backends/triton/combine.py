"""The results of all tiles put together in one pass: each row is read where its kernel left it, and written once.

A row of the output is a softmax, or a sum, over as many parts as there are tiles that give to it, of each branch one or
two. Where a part's rows lie, a table of addresses says, an entry for each segment and head, and for each phase where a
branch's rows come phase by phase, so nothing is copied and no sum lies in memory.
"""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import load_rows, store_rows


@triton.jit(do_not_specialize=["n_layers", "H", "is_more"])
def combine(
    OUT, LSE, SINKS, LIKE, ENTRIES, LAYERS, BASES, WORK, n_layers, H, is_more,
    o_b, o_h, o_t, l_b, l_h, l_t, s_b, s_h, s_t,
    SOFTMAX: tl.constexpr, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS positions, heads).

    WORK (blocks, 5): batch row, a document's first position at hand, how many, the block's first of them, the document.
    LAYERS (n_layers, 2): distance of a branch's rows, and in how many phases they come; of a branch whose rows have
    several parts there are several. BASES (documents, n_layers, 3): where a layer's entries begin, one for each of the
    segments, heads and phases; the segments' length; how much of the first one lies before the document's positions.
    ENTRIES (n, 7): address of the part's row 0 of its segment, there or not, and distance of its rows in elements; the
    same of its log-sum-exp; the first row, one past the last, and their phase. LIKE: of the parts' dtype. LSE and SINKS
    are those of the softmax. is_more: OUT and LSE hold what earlier parts gave, and it counts.
    """
    h = tl.program_id(1)
    work = WORK + 5 * tl.program_id(0)
    b, first, count = tl.load(work).to(tl.int64), tl.load(work + 1), tl.load(work + 2)
    x, document = tl.load(work + 3) + tl.arange(0, ROWS), tl.load(work + 4)
    live = x < count
    d = tl.arange(0, DP)
    out, lse_row = OUT + b * o_b + h.to(tl.int64) * o_h, LSE + b * l_b + h.to(tl.int64) * l_h
    at_row = (first + x).to(tl.int64)
    more = live & (is_more != 0)
    acc = load_rows(out, first + x, o_t, more, D, DP, True).to(tl.float32)
    m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SOFTMAX:
        m = tl.load(lse_row + at_row * l_t, mask=more, other=float("-inf"))
        total = tl.where(m == float("-inf"), 0.0, 1.0)
    for layer in range(n_layers):
        rate, phases = tl.load(LAYERS + 2 * layer), tl.load(LAYERS + 2 * layer + 1)
        bases = BASES + 3 * (document * n_layers + layer)
        length, u = tl.load(bases + 1), x + tl.load(bases + 2)
        segment = u // length
        u -= segment * length
        row = u // rate
        phase = u - row * rate
        entry = tl.load(bases) + (segment * H + h) * phases + tl.where(phases > 1, phase, 0)
        entry = ENTRIES + 7 * entry.to(tl.int64)
        begin = tl.load(entry + 4, mask=live, other=0).to(tl.int32)
        end = tl.load(entry + 5, mask=live, other=0).to(tl.int32)
        of_phase = tl.load(entry + 6, mask=live, other=0).to(tl.int32)
        there = live & (phase == of_phase) & (row >= begin) & (row < end)
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
        acc *= (1.0 / total)[:, None]
        lse = tl.where(some, m + tl.log(total), float("-inf"))
        tl.store(lse_row + at_row * l_t, lse, mask=live)
    store_rows(out, first + x, o_t, acc, live, D, DP)
