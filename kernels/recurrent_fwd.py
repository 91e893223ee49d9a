"""The forward read-out as a walk: a tile's chunks in order, the state in registers.

For one block of features (S <= SB). With Fq, Fk the features of a chunk, M and m the state before it:

    num = Fq M + tril(Fq Fk^T) V        den = Fq m + tril(Fq Fk^T) 1        o = num / den
    M  += Fk^T V                        m  += Fk^T 1

Without ``causal`` the state is the total and nothing runs: o = Fq M / Fq m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import (
    corner_bits,
    entering,
    inverse_den,
    key_features,
    leaving,
    load_decay,
    load_keep,
    load_planes,
    load_rows,
    load_state,
    locate,
    low,
    mm,
    open_heads,
    open_rows,
    rounded,
    seen,
    soft_hash,
    store_rows,
    store_scalars,
    through,
)


@triton.jit
def race_recurrent_fwd_kernel(q, k, v, out, den, planes, beta, log_decay, key_mask, states, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head): writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``."""
    h = (tl.program_id(0) % H).to(tl.int64)
    tile = tl.program_id(0) // H
    b, row, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, 0, c)
    ones, zeros = corner_bits(0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    M, m = load_state(states, (tile if c.causal else row).to(tl.int64) * H + h, 0, c)
    k_rows = open_rows(k, b, h, end, c.D, c.BD, c)
    v_rows = open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows = open_heads(q, b, h, end, c.D, c.BD, c)
    out_rows = open_heads(out, b, h, end, c.Dv, c.BV, c)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        G = load_decay(log_decay, b, t, h, n, c)
        if c.causal:
            k_c = load_rows(k_rows, t, c.D, c.BD, c)
            v_c = low(load_rows(v_rows, t, c.Dv, c.BV, c), c)
            keep = load_keep(key_mask, b, t, n, c)
            Fk = rounded(key_features(k_c, W, W_rest, ones, zeros, sharp, keep, 0, c), c)
        for g in tl.static_range(c.G):
            q_c = load_rows(q_rows[g], t, c.D, c.BD, c)
            Fq = rounded(soft_hash(q_c, W, W_rest, ones, zeros, sharp, 0, c), c)
            num = entering(mm(low(Fq, c), low(M, c)), G, c)
            if c.causal:
                A = rounded(seen(mm(low(Fq, c), tl.trans(low(Fk, c))), t, G, c), c)
                num = mm(low(A, c), v_c, num)
            if c.is_global:
                weight = entering(Fq * m[None, :], G, c)
                total = tl.sum(weight, 1)
                if c.causal:
                    total += tl.sum(A, 1)
                num *= inverse_den(total)[:, None]
                store_scalars(den, total, b, t, h * c.G + g, n, c)
            store_rows(out_rows[g], num, t, c.Dv, c.BV, c)
        if c.causal:
            Fk = rounded(leaving(Fk, G, c), c) if c.decay else Fk
            M = mm(tl.trans(low(Fk, c)), v_c, through(M, G, c))
            m = through(m, G, c) + tl.sum(Fk, 0)
