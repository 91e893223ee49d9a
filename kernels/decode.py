"""One token per row: the state takes it in and is read, in one launch. Elementwise: there is no matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.decay import MIN_LOG_DECAY
from race_dist.kernels.soft_hash import LOG2E
from race_dist.kernels.state import BUCKET_EPS, inverse_den


@triton.jit
def load_token(x, b, h, cols, X: tl.constexpr):
    """The one row of head h of ``x [B, 1, H, X]``, columns ``cols``; float32."""
    return tl.load(x.ptr + b * x.stride_b + h * x.stride_h + cols * x.stride_x, mask=cols < X, other=0.0).to(tl.float32)


@triton.jit
def token_features(row, planes, h, beta, s0, c: tl.constexpr):
    """``phi [SB]`` of one row ``[BD]``, features s0 on."""
    d = tl.arange(0, c.BD)
    slot = tl.arange(0, c.LPB)
    s = s0 + tl.arange(0, c.SB)
    table = s0 // c.R + slot // c.P
    inside = (slot < c.TABLES_PER_BLOCK * c.P) & (table < c.L)  # [LPB]
    offset = table[:, None] * planes.stride_l + (slot % c.P)[:, None] * planes.stride_p + d[None, :] * planes.stride_d
    W = tl.load(planes.ptr + h * planes.stride_h + offset, mask=inside[:, None] & (d < c.D)[None, :], other=0.0)  # [LPB, BD]
    z = tl.sum(W.to(tl.float32) * row[None, :], 1)  # [LPB]
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    t = (2.0 * LOG2E) * beta * tl.where(z < 0, -u, u)
    log1p = tl.log2(1.0 + tl.exp2(-tl.abs(t)))
    same_table = inside[:, None] & (table[:, None] == (s // c.R)[None, :])  # [LPB, SB]
    bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
    logs = tl.where(bit == 1, (tl.minimum(t, 0.0) - log1p)[:, None], (tl.minimum(-t, 0.0) - log1p)[:, None])
    return tl.where(s < c.S, tl.exp2(tl.sum(tl.where(same_table, logs, 0.0), 0)), 0.0)


@triton.jit
def race_decode_kernel(x, out, den, initial, final, H, c: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row, head, block of WIDTH value columns) of :class:`Inputs` ``x``: writes ``out [B, 1, Hq, Dv]``,
    ``den [B, 1, Hq]`` and the final :class:`Sketch`; ``initial``: a sketch or None."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (c.Dv + WIDTH - 1) // WIDTH
    value_block = pid % blocks
    h = pid // blocks % H
    b = pid // (blocks * H)
    d = tl.arange(0, c.BD)
    col = value_block * WIDTH + tl.arange(0, WIDTH)
    beta = tl.load(x.beta + h).to(tl.float32)
    k_row = load_token(x.k, b, h, d, c.D)  # [BD]
    v_row = load_token(x.v, b, h, col, c.Dv)  # [WIDTH]
    decay = 1.0
    if c.decay:
        rate = tl.load(x.log_decay.ptr + b * x.log_decay.stride_b + h * x.log_decay.stride_h).to(tl.float32)
        decay = tl.exp2(tl.maximum(rate, MIN_LOG_DECAY) * LOG2E)
    present = 1.0
    if c.masked:
        present = tl.where(tl.load(x.key_mask.ptr + b * x.key_mask.stride_b) != 0, 1.0, 0.0)
    state = b * H + h
    dtype = final.mass_ptr.dtype.element_ty  # sums run in the state's own precision
    for g in range(c.G):
        hq = h * c.G + g
        q_row = load_token(x.q, b, hq, d, c.D)  # [BD]
        num = tl.zeros([WIDTH], tl.float32)
        total = 0.0
        for block in range(c.NSB):
            s0 = block * c.SB
            s = s0 + tl.arange(0, c.SB)
            phi = token_features(k_row, x.planes, h, beta, s0, c) * present  # [SB]
            w = token_features(q_row, x.planes, h, beta, s0, c)  # [SB]
            at = state * c.S + s
            inside = (s < c.S)[:, None] & (col < c.Dv)[None, :]
            m = phi.to(dtype)  # [SB]
            M = (phi[:, None] * v_row[None, :]).to(dtype)  # [SB, WIDTH]
            if initial is not None:
                m += tl.load(initial.mass_ptr + at, mask=s < c.S, other=0.0) * decay
                M += tl.load(initial.values_ptr + at[:, None] * c.Dv + col[None, :], mask=inside, other=0.0) * decay
            if g == 0:
                tl.store(final.values_ptr + at[:, None] * c.Dv + col[None, :], M, mask=inside)
                tl.store(final.mass_ptr + at, m, mask=(s < c.S) & (value_block == 0))
            if c.is_bucket:
                w /= m.to(tl.float32) + BUCKET_EPS
            num += tl.sum(w[:, None] * M.to(tl.float32), 0)
            total += tl.sum(w * m.to(tl.float32), 0)
        if c.is_global:
            num *= inverse_den(total)
            tl.store(den.ptr + b * den.stride_b + hq * den.stride_h, total, mask=value_block == 0)
        pointer = out.ptr + b * out.stride_b + hq * out.stride_h + col * out.stride_x
        tl.store(pointer, num.to(out.ptr.dtype.element_ty), mask=col < c.Dv)
