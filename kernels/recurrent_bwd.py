"""The backward pass as two chunk recurrences over a tile: forwards with the prefix state, then backwards with the suffix state.

With r = 1 / den ("global") or 1, and w = r * phi(q), the weights a query reads buckets with:

    e_i = M(i) do_i                     dphi(q_i) = r_i (e_i + h_i m(i))        h_i = -r_i <phi(q_i), e_i>  ("global")
    C(j) = sum_{i >= j} w_i do_i^T      c(j) = sum_{i >= j} w_i h_i
    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)

e and h come from the same rounded numbers, so what they have in common cancels: h is never computed from a 16-bit output.
For one block of features (S <= SB).
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.decay import (
    causal_decay,
    causal_decay_transposed,
    decay_from_start,
    decay_over_chunk,
    decay_to_end,
    load_decay,
)
from race_dist.kernels.products import matmul, matmul_split_lhs, matmul_split_rhs, round_operand, split_operand, to_operand
from race_dist.kernels.rows import (
    load_key_mask,
    load_rows,
    load_scalars,
    locate_tile,
    open_heads,
    store_rows,
    store_scalars,
)
from race_dist.kernels.soft_hash import (
    bucket_features,
    center_feature_gradient,
    key_features,
    load_hash_operands,
    planes_gradient,
    soft_hash,
    soft_hash_backward,
    store_planes_gradient,
    tanh_projection,
    unproject,
)
from race_dist.kernels.state import inverse_den, load_state, tile_end_decay_gradient


@triton.jit
def race_recurrent_bwd_dq_kernel(x, dout, saved, grads, tiling, c: tl.constexpr):
    """Program (tile, head) of :class:`Inputs` ``x``, chunks in order: writes the :class:`QueryGradients` ``grads``.

    ``dout [B, T, Hq, Dv]``, ``saved``: :class:`Residuals`. The tile's sums of C and c are computed by
    ``race_tile_sums_bwd_kernel``: they would not fit in registers beside M."""
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b = tile.batch
    hash = load_hash_operands(x, h, 0, c)
    M, m = load_state(saved.states, (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h, 0, c)
    dbeta = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dplanes = tl.zeros([c.LPB, c.BD], tl.float32)
    k_rows = open_heads(x.k, b, h, 1, tile.end, c.D, c.BD, c)
    v_rows = open_heads(x.v, b, h, 1, tile.end, c.Dv, c.BV, c)
    q_rows = open_heads(x.q, b, h * c.G, c.G, tile.end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h * c.G, c.G, tile.end, c.Dv, c.BV, c)
    log_decay, key_mask, den = x.log_decay, x.key_mask, saved.den
    grad_h, dcumulative = grads.h, grads.dcumulative
    dq_rows = open_heads(grads.dq, b, h * c.G, c.G, tile.end, c.D, c.BD, c)
    for t in tl.range(tile.start, tile.end, c.C, num_stages=c.stages):
        n = tile.end - t
        G = load_decay(log_decay, b, t, h, n, c)
        M_before = split_operand(tl.trans(M), c)  # 2 x [BV, SB]
        m_before = m  # [SB]
        if c.causal:
            k_c = load_rows(k_rows, 0, t, c.D, c.BD, c)  # [C, BD]
            v_c = to_operand(load_rows(v_rows, 0, t, c.Dv, c.BV, c), c)  # [C, BV]
            present = load_key_mask(key_mask, b, t, n, c)  # [C]
            Fk = round_operand(key_features(k_c, hash, present, 0, c), c)  # [C, SB]
            Fk_operand = to_operand(Fk, c)
            Fk = round_operand(decay_to_end(Fk, G, c), c) if c.decay else Fk
            M = matmul(tl.trans(to_operand(Fk, c)), v_c, decay_over_chunk(M, G, c))
            m = decay_over_chunk(m, G, c) + tl.sum(Fk, 0)
        if c.decay:
            dcumulative_c = tl.zeros([c.C], tl.float32)
        for g in tl.static_range(c.G):
            hq = h * c.G + g
            do_c = to_operand(load_rows(do_rows, g, t, c.Dv, c.BV, c), c)  # [C, BV]
            e = decay_from_start(matmul_split_rhs(do_c, M_before, None, c), G, c)  # [C, SB]
            if c.causal:
                A = causal_decay(matmul(do_c, tl.trans(v_c)), t, G, c)  # [C, C]
                e = matmul_split_lhs(split_operand(A, c), Fk_operand, e, c)
            q_c = load_rows(q_rows, g, t, c.D, c.BD, c)  # [C, BD]
            projection = tanh_projection(q_c, hash, c)  # [C, LPB]
            w = bucket_features(projection, hash, 0, c)  # [C, SB]
            if c.is_global:
                r = inverse_den(load_scalars(den, b, t, hq, n, c))  # [C]
                y = w * e
                h_c = -r * tl.sum(y, 1)  # [C]
                store_scalars(grad_h, h_c, b, t, hq, n, c)
                w *= r[:, None]
                m_c = decay_from_start(tl.zeros([c.C, c.SB], tl.float32) + m_before[None, :], G, c)  # [C, SB]
                if c.causal:
                    ones = causal_decay(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c)  # [C, C]
                    m_c = matmul(to_operand(ones, c), Fk_operand, m_c)
                y = r[:, None] * y + w * (h_c[:, None] * m_c)
            else:
                y, total = center_feature_gradient(w, e, c)  # [C, SB], [C]
                if c.decay:
                    dcumulative_c += total
            dz, dbeta_c = soft_hash_backward(y, projection, hash, c)  # [C, LPB], [C]
            dbeta += dbeta_c
            if c.need_planes:
                dplanes += planes_gradient(q_c, dz, c)
            store_rows(dq_rows, g, unproject(dz, hash, c), t, c.D, c.BD, c)
        if c.decay and not c.is_global:
            store_scalars(dcumulative, dcumulative_c, b, t, h, n, c)
    index = tile_index.to(tl.int64) * H + h
    tl.store(grads.dbeta + index, tl.sum(dbeta, 0))
    if c.need_planes:
        store_planes_gradient(grads.dplanes, dplanes, index, 0, c)


@triton.jit
def race_recurrent_bwd_dkv_kernel(x, dout, saved, grad_h, dcumulative, suffixes, grads, tiling, c: tl.constexpr):
    """Program (tile, head) of :class:`Inputs` ``x``, chunks in reverse: writes the :class:`KeyGradients` ``grads``.

    ``dout [B, T, Hq, Dv]``; ``saved``: :class:`Residuals`; ``grad_h [B, T, Hq]`` and ``dcumulative [B, T, H]`` from the pass
    over the queries; ``suffixes [tiles, H, S (Dv + 1)]``: the suffix state behind each tile."""
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b = tile.batch
    hash = load_hash_operands(x, h, 0, c)
    Cs, cs = load_state(suffixes, (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h, 0, c)  # [SB, BV], [SB]
    dbeta = tl.zeros([c.C], tl.float32)
    if c.need_planes:
        dplanes = tl.zeros([c.LPB, c.BD], tl.float32)
    if c.decay:
        dG_after = tile_end_decay_gradient(saved.states, saved.final, Cs, cs, tile_index, tile, h, H, 0, c)
    k_rows = open_heads(x.k, b, h, 1, tile.end, c.D, c.BD, c)
    v_rows = open_heads(x.v, b, h, 1, tile.end, c.Dv, c.BV, c)
    q_rows = open_heads(x.q, b, h * c.G, c.G, tile.end, c.D, c.BD, c)
    do_rows = open_heads(dout, b, h * c.G, c.G, tile.end, c.Dv, c.BV, c)
    log_decay, key_mask, den, dlog_decay = x.log_decay, x.key_mask, saved.den, grads.dlog_decay
    dk_rows = open_heads(grads.dk, b, h, 1, tile.end, c.D, c.BD, c)
    dv_rows = open_heads(grads.dv, b, h, 1, tile.end, c.Dv, c.BV, c)
    for step in tl.range(0, tile.end - tile.start, c.C, num_stages=c.stages):
        t = tile.start + ((tile.end - tile.start + c.C - 1) // c.C - 1) * c.C - step
        n = tile.end - t
        k_c = load_rows(k_rows, 0, t, c.D, c.BD, c)  # [C, BD]
        v_c = to_operand(load_rows(v_rows, 0, t, c.Dv, c.BV, c), c)  # [C, BV]
        G = load_decay(log_decay, b, t, h, n, c)
        present = load_key_mask(key_mask, b, t, n, c)  # [C]
        projection = tanh_projection(k_c, hash, c)  # [C, LPB]
        Fk = round_operand(tl.where(present[:, None], bucket_features(projection, hash, 0, c), 0.0), c)  # [C, SB]
        Fk_operand = to_operand(Fk, c)
        Cs_behind = split_operand(Cs, c)  # 2 x [SB, BV]
        cs_behind = cs  # [SB]
        if c.causal:
            Cs = decay_over_chunk(Cs, G, c)
            cs = decay_over_chunk(cs, G, c)
        for g in tl.static_range(c.G if c.causal else 1):
            hq = h * c.G + g
            if c.causal:
                q_c = load_rows(q_rows, g, t, c.D, c.BD, c)  # [C, BD]
                do_c = to_operand(load_rows(do_rows, g, t, c.Dv, c.BV, c), c)  # [C, BV]
                w = soft_hash(q_c, hash, 0, c)  # [C, SB]
                if c.is_global:
                    w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
                    h_c = load_scalars(grad_h, b, t, hq, n, c)  # [C]
                w = round_operand(w, c)
                w_operand = to_operand(w, c)
                P = causal_decay_transposed(matmul(Fk_operand, tl.trans(w_operand)), t, G, c)  # [C, C]: keys, queries
                P = to_operand(P, c)
                w = round_operand(decay_from_start(w, G, c), c) if c.decay else w
                Cs = matmul(tl.trans(to_operand(w, c)), do_c, Cs)
                if c.is_global:
                    cs += tl.sum(w * h_c[:, None], 0)
            if g == 0:
                dv_c = decay_to_end(matmul(Fk_operand, Cs_behind[0]), G, c)  # [C, BV]
            if c.causal:
                dv_c = matmul(P, do_c, dv_c)
            if g == c.G - 1 or not c.causal:  # stored before dphi is computed: both at once take too many registers
                store_rows(dv_rows, 0, dv_c, t, c.Dv, c.BV, c)
            if g == 0:
                Cs_transposed = (tl.trans(Cs_behind[0]), tl.trans(Cs_behind[1]))  # 2 x [BV, SB]
                dphi = matmul_split_rhs(v_c, Cs_transposed, None, c) + cs_behind[None, :]  # [C, SB]
                dphi = decay_to_end(dphi, G, c)
            if c.causal:
                A = matmul(v_c, tl.trans(do_c))  # [C, C]: keys, queries
                if c.is_global:
                    A += h_c[None, :]
                dphi = matmul(to_operand(causal_decay_transposed(A, t, G, c), c), w_operand, dphi)
        y, total = center_feature_gradient(Fk, dphi, c)  # [C, SB], [C]
        if c.decay:
            dG = -total
            if not c.is_global:
                dG += load_scalars(dcumulative, b, t, h, n, c)
            store_scalars(dlog_decay, tl.cumsum(dG, 0, reverse=True) + dG_after, b, t, h, n, c)
            dG_after += tl.sum(dG, 0)
        dz, dbeta_c = soft_hash_backward(y, projection, hash, c)  # [C, LPB], [C]
        dbeta += dbeta_c
        if c.need_planes:
            dplanes += planes_gradient(k_c, dz, c)
        store_rows(dk_rows, 0, unproject(dz, hash, c), t, c.D, c.BD, c)
    index = tile_index.to(tl.int64) * H + h
    tl.store(grads.dbeta + index, tl.sum(dbeta, 0))
    if c.need_planes:
        store_planes_gradient(grads.dplanes, dplanes, index, 0, c)
