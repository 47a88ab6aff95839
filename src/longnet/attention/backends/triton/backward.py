"""Dilated attention in two launches, backward: dq by the programs that own its queries, dk and dv by those of the keys.

A third one gives the gradients of a halo's rows, each of which one branch has to itself.

Both walk the branches as the forward does, and recompute p = exp(s − lse) from the merged log-sum-exp, which is the
probability under the one softmax. Nothing is atomic, so gradients are the same at every run.
"""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import count_rows, load_rows, locate, rows_between, rows_of, store_rows


@triton.jit
def zero_rows(base, low, high, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    for start in range(low, high, ROWS):
        p = start + tl.arange(0, ROWS)
        store_rows(base, p, D, tl.zeros([ROWS, DP], tl.float32), p < high, D, DP)


@triton.jit
def convert_rows(base, to, stride, low, high, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    for start in range(low, high, ROWS):
        p = start + tl.arange(0, ROWS)
        store_rows(to, p, stride, load_rows(base, p, D, p < high, D, DP, True), p < high, D, DP)


@triton.jit
def differentiate_queries(
    dq, q, do, lse, delta, u_q, k_base, v_base, k_step, v_step, offset, rate, end, start, stop, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the kept keys start … stop − 1, before `end`, of a segment give to dq [ROWS, DP], but for the scale."""
    for j in range(start, stop, KEYS):
        key = j + tl.arange(0, KEYS)
        k = load_rows(k_base, key, k_step, key < end, D, DP, MASKED)
        v = load_rows(v_base, key, v_step, key < end, D, DP, MASKED)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if MASKED:
            ok = (key < end)[None, :]
            if CAUSAL:
                ok = ok & ((offset + key * rate)[None, :] <= u_q[:, None])
            p = tl.where(ok, p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["N", "covering", "H", "G", "TQ", "skipped", "block"])
def backward_queries(
    DOUT, Q, K, V, HK, HV, OUT, LSE, DELTA, DQ, ACC, BRANCHES, OFFSETS, PLACES, WORK,
    N, covering, H, G, TQ, skipped, block, scale, scale_log2,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, hk_b, hk_h, hk_t, hv_b, hv_h, hv_t,
    o_b, o_h, o_t, dq_b, dq_h, dq_t,
    CAUSAL: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dq, and rowsum(dout · out) to DELTA (B, H, Tq). Grid and tables as in `forward.attend`."""
    h = tl.program_id(1)
    g = h // (H // G)
    work = WORK + 6 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_block = tl.load(work + 2) - doc, tl.load(work + 3)
    unborn, beyond = tl.load(work + 4), tl.load(work + 5)
    p_hand = tl.maximum(unborn, -doc)
    p_low = tl.maximum(tl.maximum(p_block, skipped - doc), p_hand)
    p_high = tl.minimum(p_block + block, tokens)
    q_doc, k_doc = (doc - skipped).to(tl.int64), doc.to(tl.int64)
    hh, gg = h.to(tl.int64), g.to(tl.int64)
    q_base, do_base = Q + b * q_b + hh * q_h + q_doc * q_t, DOUT + b * g_b + hh * g_h + q_doc * g_t
    out_base, dq_base = OUT + b * o_b + hh * o_h + q_doc * o_t, DQ + b * dq_b + hh * dq_h + q_doc * dq_t
    k_base, v_base = K + b * k_b + gg * k_h + k_doc * k_t, V + b * v_b + gg * v_h + k_doc * v_t
    hk_base, hv_base = HK + b * hk_b + gg * hk_h, HV + b * hv_b + gg * hv_h
    slot = (b * H + h) * TQ + q_doc
    lse_base, delta_base, acc_base = LSE + slot, DELTA + slot, ACC + slot * D
    for start in range(p_low, p_high, ROWS):
        p = start + tl.arange(0, ROWS)
        live = p < p_high
        do = load_rows(do_base, p, g_t, live, D, DP, True).to(tl.float32)
        out = load_rows(out_base, p, o_t, live, D, DP, True).to(tl.float32)
        tl.store(delta_base + p, tl.sum(do * out, 1), mask=live)
    zero_rows(acc_base, p_low, p_high, ROWS, D, DP)
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
                    do = load_rows(do_base, p, g_t, live, D, DP, True)
                    if UPCAST:
                        q, do = q.to(tl.float32), do.to(tl.float32)
                    lse = tl.load(lse_base + p, mask=live, other=float("inf")) * 1.4426950408889634
                    lse = tl.where(lse == float("-inf"), float("inf"), lse)
                    delta = tl.load(delta_base + p, mask=live, other=0.0)
                    visible, all_see = end, end
                    if CAUSAL:
                        u_first = q_offset + start * q_rate
                        u_last = q_offset + (tl.minimum(start + ROWS, high) - 1) * q_rate
                        visible = tl.maximum(u_last - offset + rate, 0) // rate
                        all_see = tl.maximum(u_first - offset + rate, 0) // rate
                    dq = tl.zeros([ROWS, DP], tl.float32)
                    full = first + tl.maximum(tl.minimum(last, all_see) - first, 0) // KEYS * KEYS
                    dq = differentiate_queries(
                        dq, q, do, lse, delta, u_q, k_first, v_first, k_step, v_step, offset, rate, last,
                        first, full, scale_log2, CAUSAL, False, KEYS, D, DP, UPCAST,
                    )  # fmt: skip
                    dq = differentiate_queries(
                        dq, q, do, lse, delta, u_q, k_first, v_first, k_step, v_step, offset, rate, last,
                        full, tl.minimum(last, visible), scale_log2, CAUSAL, True, KEYS, D, DP, UPCAST,
                    )  # fmt: skip
                    dq = dq * scale + load_rows(acc_base, p, D, live, D, DP, True)
                    if (branch == covering) & is_last:
                        store_rows(dq_base, p, dq_t, dq, live, D, DP)
                    else:
                        store_rows(acc_base, p, D, dq, live, D, DP)
                tl.debug_barrier()  # other threads of this program read those rows next
    if covering < 0:
        convert_rows(acc_base, dq_base, dq_t, p_low, p_high, ROWS, D, DP)


@triton.jit
def differentiate_keys(
    dk, dv, k, v, u_k, q_base, do_base, lse_base, delta_base, q_t, g_t, q_offset, q_rate, start, stop, end, scale_log2,
    MASKED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the query rows start … stop − 1, before `end`, give to dk and dv [KEYS, DP]; dk but for the scale."""
    for i in range(start, stop, ROWS):
        row = i + tl.arange(0, ROWS)
        live = row < end
        u_q = q_offset + row * q_rate
        q = load_rows(q_base, u_q, q_t, live, D, DP, True)
        do = load_rows(do_base, u_q, g_t, live, D, DP, True)
        if UPCAST:
            q, do = q.to(tl.float32), do.to(tl.float32)
        lse = tl.load(lse_base + u_q, mask=live, other=float("inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_base + u_q, mask=live, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        if MASKED:
            p = tl.where(u_k[:, None] <= u_q[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["N", "H", "G", "T", "TQ", "skipped", "block", "all_rows"])
def backward_keys(
    DOUT, Q, K, V, LSE, DELTA, DK, DV, ACC, BRANCHES, OFFSETS, WORK,
    N, H, G, T, TQ, skipped, block, all_rows, scale, scale_log2,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dk and dv. Grid: (blocks of all documents, key/value heads); ACC (2, B, G, T, D) holds sums so far.

    all_rows: B · G · T.
    """
    g = tl.program_id(1)
    group = H // G
    work = WORK + 6 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_block = tl.load(work + 2) - doc, tl.load(work + 3)
    p_hand = tl.maximum(tl.load(work + 4), -doc)
    p_low, p_high = tl.maximum(p_block, p_hand), tl.minimum(p_block + block, tokens)
    queried = tl.maximum(skipped - doc, p_hand)
    q_doc, k_doc, gg = (doc - skipped).to(tl.int64), doc.to(tl.int64), g.to(tl.int64)
    k_base, v_base = K + b * k_b + gg * k_h + k_doc * k_t, V + b * v_b + gg * v_h + k_doc * v_t
    dk_base, dv_base = DK + b * dk_b + gg * dk_h + k_doc * dk_t, DV + b * dv_b + gg * dv_h + k_doc * dv_t
    dk_acc = ACC + ((b * G + g) * T + k_doc) * D
    dv_acc = dk_acc + all_rows.to(tl.int64) * D  # a multiple of D, as the compiler sees: it loads 16 bytes at once
    zero_rows(dk_acc, p_low, p_high, KEYS, D, DP)
    zero_rows(dv_acc, p_low, p_high, KEYS, D, DP)
    tl.debug_barrier()
    for branch in range(N):
        length, rate = tl.load(BRANCHES + 4 * branch), tl.load(BRANCHES + 4 * branch + 1)
        q_rate, most = tl.load(BRANCHES + 4 * branch + 2), tl.load(BRANCHES + 4 * branch + 3)
        offset = tl.load(OFFSETS + branch * G + g)
        q_offset = tl.where(q_rate == rate, offset, 0)
        for segment in range(p_low // length, (p_high + length - 1) // length):
            base = segment * length
            positions = tl.minimum(length, tokens - base)
            low, high = rows_between(tl.maximum(p_low - base, 0), tl.minimum(p_high - base, positions), offset, rate)
            high = tl.minimum(high, most)
            first, end = rows_between(tl.maximum(queried - base, 0), positions, q_offset, q_rate)
            q_at, k_at = q_doc + base, base.to(tl.int64)
            for start in range(low, high, KEYS):
                key = start + tl.arange(0, KEYS)
                live = key < high
                u_k = offset + key * rate
                k = load_rows(k_base + k_at * k_t, u_k, k_t, live, D, DP, True)
                v = load_rows(v_base + k_at * v_t, u_k, v_t, live, D, DP, True)
                if UPCAST:
                    k, v = k.to(tl.float32), v.to(tl.float32)
                dk, dv = tl.zeros([KEYS, DP], tl.float32), tl.zeros([KEYS, DP], tl.float32)
                begin = first
                middle = first
                if CAUSAL:
                    u_first = offset + start * rate
                    u_last = offset + (tl.minimum(start + KEYS, high) - 1) * rate
                    begin = tl.maximum(first, tl.maximum(u_first - q_offset + q_rate - 1, 0) // q_rate)
                    all_see = tl.maximum(u_last - q_offset + q_rate - 1, 0) // q_rate
                    middle = begin + tl.maximum(all_see - begin + ROWS - 1, 0) // ROWS * ROWS
                for member in range(group):
                    h = gg * group + member
                    q_base, do_base = Q + b * q_b + h * q_h + q_at * q_t, DOUT + b * g_b + h * g_h + q_at * g_t
                    slot = (b * H + h) * TQ + q_at
                    dk, dv = differentiate_keys(
                        dk, dv, k, v, u_k, q_base, do_base, LSE + slot, DELTA + slot, q_t, g_t, q_offset, q_rate,
                        begin, tl.minimum(middle, end), end, scale_log2,
                        True, ROWS, D, DP, UPCAST,
                    )  # fmt: skip
                    dk, dv = differentiate_keys(
                        dk, dv, k, v, u_k, q_base, do_base, LSE + slot, DELTA + slot, q_t, g_t, q_offset, q_rate,
                        middle, end, end, scale_log2,
                        False, ROWS, D, DP, UPCAST,
                    )  # fmt: skip
                p = base + u_k
                store_rows(dk_acc, p, D, load_rows(dk_acc, p, D, live, D, DP, True) + dk * scale, live, D, DP)
                store_rows(dv_acc, p, D, load_rows(dv_acc, p, D, live, D, DP, True) + dv, live, D, DP)
        tl.debug_barrier()
    convert_rows(dk_acc, dk_base, dk_t, p_low, p_high, KEYS, D, DP)
    convert_rows(dv_acc, dv_base, dv_t, p_low, p_high, KEYS, D, DP)


@triton.jit(do_not_specialize=["H", "G", "TQ"])
def backward_halo(
    DOUT, Q, HK, HV, LSE, DELTA, DHK, DHV, BRANCHES, OFFSETS, PLACES, WORK,
    H, G, TQ, scale, scale_log2,
    g_b, g_h, g_t, q_b, q_h, q_t, hk_b, hk_h, hk_t, hv_b, hv_h, hv_t, dhk_b, dhk_h, dhk_t, dhv_b, dhv_h, dhv_t,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a halo's rows. Grid: (blocks, key/value heads), all other tables as in `forward.attend`.

    WORK (blocks, 9): batch row, document's start and stop, how many of its positions never existed, branch, a segment's
    first position, which of its positions the halo has, low … high − 1, and how many kept rows to leave out first.
    """
    g = tl.program_id(1)
    group = H // G
    work = WORK + 9 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, unborn, branch = tl.load(work + 2) - doc, tl.load(work + 3), tl.load(work + 4)
    base, u_low, u_high, skip = tl.load(work + 5), tl.load(work + 6), tl.load(work + 7), tl.load(work + 8)
    length, rate = tl.load(BRANCHES + 4 * branch), tl.load(BRANCHES + 4 * branch + 1)
    q_rate = tl.load(BRANCHES + 4 * branch + 2)
    offset = tl.load(OFFSETS + branch * G + g)
    q_offset = tl.where(q_rate == rate, offset, 0)
    positions = tl.minimum(length, tokens - base)
    is_later = u_low >= positions
    low, high = rows_between(u_low, u_high, offset, rate)
    place = tl.load(PLACES + 2 * branch + is_later.to(tl.int32)) - tl.where(is_later, positions // rate, 0)
    key = low + skip + tl.arange(0, KEYS)
    live, gg = key < high, g.to(tl.int64)
    k = load_rows(HK + b * hk_b + gg * hk_h, place + key, hk_t, live, D, DP, True)
    v = load_rows(HV + b * hv_b + gg * hv_h, place + key, hv_t, live, D, DP, True)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    dk, dv = tl.zeros([KEYS, DP], tl.float32), tl.zeros([KEYS, DP], tl.float32)
    p_hand = tl.maximum(unborn, -doc)
    first, end = rows_between(tl.maximum(p_hand - base, 0), positions, q_offset, q_rate)
    q_at = (doc + base).to(tl.int64)
    for member in range(group):
        h = gg * group + member
        slot = (b * H + h) * TQ + q_at
        dk, dv = differentiate_keys(
            dk, dv, k, v, key, Q + b * q_b + h * q_h + q_at * q_t, DOUT + b * g_b + h * g_h + q_at * g_t,
            LSE + slot, DELTA + slot, q_t, g_t, q_offset, q_rate, first, end, end, scale_log2,
            False, ROWS, D, DP, UPCAST,
        )  # fmt: skip
    store_rows(DHK + b * dhk_b + gg * dhk_h, place + key, dhk_t, dk * scale, live, D, DP)
    store_rows(DHV + b * dhv_b + gg * dhv_h, place + key, dhv_t, dv, live, D, DP)
