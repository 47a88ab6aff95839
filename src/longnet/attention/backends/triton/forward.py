"""Dilated attention in one launch, forward: all branches, any strides, one softmax.

A program owns a block of positions of one (batch row, query head), so nothing is atomic and results are the same at
every run. It walks the branches, and of each the segments that its block meets; of those it takes the branch's query
rows, ROWS at a time, and goes on with the online softmax where earlier branches left it, in ACC and LSE. The branch
that every query is in comes last, and writes OUT.

Names: `u` counts from a segment's start, `p` from a document's; `at_` indexes a tensor.
"""

import triton
import triton.language as tl


@triton.jit
def rows_between(low, high, offset, rate):
    """Return the first and one past the last i with low ≤ offset + i · rate < high."""
    return tl.maximum(low - offset + rate - 1, 0) // rate, tl.maximum(high - offset + rate - 1, 0) // rate


@triton.jit
def load_rows(x, at, stride, live, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of D channels, as DP of them: [rows, DP]."""
    d = tl.arange(0, DP)
    where = x + at.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(where, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if D != DP:
        return tl.load(where, mask=(d < D)[None, :], other=0.0)
    return tl.load(where)


@triton.jit
def store_rows(x, at, stride, value, live, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    where = x + at.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(where, value.to(x.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def see_keys(
    acc, m, total, q, u_q, k_base, v_base, k_t, v_t, offset, rate, n_keys, start, stop, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold the kept keys start … stop − 1 of a segment into acc [ROWS, DP], m and total [ROWS]."""
    for j in range(start, stop, KEYS):
        key = j + tl.arange(0, KEYS)
        u_k = offset + key * rate
        k = load_rows(k_base, u_k, k_t, key < n_keys, D, DP, MASKED)
        v = load_rows(v_base, u_k, v_t, key < n_keys, D, DP, MASKED)
        if UPCAST:  # the interpreter holds bfloat16 as uint16, and multiplies those
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            ok = (key < n_keys)[None, :]
            if CAUSAL:
                ok = ok & (u_k[None, :] <= u_q[:, None])
            s = tl.where(ok, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new  # before the first key: none
        weights = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m - finite)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    return acc, m, total


@triton.jit
def add_sink(lse, sink):
    """Return the log-sum-exp with one more key, and the factor on the output; both logarithms to the base 2."""
    most = tl.maximum(lse, sink)
    finite = tl.where(most == float("-inf"), 0.0, most)
    with_sink = most + tl.log2(tl.where(most == float("-inf"), 1.0, tl.exp2(lse - finite) + tl.exp2(sink - finite)))
    return with_sink, tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - tl.where(lse == float("-inf"), 0.0, with_sink)))


