"""The passes over materialized states, for many features or for "bucket": a tile is one chunk and reads its stored state.

Features go in blocks of SB. The formulas are those of ``recurrent_fwd.py`` and ``recurrent_bwd.py``. "bucket" divides each
query feature by the mass of its bucket, the tokens of the chunk included; with a_s = e_s = <M_s, do>:

    w_s(i) = phi_s(q_i) / (m_s(i) + eps)          dphi(q_i)_s = a_s / (m_s + eps)
    C_s(j) = sum_{i >= j} w_s(i) do_i             c_s(j) = - sum_{i >= j} w_s(i) a_s(i) / (m_s(i) + eps)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from race_dist.kernels.decay import causal_decay, causal_decay_transposed, decay_from_start, decay_to_end, load_decay
from race_dist.kernels.products import matmul, matmul_split_lhs, matmul_split_rhs, round_operand, split_operand, to_operand
from race_dist.kernels.rows import (
    load_head_rows,
    load_key_mask,
    load_scalars,
    locate_tile,
    store_head_rows,
    store_scalars,
)
from race_dist.kernels.soft_hash import (
    bucket_features,
    key_features,
    load_block_hash_operands,
    planes_gradient,
    soft_hash,
    soft_hash_backward,
    store_planes_gradient,
    tanh_projection,
    unproject,
)
from race_dist.kernels.state import BUCKET_EPS, inverse_den, load_state, store_state, tile_end_decay_gradient


@triton.jit
def race_materialized_fwd_kernel(x, out, den, states, tiling, c: tl.constexpr):
    """Program (tile, head) of :class:`Inputs` ``x``: writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``.

    ``states [tiles, H, S (Dv + 1)]``: the state before each tile (not causal: the totals, one per sequence)."""
    q, k, v, planes, log_decay, key_mask = x.q, x.k, x.v, x.planes, x.log_decay, x.key_mask
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b, t, end = tile.batch, tile.start, tile.end
    n = end - t
    state_index = (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h
    beta = tl.load(x.beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    present = load_key_mask(key_mask, b, t, n, c)  # [C]
    for g in tl.range(0, c.G, num_stages=1):
        hq = h * c.G + g
        num = tl.zeros([c.C, c.BV], tl.float32)
        total = tl.zeros([c.C], tl.float32)
        A = tl.zeros([c.C, c.C], tl.float32)
        for block in tl.range(0, c.NSB, num_stages=1):
            s0 = block * c.SB
            hash = load_block_hash_operands(planes, beta, h, s0, c)
            M, m = load_state(states, state_index, s0, c)  # [SB, BV], [SB]
            q_c = load_head_rows(q, b, t, hq, end, c.D, c.BD, c)  # [C, BD]
            Fq = soft_hash(q_c, hash, s0, c)  # [C, SB]
            if c.causal:
                k_c = load_head_rows(k, b, t, h, end, c.D, c.BD, c)  # [C, BD]
                Fk = to_operand(key_features(k_c, hash, present, s0, c), c)  # [C, SB]
                if c.is_bucket:
                    Fq = Fq / (bucket_masses(m, Fk, t, G, c) + BUCKET_EPS)
                Fq = round_operand(Fq, c)
                A += matmul(to_operand(Fq, c), tl.trans(Fk))
            else:
                if c.is_bucket:
                    Fq = Fq / (m[None, :] + BUCKET_EPS)
                Fq = round_operand(Fq, c)
            num += matmul(to_operand(Fq, c), to_operand(M, c))
            if c.is_global:
                total += tl.sum(Fq * m[None, :], 1)
        num = decay_from_start(num, G, c)
        if c.decay:
            total *= tl.exp2(G.high)
        if c.causal:
            A = round_operand(causal_decay(A, t, G, c), c)
            num += matmul(to_operand(A, c), to_operand(load_head_rows(v, b, t, h, end, c.Dv, c.BV, c), c))
            total += tl.sum(A, 1)
        if c.is_global:
            num *= inverse_den(total)[:, None]
            store_scalars(den, total, b, t, hq, n, c)
        store_head_rows(out, num, b, t, hq, end, c.Dv, c.BV, c)


@triton.jit
def bucket_masses(m, Fk, t, G, c: tl.constexpr):
    """Each bucket's mass ``[C, SB]`` at each token of the chunk, the token included: ``m [SB]`` before it, ``Fk [C, SB]``."""
    before = decay_from_start(tl.zeros([c.C, c.SB], tl.float32) + m[None, :], G, c)
    ones = causal_decay(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c)
    return before + matmul(to_operand(ones, c), Fk)


