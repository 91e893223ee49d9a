"""One token a row: the state takes it in and is read, in one launch. Elementwise: there is no matrix to multiply."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import BUCKET_EPS, LEAST_LOG_DECAY, LOG2E, inverse_den


@triton.jit
def load_token(x, b, h, cols, X: tl.constexpr):
    """The one row of head h of ``x [B, 1, H, X]``, columns ``cols``; float32."""
    return tl.load(x[0] + b * x[1] + h * x[3] + cols * x[4], mask=cols < X, other=0.0).to(tl.float32)


@triton.jit
def token_features(x, planes, h, beta, s0, c: tl.constexpr):
    """``phi [SB]`` of one row x ``[BD]``, features s0 on."""
    d = tl.arange(0, c.BD)
    slot = tl.arange(0, c.LPB)
    s = s0 + tl.arange(0, c.SB)
    table = s0 // c.R + slot // c.P
    real = (slot < c.TABLES_PER_BLOCK * c.P) & (table < c.L)
    offset = table[:, None] * planes[2] + (slot % c.P)[:, None] * planes[3] + d[None, :] * planes[4]
    W = tl.load(planes[0] + h * planes[1] + offset, mask=real[:, None] & (d < c.D)[None, :], other=0.0)
    z = tl.sum(W.to(tl.float32) * x[None, :], 1)
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    t = (2.0 * LOG2E) * beta * tl.where(z < 0, -u, u)
    tail = tl.log2(1.0 + tl.exp2(-tl.abs(t)))
    same = real[:, None] & (table[:, None] == (s // c.R)[None, :])
    bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
    logs = tl.where(bit == 1, (tl.minimum(t, 0.0) - tail)[:, None], (tl.minimum(-t, 0.0) - tail)[:, None])
    return tl.where(s < c.S, tl.exp2(tl.sum(tl.where(same, logs, 0.0), 0)), 0.0)


@triton.jit
def race_decode_kernel(
    q,
    k,
    v,
    out,
    den,
    planes,
    beta,
    log_decay,
    key_mask,
    initial_values,
    initial_mass,
    final_values,
    final_mass,
    H,
    c: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (row, head, block of WIDTH value columns): writes out ``[B, 1, Hq, Dv]``, den and the final state."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (c.Dv + WIDTH - 1) // WIDTH
    first = pid % blocks
    h = pid // blocks % H
    b = pid // (blocks * H)
    d = tl.arange(0, c.BD)
    col = first * WIDTH + tl.arange(0, WIDTH)
    sharp = tl.load(beta + h).to(tl.float32)
    k_row = load_token(k, b, h, d, c.D)
    v_row = load_token(v, b, h, col, c.Dv)
    kept = 1.0
    if c.decay:
        rate = tl.load(log_decay[0] + b * log_decay[1] + h * log_decay[3]).to(tl.float32)
        kept = tl.exp2(tl.maximum(rate, LEAST_LOG_DECAY) * LOG2E)
    counts = 1.0
    if c.masked:
        counts = tl.where(tl.load(key_mask[0] + b * key_mask[1]) != 0, 1.0, 0.0)
    state = b * H + h
    dtype = final_mass.dtype.element_ty  # sums run in the state's own precision
    for g in range(c.G):
        q_row = load_token(q, b, h * c.G + g, d, c.D)
        num = tl.zeros([WIDTH], tl.float32)
        total = 0.0
        for block in range(c.NSB):
            s0 = block * c.SB
            s = s0 + tl.arange(0, c.SB)
            phi = token_features(k_row, planes, h, sharp, s0, c) * counts
            w = token_features(q_row, planes, h, sharp, s0, c)
            at = state * c.S + s
            inside = (s < c.S)[:, None] & (col < c.Dv)[None, :]
            m = phi.to(dtype)
            M = (phi[:, None] * v_row[None, :]).to(dtype)
            if initial_mass is not None:
                m += tl.load(initial_mass + at, mask=s < c.S, other=0.0) * kept
                M += tl.load(initial_values + at[:, None] * c.Dv + col[None, :], mask=inside, other=0.0) * kept
            if g == 0:
                tl.store(final_values + at[:, None] * c.Dv + col[None, :], M, mask=inside)
                tl.store(final_mass + at, m, mask=(s < c.S) & (first == 0))
            if c.is_bucket:
                w /= m.to(tl.float32) + BUCKET_EPS
            num += tl.sum(w[:, None] * M.to(tl.float32), 0)
            total += tl.sum(w * m.to(tl.float32), 0)
        hq = h * c.G + g
        if c.is_global:
            num *= inverse_den(total)
            tl.store(den[0] + b * den[1] + hq * den[3], total, mask=first == 0)
        tl.store(out[0] + b * out[1] + hq * out[3] + col * out[4], num.to(out[0].dtype.element_ty), mask=col < c.Dv)
