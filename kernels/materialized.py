"""The passes for many features or for "bucket": a tile is one chunk and reads its stored states, features in blocks.

The formulas are those of ``walk.py`` and ``walk_backward.py``. "bucket" divides each query feature by the mass of its
bucket, the tokens of the chunk included; with a_s = e_s = <M_s, do>:

    w_s(i) = phi_s(q_i) / (m_s(i) + eps)          dphi(q_i)_s = a_s / (m_s + eps)
    C_s(j) = sum_{i >= j} w_s(i) do_i             c_s(j) = - sum_{i >= j} w_s(i) a_s(i) / (m_s(i) + eps)
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import (
    BUCKET_EPS,
    buckets,
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
    load_scalars,
    load_state,
    locate,
    low,
    mm,
    mm_left,
    mm_right,
    open_rows,
    parts,
    planes_gradient,
    read_rows,
    rounded,
    seen,
    seen_by,
    signs,
    soft_hash,
    store_planes_gradient,
    store_rows,
    store_scalars,
    store_state,
    unproject,
)


@triton.jit
def race_materialized_fwd_kernel(
    q, k, v, out, den, planes, beta, log_decay, key_mask, states, tiles, T, TILE, H, c: tl.constexpr
):
    """Program (tile, head): writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, t, end, _ = locate(tiles, tile, T, TILE, c)
    n = end - t
    index = (tile if c.causal else row).to(tl.int64) * H + h
    sharp = tl.load(beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    keep = load_keep(key_mask, b, t, n, c)
    for g in tl.range(0, c.G, num_stages=1):
        hq = h * c.G + g
        num = tl.zeros([c.C, c.BV], tl.float32)
        total = tl.zeros([c.C], tl.float32)
        A = tl.zeros([c.C, c.C], tl.float32)
        for block in tl.range(0, c.NSB, num_stages=1):
            s0 = block * c.SB
            W, W_rest = load_planes(planes, h, s0, c)
            ones, zeros = corner_bits(s0, c)
            M, m = load_state(states, index, s0, c)
            q_c = read_rows(q, b, t, hq, end, c.D, c.BD, c)
            Fq = soft_hash(q_c, W, W_rest, ones, zeros, sharp, s0, c)
            if c.causal:
                k_c = read_rows(k, b, t, h, end, c.D, c.BD, c)
                Fk = low(key_features(k_c, W, W_rest, ones, zeros, sharp, keep, s0, c), c)
                if c.is_bucket:
                    Fq = Fq / mass_here(m, Fk, t, G, c)
                Fq = rounded(Fq, c)
                A += mm(low(Fq, c), tl.trans(Fk))
            else:
                if c.is_bucket:
                    Fq = Fq / (m[None, :] + BUCKET_EPS)
                Fq = rounded(Fq, c)
            num += mm(low(Fq, c), low(M, c))
            if c.is_global:
                total += tl.sum(Fq * m[None, :], 1)
        num = entering(num, G, c)
        if c.decay:
            total *= tl.exp2(G[0])
        if c.causal:
            A = rounded(seen(A, t, G, c), c)
            num += mm(low(A, c), low(read_rows(v, b, t, h, end, c.Dv, c.BV, c), c))
            total += tl.sum(A, 1)
        if c.is_global:
            num *= inverse_den(total)[:, None]
            store_scalars(den, total, b, t, hq, n, c)
        store_rows(open_rows(out, b, hq, end, c.Dv, c.BV, c), num, t, c.Dv, c.BV, c)


@triton.jit
def mass_here(m, Fk_low, t, G, c: tl.constexpr):
    """Each bucket's mass at each token of the chunk, the token included, plus eps, ``[C, SB]``."""
    return mass_seen(m, Fk_low, t, G, c) + BUCKET_EPS


@triton.jit
def mass_seen(m, Fk_low, t, G, c: tl.constexpr):
    """Each bucket's mass at each token of the chunk, the token included, ``[C, SB]``."""
    before = entering(tl.zeros([c.C, c.SB], tl.float32) + m[None, :], G, c)
    return before + mm(low(seen(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c), c), Fk_low)


@triton.jit
def query_products(q_c, do_c, A, M, m, Fk, W, W_rest, ones, zeros, sharp, t, G, s0, c: tl.constexpr):
    """A query's signs and features, ``e [C, SB]``, and the masses it reads (plus eps for "bucket")."""
    u, log_on, log_off = signs(q_c, W, W_rest, sharp, c)
    Fq = buckets(log_on, log_off, ones, zeros, s0, c)
    e = entering(mm_right(do_c, parts(tl.trans(M), c), None, c), G, c)
    masses = tl.zeros([c.C, c.SB], tl.float32) + m[None, :]
    if c.causal:
        e = mm_left(A, Fk, e, c)
        if c.is_global or c.is_bucket:
            masses = mass_seen(m, Fk, t, G, c)
    if c.is_bucket:
        masses += BUCKET_EPS
    return u, log_on, log_off, Fq, e, masses


@triton.jit
def race_materialized_bwd_dq_kernel(
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
    suffix_sums,
    decays,
    dbeta,
    dplanes,
    tiles,
    T,
    TILE,
    H,
    c: tl.constexpr,
):
    """Program (tile, head): what ``race_recurrent_bwd_dq_kernel`` does, for one chunk. "global" needs every
    block's e for h before the first block's gradient, so the blocks are passed twice."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, t, end, _ = locate(tiles, tile, T, TILE, c)
    n = end - t
    index = (tile if c.causal else row).to(tl.int64) * H + h
    own = tile.to(tl.int64) * H + h
    sharp = tl.load(beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    keep = load_keep(key_mask, b, t, n, c)
    db = tl.zeros([c.C], tl.float32)
    rows_sum = tl.zeros([c.C], tl.float32)
    for g in tl.static_range(c.G):
        hq = h * c.G + g
        q_c = read_rows(q, b, t, hq, end, c.D, c.BD, c)
        do_c = low(read_rows(dout, b, t, hq, end, c.Dv, c.BV, c), c)
        A = parts(tl.zeros([c.C, c.C], tl.float32), c)
        if c.causal:
            k_c = read_rows(k, b, t, h, end, c.D, c.BD, c)
            v_c = low(read_rows(v, b, t, h, end, c.Dv, c.BV, c), c)
            A = parts(seen(mm(do_c, tl.trans(v_c)), t, G, c), c)
        r = tl.full([c.C], 1.0, tl.float32)
        h_c = tl.zeros([c.C], tl.float32)
        if c.is_global:
            r = inverse_den(load_scalars(den, b, t, hq, n, c))
            for block in tl.range(0, c.NSB, num_stages=1):
                s0 = block * c.SB
                W, W_rest = load_planes(planes, h, s0, c)
                ones, zeros = corner_bits(s0, c)
                M, m = load_state(states, index, s0, c)
                Fk = A[0]
                if c.causal:
                    Fk = low(key_features(k_c, W, W_rest, ones, zeros, sharp, keep, s0, c), c)
                products = query_products(q_c, do_c, A, M, m, Fk, W, W_rest, ones, zeros, sharp, t, G, s0, c)
                h_c -= r * tl.sum(products[3] * products[4], 1)
            store_scalars(h_out, h_c, b, t, hq, n, c)
        dq_c = tl.zeros([c.C, c.BD], tl.float32)
        for block in tl.range(0, c.NSB, num_stages=1):
            s0 = block * c.SB
            W, W_rest = load_planes(planes, h, s0, c)
            ones, zeros = corner_bits(s0, c)
            M, m = load_state(states, index, s0, c)
            Fk = A[0]
            if c.causal:
                Fk = low(key_features(k_c, W, W_rest, ones, zeros, sharp, keep, s0, c), c)
            products = query_products(q_c, do_c, A, M, m, Fk, W, W_rest, ones, zeros, sharp, t, G, s0, c)
            u, log_on, log_off, Fq, e, masses = products
            if c.is_bucket:
                y = Fq * (e / masses)
                w = Fq / masses
                dm = -y / masses
                rows_sum -= BUCKET_EPS * tl.sum(dm, 1)
            else:
                y = r[:, None] * (Fq * (e + h_c[:, None] * masses))
                w = r[:, None] * Fq
                dm = tl.zeros([c.C, c.SB], tl.float32)
                rows_sum += tl.sum(y, 1)
            dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
            db += part
            if c.need_planes:
                add_planes_gradient(dplanes, planes_gradient(q_c, dz, c), own, s0, g == 0, c)
            dq_c += unproject(dz, W, W_rest, c)
            w = rounded(entering(w, G, c), c)
            C_sum = mm(tl.trans(low(w, c)), do_c)
            c_sum = tl.sum(w * h_c[:, None] if c.is_global else entering(dm, G, c), 0)
            if g > 0:
                C_old, c_old = load_state(suffix_sums, own, s0, c)
                C_sum += C_old
                c_sum += c_old
            store_state(suffix_sums, own, s0, C_sum, c_sum, c)
        store_rows(open_rows(dq, b, hq, end, c.D, c.BD, c), dq_c, t, c.D, c.BD, c)
    tl.store(dbeta + own, tl.sum(db, 0))
    if c.decay:
        tl.store(decays + own, G[2])
        if not c.is_global:
            store_scalars(row_out, rows_sum, b, t, h, n, c)


@triton.jit
def add_planes_gradient(dplanes, part, index, s0, first: tl.constexpr, c: tl.constexpr):
    """Add this query head's part to what the program's earlier heads left."""
    if not first:
        d = tl.arange(0, c.BD)
        slot = tl.arange(0, c.LPB)
        part += tl.load(dplanes + (index * c.NSB + s0 // c.SB) * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :])
    store_planes_gradient(dplanes, part, index, s0, c)


@triton.jit
def race_materialized_bwd_dkv_kernel(
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
    """Program (tile, head): what ``race_recurrent_bwd_dkv_kernel`` does, for one chunk."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, t, end, last = locate(tiles, tile, T, TILE, c)
    n = end - t
    index = (tile if c.causal else row).to(tl.int64) * H + h
    own = tile.to(tl.int64) * H + h
    sharp = tl.load(beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    keep = load_keep(key_mask, b, t, n, c)
    k_c = read_rows(k, b, t, h, end, c.D, c.BD, c)
    v_c = low(read_rows(v, b, t, h, end, c.Dv, c.BV, c), c)
    dk_c = tl.zeros([c.C, c.BD], tl.float32)
    dv_c = tl.zeros([c.C, c.BV], tl.float32)
    db = tl.zeros([c.C], tl.float32)
    dG = tl.zeros([c.C], tl.float32)
    flow = 0.0
    for block in tl.range(0, c.NSB, num_stages=1):
        s0 = block * c.SB
        W, W_rest = load_planes(planes, h, s0, c)
        ones, zeros = corner_bits(s0, c)
        Cs, cs = load_state(suffixes, index, s0, c)
        if c.decay:
            flow += crossing(states, final_values, final_mass, Cs, cs, tile, row, last, h, H, s0, c)
        u, log_on, log_off = signs(k_c, W, W_rest, sharp, c)
        Fk = tl.where(keep[:, None], buckets(log_on, log_off, ones, zeros, s0, c), 0.0)
        Fk_low = low(Fk, c)
        dphi = leaving(mm_right(v_c, parts(tl.trans(Cs), c), None, c) + cs[None, :], G, c)
        dv_c += leaving(mm(Fk_low, low(Cs, c)), G, c)
        if c.causal:
            for g in tl.static_range(c.G):
                hq = h * c.G + g
                q_c = read_rows(q, b, t, hq, end, c.D, c.BD, c)
                do_c = low(read_rows(dout, b, t, hq, end, c.Dv, c.BV, c), c)
                A = mm(v_c, tl.trans(do_c))  # [j, i]
                if c.is_bucket:
                    M, m = load_state(states, index, s0, c)
                    A_q = parts(seen(tl.trans(A), t, G, c), c)
                    products = query_products(q_c, do_c, A_q, M, m, Fk_low, W, W_rest, ones, zeros, sharp, t, G, s0, c)
                    masses = products[5]
                    w = products[3] / masses
                    share = seen_by(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c)
                    dphi -= mm(low(share, c), low(w * products[4] / masses, c))
                else:
                    w = soft_hash(q_c, W, W_rest, ones, zeros, sharp, s0, c)
                if c.is_global:
                    w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
                    A += load_scalars(h_in, b, t, hq, n, c)[None, :]
                w_low = low(w, c)
                dphi += mm(low(seen_by(A, t, G, c), c), w_low)
                dv_c += mm(low(seen_by(mm(Fk_low, tl.trans(w_low)), t, G, c), c), do_c)
        y = Fk * dphi
        dG -= tl.sum(y, 1)
        dz, part = hash_gradient(y, u, log_on, log_off, ones, zeros, sharp, c)
        db += part
        if c.need_planes:
            store_planes_gradient(dplanes, planes_gradient(k_c, dz, c), own, s0, c)
        dk_c += unproject(dz, W, W_rest, c)
    if c.decay:
        if not c.is_global:
            dG += load_scalars(row_in, b, t, h, n, c)
        store_scalars(dlog_decay, tl.cumsum(dG, 0, reverse=True) + flow, b, t, h, n, c)
    store_rows(open_rows(dk, b, h, end, c.D, c.BD, c), dk_c, t, c.D, c.BD, c)
    store_rows(open_rows(dv, b, h, end, c.Dv, c.BV, c), dv_c, t, c.Dv, c.BV, c)
    tl.store(dbeta + own, tl.sum(db, 0))
