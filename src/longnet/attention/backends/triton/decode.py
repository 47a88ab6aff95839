"""One token of each sequence against a streaming state, in one launch: its keys are kept, and its queries attend.

Positions lie on the device, and the launch moves them on, so that a CUDA graph of a step can be replayed. The rows of a
key/value head are shared out among programs; the last one to come to an end puts their results together, in their
order, so that results are the same at every run.
"""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import add_sink, count_rows, load_rows, see_keys, store_rows


@triton.jit(do_not_specialize=["N", "H", "G", "B", "splits"])
def decode(
    Q, K, V, STATE_K, STATE_V, SINKS, OUT, PART, PART_LSE, COUNTS, NEXT, FIRST, ACTIVE, BRANCHES, OFFSETS, EDGES,
    N, H, G, B, splits, scale_log2,
    q_b, q_h, k_b, k_h, v_b, v_h, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, o_b, o_h, s_b, s_h,
    HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, key/value heads, batch rows). The rows of a product are the query heads of a key/value head.

    NEXT and FIRST (B,): positions of the token and of the sequence's first one. ACTIVE (B,): 0 where a batch row has no
    token, which gives 0 and changes nothing. BRANCHES and OFFSETS as in `forward.attend`. EDGES (N, 2): a branch's
    first place in the state, and one past its last. PART (B, G, splits, H / G, D) and PART_LSE are scratch; COUNTS
    (B · G + B,) is 0 before and after a launch.
    """
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gg, group = g.to(tl.int64), H // G
    position, first = tl.load(NEXT + b), tl.load(FIRST + b)
    is_active = tl.load(ACTIVE + b) > 0
    member = tl.arange(0, ROWS)
    once = member * 0  # the token's row, for each row of a product: 16 bytes a load
    live = (member < group) & is_active
    q = load_rows(Q + b * q_b + gg * group * q_h, member, q_h, live, D, DP, True)
    k_new = load_rows(K + b * k_b + gg * k_h, once, k_h, live, D, DP, True)
    v_new = load_rows(V + b * v_b + gg * v_h, once, v_h, live, D, DP, True)
    if UPCAST:
        q = q.to(tl.float32)
    state_k, state_v = STATE_K + b * sk_b + gg * sk_h, STATE_V + b * sv_b + gg * sv_h
    acc = tl.zeros([ROWS, DP], tl.float32)
    m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    seen_anew = 0  # how many branches see the token's own key
    for branch in range(N):
        length, rate = tl.load(BRANCHES + 4 * branch), tl.load(BRANCHES + 4 * branch + 1)
        q_rate, most = tl.load(BRANCHES + 4 * branch + 2), tl.load(BRANCHES + 4 * branch + 3)
        offset = tl.load(OFFSETS + branch * G + g)
        low, high = tl.load(EDGES + 2 * branch), tl.load(EDGES + 2 * branch + 1)
        has_end = most == 2147483647  # of its rows there is no bound; else its segment is the document, of any length
        in_segment = tl.where(has_end, position % length, position)
        inside = tl.minimum(in_segment, 2147483647).to(tl.int32)
        is_kept = (inside % rate == offset) & (inside // rate < most)
        unborn = tl.minimum(tl.maximum(first - position + in_segment, 0), 2147483647).to(tl.int32)
        absent = count_rows(unborn, offset, rate, most)
        past = tl.minimum(count_rows(inside, offset, rate, most), high - low)
        place = low + inside // rate
        writes = is_kept & is_active & (split == 0) & (place < high)
        store_rows(state_k, place + once, sk_t, k_new, (member == 0) & writes, D, DP)
        store_rows(state_v, place + once, sv_t, v_new, (member == 0) & writes, D, DP)
        seen_anew += is_kept.to(tl.int32)
        sees = is_active & (is_kept | (q_rate != rate) | (rate == 1))
        share = ((past - absent + splits - 1) // splits + KEYS - 1) // KEYS * KEYS
        start = absent + split * share
        stop = tl.where(sees, tl.minimum(start + share, past), start)
        full = start + tl.maximum(stop - start, 0) // KEYS * KEYS
        k_base, v_base = state_k + low.to(tl.int64) * sk_t, state_v + low.to(tl.int64) * sv_t
        acc, m, total = see_keys(
            acc, m, total, q, member, k_base, v_base, sk_t, sv_t, offset, rate, stop, start, full, scale_log2,
            False, False, KEYS, D, DP, UPCAST,
        )  # fmt: skip
        acc, m, total = see_keys(
            acc, m, total, q, member, k_base, v_base, sk_t, sv_t, offset, rate, stop, full, stop, scale_log2,
            False, True, KEYS, D, DP, UPCAST,
        )  # fmt: skip
    own = tl.where(split == 0, seen_anew, 0).to(tl.float32)
    s = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale_log2 + tl.log2(tl.maximum(own, 1.0))
    s = tl.where(own > 0.0, s, float("-inf"))
    m_new = tl.maximum(m, s)
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight, shrink = tl.exp2(s - finite), tl.exp2(m - finite)
    total = total * shrink + weight
    acc = acc * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    slot = ((b * G + gg) * splits + split) * group
    store_rows(PART + slot * D, member, D, acc / total[:, None], member < group, D, DP)
    tl.store(PART_LSE + slot + member, tl.where(some, finite + tl.log2(total), float("-inf")), mask=member < group)
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(COUNTS + b * G + g, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        slot = (b * G + gg) * splits * group
        acc = tl.zeros([ROWS, DP], tl.float32)
        m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        for _ in range(splits):
            part_lse = tl.load(PART_LSE + slot + member, mask=member < group, other=float("-inf"))
            part = load_rows(PART + slot * D, member, D, member < group, D, DP, True)
            m_new = tl.maximum(m, part_lse)
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight, shrink = tl.exp2(part_lse - finite), tl.exp2(m - finite)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + part * weight[:, None]
            m = m_new
            slot += group
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        acc = acc / total[:, None]
        if HAS_SINKS:
            sink = tl.load(SINKS + b * s_b + (gg * group + member) * s_h, mask=live, other=0.0).to(tl.float32)
            lse = tl.where(some, m + tl.log2(total), float("-inf"))
            _, factor = add_sink(lse, sink * 1.4426950408889634)
            acc = acc * factor[:, None]
        store_rows(OUT + b * o_b + gg * group * o_h, member, o_h, acc, member < group, D, DP)
        tl.store(COUNTS + b * G + g, 0)
        if tl.atomic_add(COUNTS + B * G + b, 1, sem="acq_rel") == G - 1:
            tl.store(COUNTS + B * G + b, 0)
            tl.store(NEXT + b, position + is_active.to(tl.int64))
