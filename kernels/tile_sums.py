"""Tile sums: what one tile adds to a state. Forward pass: from the keys and values. Backward pass: from the queries.

    M = sum_j x_j phi(k_j)^T v_j     m = sum_j x_j phi(k_j)            x_j = exp(G_end - G_j): token j as seen after the tile
    C = sum_i x_i w_i^T do_i         c = sum_i x_i w_i h_i             x_i = exp(G_i): as token i sees the tile's start

Shapes: C tokens per chunk, SB features and BV value columns per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.decay import decay_from_start, decay_over_chunk, decay_to_end, load_decay
from race_dist.kernels.products import matmul, round_operand, to_operand
from race_dist.kernels.rows import (
    load_key_mask,
    load_rows,
    load_scalars,
    locate_tile,
    open_heads,
)
from race_dist.kernels.soft_hash import load_hash_operands, soft_hash
from race_dist.kernels.state import inverse_den, store_state


@triton.jit
def race_tile_sums_fwd_kernel(x, sums, tiling, c: tl.constexpr):
    """Program (tile, head, feature block) of :class:`Inputs` ``x``: writes its part of the :class:`TileStates` ``sums``."""
    pid = tl.program_id(0)
    H = tiling.H
    s0 = (pid % c.NSB) * c.SB
    h = ((pid // c.NSB) % H).to(tl.int64)
    tile_index = pid // (c.NSB * H)
    tile = locate_tile(tiling, tile_index, c)
    b = tile.batch
    hash = load_hash_operands(x, h, s0, c)
    log_decay, key_mask = x.log_decay, x.key_mask
    M = tl.zeros([c.SB, c.BV], tl.float32)
    m = tl.zeros([c.SB], tl.float32)
    total = (tile.start * 0).to(tl.float64)
    k_rows = open_heads(x.k, b, h, 1, tile.end, c.D, c.BD, c)
    v_rows = open_heads(x.v, b, h, 1, tile.end, c.Dv, c.BV, c)
    for t in tl.range(tile.start, tile.end, c.C, num_stages=c.stages):
        n = tile.end - t
        k_c = load_rows(k_rows, 0, t, c.D, c.BD, c)  # [C, BD]
        v_c = to_operand(load_rows(v_rows, 0, t, c.Dv, c.BV, c), c)  # [C, BV]
        G = load_decay(log_decay, b, t, h, n, c)
        phi = soft_hash(k_c, hash, s0, c)  # [C, SB]
        phi = tl.where(load_key_mask(key_mask, b, t, n, c)[:, None], phi, 0.0)
        phi = round_operand(decay_to_end(phi, G, c), c)
        M = matmul(tl.trans(to_operand(phi, c)), v_c, decay_over_chunk(M, G, c))
        m = decay_over_chunk(m, G, c) + tl.sum(phi, 0)
        if c.decay:
            total += G.total
    index = tile_index.to(tl.int64) * H + h
    store_state(sums.states, index, s0, M, m, c)
    if c.decay and s0 == 0:
        tl.store(sums.decays + index, total)


@triton.jit
def race_tile_sums_bwd_kernel(x, dout, den, grad_h, sums, tiling, c: tl.constexpr):
    """Program (tile, head, feature block): writes its part of the :class:`TileStates` ``sums`` of the suffix state.

    ``dout [B, T, Hq, Dv]``; ``den`` and ``grad_h [B, T, Hq]``: the denominators and their gradients ("global")."""
    pid = tl.program_id(0)
    H = tiling.H
    s0 = (pid % c.NSB) * c.SB
    h = ((pid // c.NSB) % H).to(tl.int64)
    tile_index = pid // (c.NSB * H)
    tile = locate_tile(tiling, tile_index, c)
    b = tile.batch
    hash = load_hash_operands(x, h, s0, c)
    log_decay = x.log_decay
    C_sum = tl.zeros([c.SB, c.BV], tl.float32)
    c_sum = tl.zeros([c.SB], tl.float32)
    reach = (tile.start * 0).to(tl.float64)  # log decay from the tile's first token to this chunk
    q_rows = open_heads(x.q, b, h * c.G, c.G, tile.end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h * c.G, c.G, tile.end, c.Dv, c.BV, c)
    for t in tl.range(tile.start, tile.end, c.C, num_stages=c.stages):
        n = tile.end - t
        G = load_decay(log_decay, b, t, h, n, c)
        for g in tl.static_range(c.G):
            hq = h * c.G + g
            q_c = load_rows(q_rows, g, t, c.D, c.BD, c)  # [C, BD]
            do_c = to_operand(load_rows(do_rows, g, t, c.Dv, c.BV, c), c)  # [C, BV]
            w = decay_from_start(soft_hash(q_c, hash, s0, c), G, c)  # [C, SB]
            if c.is_global:
                w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
            if c.decay:
                w *= tl.exp2(reach.to(tl.float32))
            w = round_operand(w, c)
            C_sum = matmul(tl.trans(to_operand(w, c)), do_c, C_sum)
            if c.is_global:
                c_sum += tl.sum(w * load_scalars(grad_h, b, t, hq, n, c)[:, None], 0)
        if c.decay:
            reach += G.total
    index = tile_index.to(tl.int64) * H + h
    store_state(sums.states, index, s0, C_sum, c_sum, c)
    if c.decay and s0 == 0:
        tl.store(sums.decays + index, reach)
