"""Tile sums: what the keys of one tile add to the sketch, ``sum_j w_j phi(k_j)^T [v_j | 1]``, w_j as seen after the tile.

Shapes: C tokens a chunk, SB features and BV value columns a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import (
    buckets, corner_bits, leaving, load_decay, load_keep, load_planes, load_rows, locate, low, mm, signs, store_state,
    through,
)


@triton.jit
def tile_sums(k, v, planes, beta, log_decay, key_mask, sums, decays, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head, feature block): writes its part of ``sums [tile, H, S (Dv + 1)]``, and the
    tile's total log decay ``decays [tile, H]`` (binary units, float64)."""
    pid = tl.program_id(0)
    s0 = (pid % c.NSB) * c.SB
    h = (pid // c.NSB) % H
    tile = pid // (c.NSB * H)
    b, _, start, end, _ = locate(tiles, tile, T, TILE, c)
    W, W_rest = load_planes(planes, h, s0, c)
    ones, zeros = corner_bits(s0, c)
    sharp = tl.load(beta + h).to(tl.float32)
    M = tl.zeros([c.SB, c.BV], tl.float32)
    m = tl.zeros([c.SB], tl.float32)
    total = (start * 0).to(tl.float64)
    for t in tl.range(start, end, c.C, num_stages=c.stages):
        n = end - t
        k_c = load_rows(k, b, t, h, n, c.D, c.BD, c)
        v_c = low(load_rows(v, b, t, h, n, c.Dv, c.BV, c), c)
        keep = load_keep(key_mask, b, t, n, c)
        G = load_decay(log_decay, b, t, h, n, c)
        u, log_on, log_off = signs(k_c, W, W_rest, sharp, c)
        phi = tl.where(keep[:, None], buckets(log_on, log_off, ones, zeros, s0, c), 0.0)
        phi = low(leaving(phi, G, c), c)
        M = through(M, G, c) + mm(tl.trans(phi), v_c)
        m = through(m, G, c) + tl.sum(phi.to(tl.float32), 0)
        if c.decay:
            total += G[2]
    index = tile.to(tl.int64) * H + h
    store_state(sums, index, s0, M, m, c)
    if c.decay and s0 == 0:
        tl.store(decays + index, total)