class QueryProducts(NamedTuple):
    """Of a chunk's queries and one block of features, ``[C, SB]`` each: the projection (``[C, LPB]``), phi(q), e, and the
    masses that the queries read (plus eps for "bucket")."""

    projection: Any
    Fq: Any
    e: Any
    masses: Any


@triton.jit
def query_products(q_c, do_c, A, M, m, Fk, hash, t, G, s0, c: tl.constexpr):
    """The :class:`QueryProducts`. ``q_c [C, BD]``, ``do_c [C, BV]``, ``A`` 2 x ``[C, C]`` (causal do v^T), ``M [SB, BV]``,
    ``m [SB]``, ``Fk [C, SB]``."""
    projection = tanh_projection(q_c, hash, c)
    Fq = bucket_features(projection, hash, s0, c)
    e = decay_from_start(matmul_split_rhs(do_c, split_operand(tl.trans(M), c), None, c), G, c)
    masses = tl.zeros([c.C, c.SB], tl.float32) + m[None, :]
    if c.causal:
        e = matmul_split_lhs(A, Fk, e, c)
        if c.is_global or c.is_bucket:
            masses = bucket_masses(m, Fk, t, G, c)
    if c.is_bucket:
        masses += BUCKET_EPS
    return QueryProducts(projection, Fq, e, masses)