@triton.jit
def finish(
    acc, lse, at, live, out_base, lse_base, sink_base, o_t, s_t,
    HAS_SINKS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write rows of the output, and their log-sum-exp to the base e."""
    if HAS_SINKS:
        sink = tl.load(sink_base + at.to(tl.int64) * s_t, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        lse, factor = add_sink(lse, sink)
        acc = acc * factor[:, None]
    store_rows(out_base, at, o_t, acc, live, D, DP)
    tl.store(lse_base + at, lse * 0.6931471805599453, mask=live)


@triton.jit
def attend(
    Q, K, V, SINKS, OUT, ACC, LSE, BRANCHES, OFFSETS, WORK,
    N, covering, H, G, TQ, skipped, block, scale_log2,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, s_b, s_h, s_t,
    CAUSAL: tl.constexpr, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of all documents, query heads).

    WORK (blocks, 4): batch row, document's start and stop, first position of the block in the document. BRANCHES
    (N, 3): length, rate, distance of its query rows. OFFSETS (N, G). covering: the last branch, if every query is in
    it; else −1.
    """
    h = tl.program_id(1)
    g = h // (H // G)
    work = WORK + 4 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_block = tl.load(work + 2) - doc, tl.load(work + 3)
    p_low = tl.maximum(p_block, skipped - doc)
    p_high = tl.minimum(p_block + block, tokens)
    # Positions of the document, p, lie at doc + p among the keys and at doc − skipped + p among the queries.
    q_doc, k_doc = (doc - skipped).to(tl.int64), doc.to(tl.int64)
    q_base, out_base = (
        Q + b * q_b + h.to(tl.int64) * q_h + q_doc * q_t,
        OUT + b * o_b + h.to(tl.int64) * o_h + q_doc * o_t,
    )
    k_base, v_base = K + b * k_b + g.to(tl.int64) * k_h + k_doc * k_t, V + b * v_b + g.to(tl.int64) * v_h + k_doc * v_t
    slot = (b * H + h) * TQ + q_doc
    lse_base, acc_base = LSE + slot, ACC + slot * D
    sink_base = SINKS
    if HAS_SINKS:
        sink_base += b * s_b + h.to(tl.int64) * s_h + q_doc * s_t
    for start in range(p_low, p_high, ROWS):
        p = start + tl.arange(0, ROWS)
        tl.store(lse_base + p, tl.full([ROWS], float("-inf"), tl.float32), mask=p < p_high)
    tl.debug_barrier()
    for branch in range(N):
        length, rate = tl.load(BRANCHES + 3 * branch), tl.load(BRANCHES + 3 * branch + 1)
        q_rate = tl.load(BRANCHES + 3 * branch + 2)
        offset = tl.load(OFFSETS + branch * G + g)
        q_offset = tl.where(q_rate == rate, offset, 0)
        for segment in range(p_low // length, (p_high + length - 1) // length):
            base = segment * length
            positions = tl.minimum(length, tokens - base)
            n_keys = (positions - offset + rate - 1) // rate
            low, high = rows_between(
                tl.maximum(p_low - base, 0), tl.minimum(p_high - base, positions), q_offset, q_rate
            )
            for start in range(low, high, ROWS):
                row = start + tl.arange(0, ROWS)
                live = row < high
                u_q = q_offset + row * q_rate
                p = base + u_q
                q = load_rows(q_base, p, q_t, live, D, DP, True)
                if UPCAST:
                    q = q.to(tl.float32)
                m = tl.load(lse_base + p, mask=live, other=float("-inf"))
                seen = m > float("-inf")
                acc = load_rows(acc_base, p, D, seen, D, DP, True)
                total = tl.where(seen, 1.0, 0.0)
                stop = n_keys
                full = n_keys // KEYS * KEYS
                if CAUSAL:
                    u_first = q_offset + start * q_rate
                    u_last = q_offset + (tl.minimum(start + ROWS, high) - 1) * q_rate
                    stop = tl.minimum(n_keys, tl.maximum(u_last - offset + rate, 0) // rate)
                    full = tl.minimum(full, tl.maximum(u_first - offset + rate, 0) // rate // KEYS * KEYS)
                acc, m, total = see_keys(
                    acc, m, total, q, u_q, k_base + base.to(tl.int64) * k_t, v_base + base.to(tl.int64) * v_t, k_t, v_t,
                    offset, rate, n_keys, 0, full, scale_log2,
                    CAUSAL, False, KEYS, D, DP, UPCAST,
                )  # fmt: skip
                acc, m, total = see_keys(
                    acc, m, total, q, u_q, k_base + base.to(tl.int64) * k_t, v_base + base.to(tl.int64) * v_t, k_t, v_t,
                    offset, rate, n_keys, full, stop, scale_log2,
                    CAUSAL, True, KEYS, D, DP, UPCAST,
                )  # fmt: skip
                some = total > 0.0
                lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
                acc = acc / tl.where(some, total, 1.0)[:, None]
                if branch == covering:
                    finish(acc, lse, p, live, out_base, lse_base, sink_base, o_t, s_t, HAS_SINKS, D, DP)
                else:
                    tl.store(lse_base + p, lse, mask=live)
                    store_rows(acc_base, p, D, acc, live, D, DP)
        tl.debug_barrier()  # other threads of this program read those rows next
    if covering < 0:
        for start in range(p_low, p_high, ROWS):
            p = start + tl.arange(0, ROWS)
            live = p < p_high
            lse = tl.load(lse_base + p, mask=live, other=float("-inf"))
            acc = load_rows(acc_base, p, D, lse > float("-inf"), D, DP, True)
            finish(acc, lse, p, live, out_base, lse_base, sink_base, o_t, s_t, HAS_SINKS, D, DP)
