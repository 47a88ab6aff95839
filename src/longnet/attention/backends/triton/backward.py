"""Dilated attention in two launches, backward: dq by the programs that own its queries, dk and dv by those of the keys.

Both walk the branches as the forward does, and recompute p = exp(s − lse) from the merged log-sum-exp, which is the
probability under the one softmax. Nothing is atomic, so gradients are the same at every run.
"""

import triton
import triton.language as tl

from longnet.attention.backends.triton.forward import load_rows, rows_between, store_rows


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
    dq, q, do, lse, delta, u_q, k_base, v_base, k_t, v_t, offset, rate, n_keys, start, stop, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the kept keys start … stop − 1 of a segment give to dq [ROWS, DP], but for the scale."""
    for j in range(start, stop, KEYS):
        key = j + tl.arange(0, KEYS)
        u_k = offset + key * rate
        k = load_rows(k_base, u_k, k_t, key < n_keys, D, DP, MASKED)
        v = load_rows(v_base, u_k, v_t, key < n_keys, D, DP, MASKED)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if MASKED:
            ok = (key < n_keys)[None, :]
            if CAUSAL:
                ok = ok & (u_k[None, :] <= u_q[:, None])
            p = tl.where(ok, p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def backward_queries(
    DOUT, Q, K, V, OUT, LSE, DELTA, DQ, ACC, BRANCHES, OFFSETS, WORK,
    N, covering, H, G, TQ, skipped, block, scale, scale_log2,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dq, and rowsum(dout · out) to DELTA (B, H, Tq). Grid and tables as in `forward.attend`."""
    h = tl.program_id(1)
    g = h // (H // G)
    work = WORK + 4 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_block = tl.load(work + 2) - doc, tl.load(work + 3)
    p_low = tl.maximum(p_block, skipped - doc)
    p_high = tl.minimum(p_block + block, tokens)
    q_doc, k_doc = (doc - skipped).to(tl.int64), doc.to(tl.int64)
    hh, gg = h.to(tl.int64), g.to(tl.int64)
    q_base, do_base = Q + b * q_b + hh * q_h + q_doc * q_t, DOUT + b * g_b + hh * g_h + q_doc * g_t
    out_base, dq_base = OUT + b * o_b + hh * o_h + q_doc * o_t, DQ + b * dq_b + hh * dq_h + q_doc * dq_t
    k_base, v_base = K + b * k_b + gg * k_h + k_doc * k_t, V + b * v_b + gg * v_h + k_doc * v_t
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
                do = load_rows(do_base, p, g_t, live, D, DP, True)
                if UPCAST:
                    q, do = q.to(tl.float32), do.to(tl.float32)
                lse = tl.load(lse_base + p, mask=live, other=float("inf")) * 1.4426950408889634
                lse = tl.where(lse == float("-inf"), float("inf"), lse)
                delta = tl.load(delta_base + p, mask=live, other=0.0)
                stop = n_keys
                full = n_keys // KEYS * KEYS
                if CAUSAL:
                    u_first = q_offset + start * q_rate
                    u_last = q_offset + (tl.minimum(start + ROWS, high) - 1) * q_rate
                    stop = tl.minimum(n_keys, tl.maximum(u_last - offset + rate, 0) // rate)
                    full = tl.minimum(full, tl.maximum(u_first - offset + rate, 0) // rate // KEYS * KEYS)
                dq = tl.zeros([ROWS, DP], tl.float32)
                dq = differentiate_queries(
                    dq, q, do, lse, delta, u_q,
                    k_base + base.to(tl.int64) * k_t, v_base + base.to(tl.int64) * v_t, k_t, v_t,
                    offset, rate, n_keys, 0, full, scale_log2,
                    CAUSAL, False, KEYS, D, DP, UPCAST,
                )  # fmt: skip
                dq = differentiate_queries(
                    dq, q, do, lse, delta, u_q,
                    k_base + base.to(tl.int64) * k_t, v_base + base.to(tl.int64) * v_t, k_t, v_t,
                    offset, rate, n_keys, full, stop, scale_log2,
                    CAUSAL, True, KEYS, D, DP, UPCAST,
                )  # fmt: skip
                dq = dq * scale + load_rows(acc_base, p, D, live, D, DP, True)
                if branch == covering:
                    store_rows(dq_base, p, dq_t, dq, live, D, DP)
                else:
                    store_rows(acc_base, p, D, dq, live, D, DP)
        tl.debug_barrier()
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


@triton.jit
def backward_keys(
    DOUT, Q, K, V, LSE, DELTA, DK, DV, ACC, BRANCHES, OFFSETS, WORK,
    N, H, G, T, TQ, skipped, block, of_dv, scale, scale_log2,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dk and dv. Grid: (blocks of all documents, key/value heads); ACC (2, B, G, T, D) holds sums so far."""
    g = tl.program_id(1)
    group = H // G
    work = WORK + 4 * tl.program_id(0)
    b, doc = tl.load(work).to(tl.int64), tl.load(work + 1)
    tokens, p_low = tl.load(work + 2) - doc, tl.load(work + 3)
    p_high = tl.minimum(p_low + block, tokens)
    queried = tl.maximum(skipped - doc, 0)
    q_doc, k_doc, gg = (doc - skipped).to(tl.int64), doc.to(tl.int64), g.to(tl.int64)
    k_base, v_base = K + b * k_b + gg * k_h + k_doc * k_t, V + b * v_b + gg * v_h + k_doc * v_t
    dk_base, dv_base = DK + b * dk_b + gg * dk_h + k_doc * dk_t, DV + b * dv_b + gg * dv_h + k_doc * dv_t
    dk_acc = ACC + ((b * G + g) * T + k_doc) * D
    dv_acc = dk_acc + of_dv
    zero_rows(dk_acc, p_low, p_high, KEYS, D, DP)
    zero_rows(dv_acc, p_low, p_high, KEYS, D, DP)
    tl.debug_barrier()
    for branch in range(N):
        length, rate = tl.load(BRANCHES + 3 * branch), tl.load(BRANCHES + 3 * branch + 1)
        q_rate = tl.load(BRANCHES + 3 * branch + 2)
        offset = tl.load(OFFSETS + branch * G + g)
        q_offset = tl.where(q_rate == rate, offset, 0)
        for segment in range(p_low // length, (p_high + length - 1) // length):
            base = segment * length
            positions = tl.minimum(length, tokens - base)
            low, high = rows_between(tl.maximum(p_low - base, 0), tl.minimum(p_high - base, positions), offset, rate)
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
