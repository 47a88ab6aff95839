"""Dilated attention in one launch, forward: all branches, any strides, one softmax.

A program owns a block of positions of one (batch row, query head), so nothing is atomic and results are the same at
every run. It walks the branches, and of each the segments that its block meets; of those it takes the branch's query
rows, ROWS at a time, and goes on with the online softmax where earlier branches left it, in ACC and LSE. The branch
that every query is in comes last, and writes OUT.

The keys of a segment lie in up to three places, its *sources*: 0, before the tensors at hand, in the halo; 1, at hand;
2, after them, in the halo again (`longnet.attention.halo`). A launch takes the sources that it is told to.

Names: `u` counts from a segment's start, `p` from a document's; `at_` indexes a tensor.
"""

import triton
import triton.language as tl


@triton.jit
def rows_between(low, high, offset, rate):
    """Return the first and one past the last i with low ≤ offset + i · rate < high."""
    return tl.maximum(low - offset + rate - 1, 0) // rate, tl.maximum(high - offset + rate - 1, 0) // rate


@triton.jit
def count_rows(positions, offset, rate, most):
    """Return how many kept rows a segment, which has `most` of them, has before so many positions."""
    return tl.minimum(tl.maximum(positions - offset + rate - 1, 0) // rate, most)


@triton.jit
def rows_of(source, absent, at_hand, n_keys, end):
    """Return the first and one past the last kept row of a segment that a source has."""
    low = tl.where(source == 0, absent, tl.where(source == 1, at_hand, n_keys))
    return low, tl.where(source == 0, at_hand, tl.where(source == 1, n_keys, end))


@triton.jit
def locate(source, x, x_t, halo, halo_t, offset, rate, place):
    """Return where a source has row 0 of a segment, at hand from `x` on or in the halo at `place`, and the next row."""
    first = tl.where(source == 1, x + offset * x_t, halo + place.to(tl.int64) * halo_t)
    return first, tl.where(source == 1, rate.to(tl.int64) * x_t, halo_t)


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
    acc, m, total, q, u_q, k_base, v_base, k_step, v_step, offset, rate, end, start, stop, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold the kept keys start … stop − 1, before `end`, of a segment into acc [ROWS, DP], m and total [ROWS]."""
    for j in range(start, stop, KEYS):
        key = j + tl.arange(0, KEYS)
        k = load_rows(k_base, key, k_step, key < end, D, DP, MASKED)
        v = load_rows(v_base, key, v_step, key < end, D, DP, MASKED)
        if UPCAST:  # the interpreter holds bfloat16 as uint16, and multiplies those
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            ok = (key < end)[None, :]
            if CAUSAL:
                ok = ok & ((offset + key * rate)[None, :] <= u_q[:, None])
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


# A kernel is compiled anew where an integer is 1, or a multiple of 16, and was none; it has no use for that of a count.
@triton.jit(do_not_specialize=["N", "covering", "H", "G", "TQ", "skipped", "block", "is_more"])
def attend(
    Q, K, V, HK, HV, SINKS, OUT, ACC, LSE, BRANCHES, OFFSETS, PLACES, WORK,
    N, covering, H, G, TQ, skipped, block, is_more, scale_log2,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, hk_b, hk_h, hk_t, hv_b, hv_h, hv_t, o_b, o_h, o_t, s_b, s_h, s_t,
    CAUSAL: tl.constexpr, HAS_SINKS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of all documents, query heads).

    WORK (blocks, 6): batch row, document's start and stop, first position of the block in the document, how many of the
    document's positions never existed, and how many follow its stop. BRANCHES (N, 4): length, rate, distance of its
    query rows, how many rows of a segment it keeps at most. OFFSETS (N, G). PLACES (N, 2): where HK and HV have its
    rows from before and from after what is at hand.
    covering: the last branch, if every query is in it; else −1. is_more: OUT and LSE have what other keys gave.
    The sources are FROM, FROM + STEP … below TO.
    """
    h = tl.program_id(1)
    g = h // (H // G)
    work = WORK + 6 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_block = tl.load(work + 2) - doc, tl.load(work + 3)
    unborn, beyond = tl.load(work + 4), tl.load(work + 5)
    p_hand = tl.maximum(unborn, -doc)
    p_low = tl.maximum(tl.maximum(p_block, skipped - doc), p_hand)
    p_high = tl.minimum(p_block + block, tokens)
    # Positions of the document, p, lie at doc + p among the keys and at doc − skipped + p among the queries.
    q_doc, k_doc = (doc - skipped).to(tl.int64), doc.to(tl.int64)
    q_base, out_base = (
        Q + b * q_b + h.to(tl.int64) * q_h + q_doc * q_t,
        OUT + b * o_b + h.to(tl.int64) * o_h + q_doc * o_t,
    )
    k_base, v_base = K + b * k_b + g.to(tl.int64) * k_h + k_doc * k_t, V + b * v_b + g.to(tl.int64) * v_h + k_doc * v_t
    hk_base, hv_base = HK + b * hk_b + g.to(tl.int64) * hk_h, HV + b * hv_b + g.to(tl.int64) * hv_h
    slot = (b * H + h) * TQ + q_doc
    lse_base, acc_base = LSE + slot, ACC + slot * D
    sink_base = SINKS
    if HAS_SINKS:
        sink_base += b * s_b + h.to(tl.int64) * s_h + q_doc * s_t
    for start in range(p_low, p_high, ROWS):
        p = start + tl.arange(0, ROWS)
        live = p < p_high
        if is_more:
            tl.store(lse_base + p, tl.load(lse_base + p, mask=live, other=0.0) * 1.4426950408889634, mask=live)
            store_rows(acc_base, p, D, load_rows(out_base, p, o_t, live, D, DP, True), live, D, DP)
        else:
            tl.store(lse_base + p, tl.full([ROWS], float("-inf"), tl.float32), mask=live)
    tl.debug_barrier()
    for branch in range(N):
        length, rate = tl.load(BRANCHES + 4 * branch), tl.load(BRANCHES + 4 * branch + 1)
        q_rate, most = tl.load(BRANCHES + 4 * branch + 2), tl.load(BRANCHES + 4 * branch + 3)
        offset = tl.load(OFFSETS + branch * G + g)
        q_offset = tl.where(q_rate == rate, offset, 0)
        for segment in range(p_low // length, (p_high + length - 1) // length):
            base = segment * length
            positions = tl.minimum(length, tokens - base)
            absent = count_rows(unborn - base, offset, rate, most)
            at_hand = count_rows(p_hand - base, offset, rate, most)
            n_keys = count_rows(positions, offset, rate, most)
            end = count_rows(tl.minimum(length, tokens + beyond - base), offset, rate, most)
            low, high = rows_between(
                tl.maximum(p_low - base, 0), tl.minimum(p_high - base, positions), q_offset, q_rate
            )
            for source in range(FROM, TO, STEP):
                first, last = rows_of(source, absent, at_hand, n_keys, end)
                place = tl.load(PLACES + 2 * branch + source // 2) - tl.where(source == 2, positions // rate, 0)
                k_first, k_step = locate(
                    source, k_base + base.to(tl.int64) * k_t, k_t, hk_base, hk_t, offset, rate, place
                )
                v_first, v_step = locate(
                    source, v_base + base.to(tl.int64) * v_t, v_t, hv_base, hv_t, offset, rate, place
                )
                is_last = source + STEP >= TO
                some_end = tl.where((first < last) | is_last, high, low)
                for start in range(low, some_end, ROWS):
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
                    visible, all_see = end, end  # rows that the last query sees, and the first one
                    if CAUSAL:
                        u_first = q_offset + start * q_rate
                        u_last = q_offset + (tl.minimum(start + ROWS, high) - 1) * q_rate
                        visible = tl.maximum(u_last - offset + rate, 0) // rate
                        all_see = tl.maximum(u_first - offset + rate, 0) // rate
                    full = first + tl.maximum(tl.minimum(last, all_see) - first, 0) // KEYS * KEYS
                    acc, m, total = see_keys(
                        acc, m, total, q, u_q, k_first, v_first, k_step, v_step, offset, rate, last,
                        first, full, scale_log2, CAUSAL, False, KEYS, D, DP, UPCAST,
                    )  # fmt: skip
                    acc, m, total = see_keys(
                        acc, m, total, q, u_q, k_first, v_first, k_step, v_step, offset, rate, last,
                        full, tl.minimum(last, visible), scale_log2, CAUSAL, True, KEYS, D, DP, UPCAST,
                    )  # fmt: skip
                    some = total > 0.0
                    lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
                    acc = acc / tl.where(some, total, 1.0)[:, None]
                    if (branch == covering) & is_last:
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
