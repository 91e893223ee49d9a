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
    buckets, corner_bits, crossing, entering, hash_gradient, inverse_den, key_features, leaving, load_decay, load_keep, load_planes,
    load_rows, load_scalars, load_state, locate, low, mm, mm_right, planes_gradient, seen, seen_by, signs, soft_hash,
    store_planes_gradient, store_rows, store_scalars, store_state, through, unproject,
)


@triton.jit
def walk_queries(q, k, v, dout, den, dq, h_out, row_out, planes, beta, log_decay, key_mask, states, suffix_sums,
                 decays, dbeta, dplanes, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head), chunks in order: writes dq, ``h [B, T, Hq]`` ("global"), the queries' part of dG
    ``[B, T, H]`` (decay, "none"), the tile's sums of C and c as seen before the tile, and its total log decay."""
    h = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    b, row, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, 0, c)
    ones, zeros = corner_bits(0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    M, m = load_state(states, (tile if c.causal else row).to(tl.int64) * H + h, 0, c)
    C_sum = tl.zeros([c.SB, c.BV], tl.float32)
    c_sum = tl.zeros([c.SB], tl.float32)
    db = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dW = tl.zeros([c.BD, c.LPB], tl.float32)
    if c.decay:
        total = (start * 0).to(tl.float64)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        G = load_decay(log_decay, b, t, h, n, c)
        if c.causal:
            k_c = load_rows(k, b, t, h, n, c.D, c.BD, c)
            v_c = low(load_rows(v, b, t, h, n, c.Dv, c.BV, c), c)
            Fk = key_features(k_c, W, W_rest, ones, zeros, sharp, load_keep(key_mask, b, t, n, c), 0, c)
            Fk_low = low(Fk, c)
        if c.decay:
            rows_sum = tl.zeros([c.C], tl.float32)
        for g in tl.static_range(c.G):
            hq = h * c.G + g
            q_c = load_rows(q, b, t, hq, n, c.D, c.BD, c)
            do_c = low(load_rows(dout, b, t, hq, n, c.Dv, c.BV, c), c)
            u, log_on, log_off = signs(q_c, W, W_rest, sharp, c)
            Fq = buckets(log_on, log_off, ones, zeros, 0, c)
            e = entering(mm_right(do_c, tl.trans(M), c), G, c)
            if c.causal:
                e += mm(low(seen(mm(do_c, tl.trans(v_c)), G, c), c), Fk_low)
            y = Fq * e
            if c.is_global:
                r = inverse_den(load_scalars(den, b, t, hq, n, c))
                h_c = -r * tl.sum(y, 1)
                store_scalars(h_out, h_c, b, t, hq, n, c)
                m_c = entering(tl.zeros([c.C, c.SB], tl.float32) + m[None, :], G, c)
                if c.causal:
                    m_c += mm(low(seen(tl.full([c.C, c.C], 1.0, tl.float32), G, c), c), Fk_low)
                y = r[:, None] * (y + Fq * (h_c[:, None] * m_c))
                Fq = r[:, None] * Fq
            elif c.decay:
                rows_sum += tl.sum(y, 1)
            dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
            db += part
            if c.need_planes:
                dW += planes_gradient(q_c, dz, c)
            store_rows(dq, unproject(dz, W, W_rest, c), b, t, hq, n, c.D, c.BD, c)
            w = entering(Fq, G, c)
            if c.decay:
                w *= tl.exp2(total.to(tl.float32))
            w = low(w, c)
            C_sum += mm(tl.trans(w), do_c)
            if c.is_global:
                c_sum += tl.sum(w.to(tl.float32) * h_c[:, None], 0)
        if c.decay:
            total += G[2]
            if not c.is_global:
                store_scalars(row_out, rows_sum, b, t, h, n, c)
        if c.causal:
            Fk = low(leaving(Fk, G, c), c)
            M = through(M, G, c) + mm(tl.trans(Fk), v_c)
            m = through(m, G, c) + tl.sum(Fk.to(tl.float32), 0)
    index = tile.to(tl.int64) * H + h
    store_state(suffix_sums, index, 0, C_sum, c_sum, c)
    if c.decay:
        tl.store(decays + index, total)
    tl.store(dbeta + index, tl.sum(db, 0))
    if c.need_planes:
        store_planes_gradient(dplanes, dW, index, 0, c)


@triton.jit
def walk_keys(q, k, v, dout, den, h_in, row_in, dk, dv, dlog_decay, planes, beta, log_decay, key_mask, states,
              final_values, final_mass, suffixes, dbeta, dplanes, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head), chunks in reverse: writes dk, dv and dlog_decay ``[B, T, H]``."""
    h = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    b, row, start, end, last = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, 0, c)
    ones, zeros = corner_bits(0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    Cs, cs = load_state(suffixes, (tile if c.causal else row).to(tl.int64) * H + h, 0, c)
    db = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dW = tl.zeros([c.BD, c.LPB], tl.float32)
    if c.decay:
        flow = crossing(states, final_values, final_mass, Cs, cs, tile, row, last, h, H, 0, c)
    for step in tl.range(0, end - start, c.C, num_stages=c.stages):
        t = start + ((end - start + c.C - 1) // c.C - 1) * c.C - step
        n = end - t
        k_c = load_rows(k, b, t, h, n, c.D, c.BD, c)
        v_c = low(load_rows(v, b, t, h, n, c.Dv, c.BV, c), c)
        G = load_decay(log_decay, b, t, h, n, c)
        keep = load_keep(key_mask, b, t, n, c)
        u, log_on, log_off = signs(k_c, W, W_rest, sharp, c)
        Fk = tl.where(keep[:, None], buckets(log_on, log_off, ones, zeros, 0, c), 0.0)
        Fk_low = low(Fk, c)
        dphi = leaving(mm_right(v_c, tl.trans(Cs), c) + cs[None, :], G, c)
        dv_c = leaving(mm(Fk_low, low(Cs, c)), G, c)
        if c.causal:
            Cs = through(Cs, G, c)
            cs = through(cs, G, c)
            for g in tl.static_range(c.G):
                hq = h * c.G + g
                q_c = load_rows(q, b, t, hq, n, c.D, c.BD, c)
                do_c = low(load_rows(dout, b, t, hq, n, c.Dv, c.BV, c), c)
                w = soft_hash(q_c, W, W_rest, ones, zeros, sharp, 0, c)
                A = mm(v_c, tl.trans(do_c))  # [j, i]
                if c.is_global:
                    w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
                    h_c = load_scalars(h_in, b, t, hq, n, c)
                    A += h_c[None, :]
                w_low = low(w, c)
                dphi += mm(low(seen_by(A, G, c), c), w_low)
                dv_c += mm(low(seen_by(mm(Fk_low, tl.trans(w_low)), G, c), c), do_c)
                w_low = low(entering(w, G, c), c)
                Cs += mm(tl.trans(w_low), do_c)
                if c.is_global:
                    cs += tl.sum(w_low.to(tl.float32) * h_c[:, None], 0)
        y = Fk * dphi
        if c.decay:
            dG = -tl.sum(y, 1)
            if not c.is_global:
                dG += load_scalars(row_in, b, t, h, n, c)
            store_scalars(dlog_decay, tl.cumsum(dG, 0, reverse=True) + flow, b, t, h, n, c)
            flow += tl.sum(dG, 0)
        dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
        db += part
        if c.need_planes:
            dW += planes_gradient(k_c, dz, c)
        store_rows(dk, unproject(dz, W, W_rest, c), b, t, h, n, c.D, c.BD, c)
        store_rows(dv, dv_c, b, t, h, n, c.Dv, c.BV, c)
    index = tile.to(tl.int64) * H + h
    tl.store(dbeta + index, tl.sum(db, 0))
    if c.need_planes:
        store_planes_gradient(dplanes, dW, index, 0, c)
