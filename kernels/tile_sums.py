"""Tile sums: what one tile adds to a state. Forwards that of the keys, backwards that of the queries.

    M = sum_j x_j phi(k_j)^T v_j     m = sum_j x_j phi(k_j)            x_j: how much of token j is seen after the tile
    C = sum_i x_i w_i^T do_i         c = sum_i x_i w_i h_i             x_i: how much token i sees from before the tile

Shapes: C tokens a chunk, SB features and BV value columns a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import (
    corner_bits,
    entering,
    inverse_den,
    leaving,
    load_decay,
    load_keep,
    load_planes,
    load_rows,
    load_scalars,
    locate,
    low,
    mm,
    open_heads,
    open_rows,
    rounded,
    soft_hash,
    store_state,
    through,
)


@triton.jit
def race_tile_sums_fwd_kernel(k, v, planes, beta, log_decay, key_mask, sums, decays, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head, feature block): writes its part of ``sums [tile, H, S (Dv + 1)]``, and the
    tile's total log decay ``decays [tile, H]`` (binary units, float64)."""
    pid = tl.program_id(0)
    s0 = (pid % c.NSB) * c.SB
    h = ((pid // c.NSB) % H).to(tl.int64)
    tile = pid // (c.NSB * H)
    b, _, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, s0, c)
    ones, zeros = corner_bits(s0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    M = tl.zeros([c.SB, c.BV], tl.float32)
    m = tl.zeros([c.SB], tl.float32)
    total = (start * 0).to(tl.float64)
    k_rows = open_rows(k, b, h, end, c.D, c.BD, c)
    v_rows = open_rows(v, b, h, end, c.Dv, c.BV, c)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        k_c = load_rows(k_rows, t, c.D, c.BD, c)
        v_c = low(load_rows(v_rows, t, c.Dv, c.BV, c), c)
        G = load_decay(log_decay, b, t, h, n, c)
        phi = soft_hash(k_c, W, W_rest, ones, zeros, sharp, s0, c)
        phi = rounded(leaving(tl.where(load_keep(key_mask, b, t, n, c)[:, None], phi, 0.0), G, c), c)
        M = mm(tl.trans(low(phi, c)), v_c, through(M, G, c))
        m = through(m, G, c) + tl.sum(phi, 0)
        if c.decay:
            total += G[2]
    index = tile.to(tl.int64) * H + h
    store_state(sums, index, s0, M, m, c)
    if c.decay and s0 == 0:
        tl.store(decays + index, total)


@triton.jit
def race_tile_sums_bwd_kernel(q, dout, den, h_in, planes, beta, log_decay, sums, decays, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head, feature block): writes its part of ``sums [tile, H, S (Dv + 1)]`` of the suffix state, and the
    tile's total log decay."""
    pid = tl.program_id(0)
    s0 = (pid % c.NSB) * c.SB
    h = ((pid // c.NSB) % H).to(tl.int64)
    tile = pid // (c.NSB * H)
    b, _, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, s0, c)
    ones, zeros = corner_bits(s0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    C_sum = tl.zeros([c.SB, c.BV], tl.float32)
    c_sum = tl.zeros([c.SB], tl.float32)
    reach = (start * 0).to(tl.float64)  # log decay from the tile's first token to this chunk
    q_rows = open_heads(q, b, h, end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h, end, c.Dv, c.BV, c)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        G = load_decay(log_decay, b, t, h, n, c)
        for g in tl.static_range(c.G):
            q_c = load_rows(q_rows[g], t, c.D, c.BD, c)
            do_c = low(load_rows(do_rows[g], t, c.Dv, c.BV, c), c)
            w = entering(soft_hash(q_c, W, W_rest, ones, zeros, sharp, s0, c), G, c)
            if c.is_global:
                w *= inverse_den(load_scalars(den, b, t, h * c.G + g, n, c))[:, None]
            if c.decay:
                w *= tl.exp2(reach.to(tl.float32))
            w = rounded(w, c)
            C_sum = mm(tl.trans(low(w, c)), do_c, C_sum)
            if c.is_global:
                c_sum += tl.sum(w * load_scalars(h_in, b, t, h * c.G + g, n, c)[:, None], 0)
        if c.decay:
            reach += G[2]
    index = tile.to(tl.int64) * H + h
    store_state(sums, index, s0, C_sum, c_sum, c)
    if c.decay and s0 == 0:
        tl.store(decays + index, reach)
