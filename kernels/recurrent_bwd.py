"""The backward pass as two walks over a tile: forwards with the prefix state, then backwards with the suffix state.

With r = 1 / den ("global") or 1, and w = r * phi(q) what a query reads buckets with:

    e_i = M(i) do_i                     dphi(q_i) = r_i (e_i + h_i m(i))        h_i = -r_i <phi(q_i), e_i>  ("global")
    C(j) = sum_{i >= j} w_i do_i^T      c(j) = sum_{i >= j} w_i h_i
    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)

e and h come from the same rounded numbers, so what they have in common cancels: h is never taken from a 16-bit output.
For one block of features (S <= SB).
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import (
    buckets,
    centred,
    corner_bits,
    crossing,
    entering,
    hash_gradient,
    inverse_den,
    key_features,
    leaving,
    load_decay,
    load_keep,
    load_planes,
    load_rows,
    load_scalars,
    load_state,
    locate,
    low,
    mm,
    mm_left,
    mm_right,
    open_heads,
    open_rows,
    parts,
    planes_gradient,
    rounded,
    seen,
    seen_by,
    signs,
    soft_hash,
    store_planes_gradient,
    store_rows,
    store_scalars,
    through,
    unproject,
)


@triton.jit
def race_recurrent_bwd_dq_kernel(
    q,
    k,
    v,
    dout,
    den,
    dq,
    h_out,
    row_out,
    planes,
    beta,
    log_decay,
    key_mask,
    states,
    dbeta,
    dplanes,
    tiles,
    T,
    TILE,
    H,
    c: tl.constexpr,
):
    """Program (tile, head), chunks in order: writes dq, ``h [B, T, Hq]`` ("global"), and the queries' part of
    dG ``[B, T, H]`` (decay, "none"). The tile's sums of C and c are made apart (``race_tile_sums_bwd_kernel``): kept here they
    would not fit in registers beside M."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, 0, c)
    ones, zeros = corner_bits(0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    M, m = load_state(states, (tile if c.causal else row).to(tl.int64) * H + h, 0, c)
    db = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dW = tl.zeros([c.LPB, c.BD], tl.float32)
    k_rows = open_rows(k, b, h, end, c.D, c.BD, c)
    v_rows = open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows = open_heads(q, b, h, end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h, end, c.Dv, c.BV, c)
    dq_rows = open_heads(dq, b, h, end, c.D, c.BD, c)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        G = load_decay(log_decay, b, t, h, n, c)
        before = parts(tl.trans(M), c)
        m_before = m
        if c.causal:
            k_c = load_rows(k_rows, t, c.D, c.BD, c)
            v_c = low(load_rows(v_rows, t, c.Dv, c.BV, c), c)
            keep = load_keep(key_mask, b, t, n, c)
            Fk = rounded(key_features(k_c, W, W_rest, ones, zeros, sharp, keep, 0, c), c)
            Fk_low = low(Fk, c)
            Fk = rounded(leaving(Fk, G, c), c) if c.decay else Fk
            M = mm(tl.trans(low(Fk, c)), v_c, through(M, G, c))
            m = through(m, G, c) + tl.sum(Fk, 0)
        if c.decay:
            rows_sum = tl.zeros([c.C], tl.float32)
        for g in tl.static_range(c.G):
            hq = h * c.G + g
            do_c = low(load_rows(do_rows[g], t, c.Dv, c.BV, c), c)
            e = entering(mm_right(do_c, before, None, c), G, c)
            if c.causal:
                e = mm_left(parts(seen(mm(do_c, tl.trans(v_c)), t, G, c), c), Fk_low, e, c)
            q_c = load_rows(q_rows[g], t, c.D, c.BD, c)
            u, log_on, log_off = signs(q_c, W, W_rest, sharp, c)
            w = buckets(log_on, log_off, ones, zeros, 0, c)
            if c.is_global:
                r = inverse_den(load_scalars(den, b, t, hq, n, c))
                y = w * e
                h_c = -r * tl.sum(y, 1)
                store_scalars(h_out, h_c, b, t, hq, n, c)
                w *= r[:, None]
                m_c = entering(tl.zeros([c.C, c.SB], tl.float32) + m_before[None, :], G, c)
                if c.causal:
                    m_c = mm(low(seen(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c), c), Fk_low, m_c)
                y = r[:, None] * y + w * (h_c[:, None] * m_c)
            else:
                y, total = centred(w, e, c)
                if c.decay:
                    rows_sum += total
            dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
            db += part
            if c.need_planes:
                dW += planes_gradient(q_c, dz, c)
            store_rows(dq_rows[g], unproject(dz, W, W_rest, c), t, c.D, c.BD, c)
        if c.decay and not c.is_global:
            store_scalars(row_out, rows_sum, b, t, h, n, c)
    index = tile.to(tl.int64) * H + h
    tl.store(dbeta + index, tl.sum(db, 0))
    if c.need_planes:
        store_planes_gradient(dplanes, dW, index, 0, c)


@triton.jit
def race_recurrent_bwd_dkv_kernel(
    q,
    k,
    v,
    dout,
    den,
    h_in,
    row_in,
    dk,
    dv,
    dlog_decay,
    planes,
    beta,
    log_decay,
    key_mask,
    states,
    final_values,
    final_mass,
    suffixes,
    dbeta,
    dplanes,
    tiles,
    T,
    TILE,
    H,
    c: tl.constexpr,
):
    """Program (tile, head), chunks in reverse: writes dk, dv and dlog_decay ``[B, T, H]``."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, start, end, last = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, 0, c)
    ones, zeros = corner_bits(0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    Cs, cs = load_state(suffixes, (tile if c.causal else row).to(tl.int64) * H + h, 0, c)
    db = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dW = tl.zeros([c.LPB, c.BD], tl.float32)
    if c.decay:
        flow = crossing(states, final_values, final_mass, Cs, cs, tile, row, last, h, H, 0, c)
    k_rows = open_rows(k, b, h, end, c.D, c.BD, c)
    v_rows = open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows = open_heads(q, b, h, end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h, end, c.Dv, c.BV, c)
    dk_rows = open_rows(dk, b, h, end, c.D, c.BD, c)
    dv_rows = open_rows(dv, b, h, end, c.Dv, c.BV, c)
    for step in tl.range(0, end - start, c.C, num_stages=c.stages):
        t = start + ((end - start + c.C - 1) // c.C - 1) * c.C - step
        n = end - t
        k_c = load_rows(k_rows, t, c.D, c.BD, c)
        v_c = low(load_rows(v_rows, t, c.Dv, c.BV, c), c)
        G = load_decay(log_decay, b, t, h, n, c)
        keep = load_keep(key_mask, b, t, n, c)
        u, log_on, log_off = signs(k_c, W, W_rest, sharp, c)
        Fk = rounded(tl.where(keep[:, None], buckets(log_on, log_off, ones, zeros, 0, c), 0.0), c)
        Fk_low = low(Fk, c)
        behind = parts(Cs, c)
        cs_behind = cs
        if c.causal:
            Cs = through(Cs, G, c)
            cs = through(cs, G, c)
        for g in tl.static_range(c.G if c.causal else 1):
            hq = h * c.G + g
            if c.causal:
                q_c = load_rows(q_rows[g], t, c.D, c.BD, c)
                do_c = low(load_rows(do_rows[g], t, c.Dv, c.BV, c), c)
                w = soft_hash(q_c, W, W_rest, ones, zeros, sharp, 0, c)
                if c.is_global:
                    w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
                    h_c = load_scalars(h_in, b, t, hq, n, c)
                w = rounded(w, c)
                w_low = low(w, c)
                P = low(seen_by(mm(Fk_low, tl.trans(w_low)), t, G, c), c)
                w = rounded(entering(w, G, c), c) if c.decay else w
                Cs = mm(tl.trans(low(w, c)), do_c, Cs)
                if c.is_global:
                    cs += tl.sum(w * h_c[:, None], 0)
            if g == 0:
                dv_c = leaving(mm(Fk_low, behind[0]), G, c)
            if c.causal:
                dv_c = mm(P, do_c, dv_c)
            if g == c.G - 1 or not c.causal:  # written before dphi is made: both at once are too many registers
                store_rows(dv_rows, dv_c, t, c.Dv, c.BV, c)
            if g == 0:
                dphi = mm_right(v_c, (tl.trans(behind[0]), tl.trans(behind[1])), None, c) + cs_behind[None, :]
                dphi = leaving(dphi, G, c)
            if c.causal:
                A = mm(v_c, tl.trans(do_c))  # [j, i]
                if c.is_global:
                    A += h_c[None, :]
                dphi = mm(low(seen_by(A, t, G, c), c), w_low, dphi)
        y, total = centred(Fk, dphi, c)
        if c.decay:
            dG = -total
            if not c.is_global:
                dG += load_scalars(row_in, b, t, h, n, c)
            store_scalars(dlog_decay, tl.cumsum(dG, 0, reverse=True) + flow, b, t, h, n, c)
            flow += tl.sum(dG, 0)
        dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
        db += part
        if c.need_planes:
            dW += planes_gradient(k_c, dz, c)
        store_rows(dk_rows, unproject(dz, W, W_rest, c), t, c.D, c.BD, c)
    index = tile.to(tl.int64) * H + h
    tl.store(dbeta + index, tl.sum(db, 0))
    if c.need_planes:
        store_planes_gradient(dplanes, dW, index, 0, c)