@triton.jit
def race_materialized_bwd_dq_kernel(x, dout, saved, grads, tiling, c: tl.constexpr):
    """Program (tile, head): what ``race_recurrent_bwd_dq_kernel`` does, for one chunk, and the chunk's sum of the suffix state.

    "global" needs e of every block for h before the first block's gradient: two passes over the blocks."""
    q, k, v, planes, log_decay, key_mask = x.q, x.k, x.v, x.planes, x.log_decay, x.key_mask
    den, states, grad_h, dq, dcumulative = saved.den, saved.states, grads.h, grads.dq, grads.dcumulative
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b, t, end = tile.batch, tile.start, tile.end
    n = end - t
    state_index = (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h
    index = tile_index.to(tl.int64) * H + h
    beta = tl.load(x.beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    present = load_key_mask(key_mask, b, t, n, c)  # [C]
    dbeta = tl.zeros([c.C], tl.float32)
    dcumulative_c = tl.zeros([c.C], tl.float32)
    for g in tl.static_range(c.G):
        hq = h * c.G + g
        q_c = load_head_rows(q, b, t, hq, end, c.D, c.BD, c)  # [C, BD]
        do_c = to_operand(load_head_rows(dout, b, t, hq, end, c.Dv, c.BV, c), c)  # [C, BV]
        A = split_operand(tl.zeros([c.C, c.C], tl.float32), c)  # 2 x [C, C]
        if c.causal:
            k_c = load_head_rows(k, b, t, h, end, c.D, c.BD, c)  # [C, BD]
            v_c = to_operand(load_head_rows(v, b, t, h, end, c.Dv, c.BV, c), c)  # [C, BV]
            A = split_operand(causal_decay(matmul(do_c, tl.trans(v_c)), t, G, c), c)
        r = tl.full([c.C], 1.0, tl.float32)
        h_c = tl.zeros([c.C], tl.float32)
        if c.is_global:
            r = inverse_den(load_scalars(den, b, t, hq, n, c))
            for block in tl.range(0, c.NSB, num_stages=1):
                s0 = block * c.SB
                hash = load_block_hash_operands(planes, beta, h, s0, c)
                M, m = load_state(states, state_index, s0, c)  # [SB, BV], [SB]
                Fk = A[0]
                if c.causal:
                    Fk = to_operand(key_features(k_c, hash, present, s0, c), c)  # [C, SB]
                read = query_products(q_c, do_c, A, M, m, Fk, hash, t, G, s0, c)
                h_c -= r * tl.sum(read.Fq * read.e, 1)
            store_scalars(grad_h, h_c, b, t, hq, n, c)
        dq_c = tl.zeros([c.C, c.BD], tl.float32)
        for block in tl.range(0, c.NSB, num_stages=1):
            s0 = block * c.SB
            hash = load_block_hash_operands(planes, beta, h, s0, c)
            M, m = load_state(states, state_index, s0, c)  # [SB, BV], [SB]
            Fk = A[0]
            if c.causal:
                Fk = to_operand(key_features(k_c, hash, present, s0, c), c)  # [C, SB]
            read = query_products(q_c, do_c, A, M, m, Fk, hash, t, G, s0, c)
            if c.is_bucket:
                y = read.Fq * (read.e / read.masses)  # [C, SB]
                w = read.Fq / read.masses
                dm = -y / read.masses
                dcumulative_c -= BUCKET_EPS * tl.sum(dm, 1)
            else:
                y = r[:, None] * (read.Fq * (read.e + h_c[:, None] * read.masses))
                w = r[:, None] * read.Fq
                dm = tl.zeros([c.C, c.SB], tl.float32)
                dcumulative_c += tl.sum(y, 1)
            dz, dbeta_c = soft_hash_backward(y, read.projection, hash, c)  # [C, LPB], [C]
            dbeta += dbeta_c
            if c.need_planes:
                add_planes_gradient(grads.dplanes, planes_gradient(q_c, dz, c), index, s0, g == 0, c)
            dq_c += unproject(dz, hash, c)
            w = round_operand(decay_from_start(w, G, c), c)
            C_sum = matmul(tl.trans(to_operand(w, c)), do_c)  # [SB, BV]
            c_sum = tl.sum(w * h_c[:, None] if c.is_global else decay_from_start(dm, G, c), 0)  # [SB]
            if g > 0:
                C_old, c_old = load_state(grads.suffix.states, index, s0, c)
                C_sum += C_old
                c_sum += c_old
            store_state(grads.suffix.states, index, s0, C_sum, c_sum, c)
        store_head_rows(dq, dq_c, b, t, hq, end, c.D, c.BD, c)
    tl.store(grads.dbeta + index, tl.sum(dbeta, 0))
    if c.decay:
        tl.store(grads.suffix.decays + index, G.total)
        if not c.is_global:
            store_scalars(dcumulative, dcumulative_c, b, t, h, n, c)


@triton.jit
def add_planes_gradient(dplanes, part, index, s0, first: tl.constexpr, c: tl.constexpr):
    """Add this query head's ``part [LPB, BD]`` to the sum over the program's earlier heads."""
    if not first:
        d = tl.arange(0, c.BD)
        slot = tl.arange(0, c.LPB)
        part += tl.load(dplanes + (index * c.NSB + s0 // c.SB) * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :])
    store_planes_gradient(dplanes, part, index, s0, c)


@triton.jit
def race_materialized_bwd_dkv_kernel(x, dout, saved, grad_h, dcumulative, suffixes, grads, tiling, c: tl.constexpr):
    """Program (tile, head): what ``race_recurrent_bwd_dkv_kernel`` does, for one chunk."""
    q, k, v, planes, log_decay, key_mask = x.q, x.k, x.v, x.planes, x.log_decay, x.key_mask
    den, states = saved.den, saved.states
    dk, dv, dlog_decay = grads.dk, grads.dv, grads.dlog_decay
    H = tiling.H
    h = (tl.program_id(0) % H).to(tl.int64)
    tile_index = tl.program_id(0) // H
    tile = locate_tile(tiling, tile_index, c)
    b, t, end = tile.batch, tile.start, tile.end
    n = end - t
    state_index = (tile_index if c.causal else tile.sequence).to(tl.int64) * H + h
    index = tile_index.to(tl.int64) * H + h
    beta = tl.load(x.beta + h).to(tl.float32)
    G = load_decay(log_decay, b, t, h, n, c)
    present = load_key_mask(key_mask, b, t, n, c)  # [C]
    k_c = load_head_rows(k, b, t, h, end, c.D, c.BD, c)  # [C, BD]
    v_c = to_operand(load_head_rows(v, b, t, h, end, c.Dv, c.BV, c), c)  # [C, BV]
    dk_c = tl.zeros([c.C, c.BD], tl.float32)
    dv_c = tl.zeros([c.C, c.BV], tl.float32)
    dbeta = tl.zeros([c.C], tl.float32)
    dG = tl.zeros([c.C], tl.float32)
    dG_after = 0.0
    for block in tl.range(0, c.NSB, num_stages=1):
        s0 = block * c.SB
        hash = load_block_hash_operands(planes, beta, h, s0, c)
        Cs, cs = load_state(suffixes, state_index, s0, c)  # [SB, BV], [SB]
        if c.decay:
            dG_after += tile_end_decay_gradient(states, saved.final, Cs, cs, tile_index, tile, h, H, s0, c)
        projection = tanh_projection(k_c, hash, c)  # [C, LPB]
        Fk = tl.where(present[:, None], bucket_features(projection, hash, s0, c), 0.0)  # [C, SB]
        Fk_operand = to_operand(Fk, c)
        dphi = matmul_split_rhs(v_c, split_operand(tl.trans(Cs), c), None, c) + cs[None, :]  # [C, SB]
        dphi = decay_to_end(dphi, G, c)
        dv_c += decay_to_end(matmul(Fk_operand, to_operand(Cs, c)), G, c)
        if c.causal:
            for g in tl.static_range(c.G):
                hq = h * c.G + g
                q_c = load_head_rows(q, b, t, hq, end, c.D, c.BD, c)  # [C, BD]
                do_c = to_operand(load_head_rows(dout, b, t, hq, end, c.Dv, c.BV, c), c)  # [C, BV]
                A = matmul(v_c, tl.trans(do_c))  # [C, C]: keys, queries
                if c.is_bucket:
                    M, m = load_state(states, state_index, s0, c)  # [SB, BV], [SB]
                    A_q = split_operand(causal_decay(tl.trans(A), t, G, c), c)  # 2 x [C, C]
                    read = query_products(q_c, do_c, A_q, M, m, Fk_operand, hash, t, G, s0, c)
                    w = read.Fq / read.masses  # [C, SB]
                    ones = causal_decay_transposed(tl.full([c.C, c.C], 1.0, tl.float32), t, G, c)  # [C, C]
                    dphi -= matmul(to_operand(ones, c), to_operand(w * read.e / read.masses, c))
                else:
                    w = soft_hash(q_c, hash, s0, c)  # [C, SB]
                if c.is_global:
                    w *= inverse_den(load_scalars(den, b, t, hq, n, c))[:, None]
                    A += load_scalars(grad_h, b, t, hq, n, c)[None, :]
                w_operand = to_operand(w, c)
                dphi += matmul(to_operand(causal_decay_transposed(A, t, G, c), c), w_operand)
                P = causal_decay_transposed(matmul(Fk_operand, tl.trans(w_operand)), t, G, c)  # [C, C]: keys, queries
                dv_c += matmul(to_operand(P, c), do_c)
        y = Fk * dphi
        dG -= tl.sum(y, 1)
        dz, dbeta_c = soft_hash_backward(y, projection, hash, c)  # [C, LPB], [C]
        dbeta += dbeta_c
        if c.need_planes:
            store_planes_gradient(grads.dplanes, planes_gradient(k_c, dz, c), index, s0, c)
        dk_c += unproject(dz, hash, c)
    if c.decay:
        if not c.is_global:
            dG += load_scalars(dcumulative, b, t, h, n, c)
        store_scalars(dlog_decay, tl.cumsum(dG, 0, reverse=True) + dG_after, b, t, h, n, c)
    store_head_rows(dk, dk_c, b, t, h, end, c.D, c.BD, c)
    store_head_rows(dv, dv_c, b, t, h, end, c.Dv, c.BV, c)
    tl.store(grads.dbeta + index, tl.sum(dbeta, 0))
