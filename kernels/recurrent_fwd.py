"""The forward pass as a chunk recurrence: a tile's chunks in order, the state in registers.

For one block of features (S <= SB). With Fq, Fk the features of a chunk, M and m the state before it:

    num = Fq M + tril(Fq Fk^T) V        den = Fq m + tril(Fq Fk^T) 1        o = num / den
    M  += Fk^T V                        m  += Fk^T 1

Without ``causal`` the state is the total and stays: o = Fq M / Fq m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.decay import causal_decay, decay_from_start, decay_over_chunk, decay_to_end, load_decay
from race_dist.kernels.products import matmul, round_operand, to_operand
from race_dist.kernels.rows import (
    load_key_mask,
    load_rows,
    locate_tile,
    open_heads,
    store_rows,
    store_scalars,
)
from race_dist.kernels.soft_hash import key_features, load_hash_operands, soft_hash
from race_dist.kernels.state import inverse_den, load_state


@triton.jit
def race_recurrent_fwd_kernel(x, out, den, states, tiling, c: tl.constexpr):
    """Program (tile, head) of :class:`Inputs` ``x``: writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``.

    ``states [tiles, H, S (Dv + 1)]``: the state before each tile (not causal: the totals, one per sequence)."""
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b = tile.batch
    hash = load_hash_operands(x, h, 0, c)
    M, m = load_state(states, (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h, 0, c)  # [SB, BV], [SB]
    log_decay, key_mask = x.log_decay, x.key_mask
    k_rows = open_heads(x.k, b, h, 1, tile.end, c.D, c.BD, c)
    v_rows = open_heads(x.v, b, h, 1, tile.end, c.Dv, c.BV, c)
    q_rows = open_heads(x.q, b, h * c.G, c.G, tile.end, c.D, c.BD, c)
    out_rows = open_heads(out, b, h * c.G, c.G, tile.end, c.Dv, c.BV, c)
    for t in tl.range(tile.start, tile.end, c.C, num_stages=c.stages):
        n = tile.end - t
        G = load_decay(log_decay, b, t, h, n, c)
        if c.causal:
            k_c = load_rows(k_rows, 0, t, c.D, c.BD, c)  # [C, BD]
            v_c = to_operand(load_rows(v_rows, 0, t, c.Dv, c.BV, c), c)  # [C, BV]
            present = load_key_mask(key_mask, b, t, n, c)  # [C]
            Fk = round_operand(key_features(k_c, hash, present, 0, c), c)  # [C, SB]
        for g in tl.static_range(c.G):
            q_c = load_rows(q_rows, g, t, c.D, c.BD, c)  # [C, BD]
            Fq = round_operand(soft_hash(q_c, hash, 0, c), c)  # [C, SB]
            num = decay_from_start(matmul(to_operand(Fq, c), to_operand(M, c)), G, c)  # [C, BV]
            if c.causal:
                A = matmul(to_operand(Fq, c), tl.trans(to_operand(Fk, c)))  # [C, C]
                A = round_operand(causal_decay(A, t, G, c), c)
                num = matmul(to_operand(A, c), v_c, num)
            if c.is_global:
                total = tl.sum(decay_from_start(Fq * m[None, :], G, c), 1)  # [C]
                if c.causal:
                    total += tl.sum(A, 1)
                num *= inverse_den(total)[:, None]
                store_scalars(den, total, b, t, h * c.G + g, n, c)
            store_rows(out_rows, g, num, t, c.Dv, c.BV, c)
        if c.causal:
            Fk = round_operand(decay_to_end(Fk, G, c), c) if c.decay else Fk
            M = matmul(tl.trans(to_operand(Fk, c)), v_c, decay_over_chunk(M, G, c))
            m = decay_over_chunk(m, G, c) + tl.sum(Fk, 0)
