"""The soft hash and its gradient.

    u = tanh(planes x)        phi[r] = prod_p sigmoid(+-2 beta u_p), + where bit p of bucket r is set

Letters: C tokens per chunk, D columns (padded to BD), S features in blocks of SB, LPB plane slots of a block of features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from race_dist.kernels.products import INTERPRET, matmul, matmul_split_lhs, split_operand, to_operand

LOG2E = tl.constexpr(1.4426950408889634)


class HashOperands(NamedTuple):
    """What the hash of one block of features multiplies by.

    ``planes``, ``planes_low [BD, LPB]``: their sum is the planes; ``set_bits``, ``clear_bits [LPB, SB]``: 1 where the
    feature's bucket has the plane's bit set, and clear; ``beta``: the head's, a scalar.
    """

    planes: Any
    planes_low: Any
    set_bits: Any
    clear_bits: Any
    beta: Any


class TanhProjection(NamedTuple):
    """``u = tanh(planes x)``, and the binary logarithms of ``sigmoid(2 beta u)`` and ``sigmoid(-2 beta u)``; ``[C, LPB]``."""

    u: Any
    log_set: Any
    log_clear: Any


@triton.jit
def load_hash_operands(x, h, s0, c: tl.constexpr):
    """The :class:`HashOperands` of features s0 .. s0 + SB of head h of :class:`Inputs` x."""
    high, low = load_planes(x.planes, h, s0, c)
    set_bits, clear_bits = bucket_bits(s0, c)
    return HashOperands(high, low, set_bits, clear_bits, tl.load(x.beta + h).to(tl.float32))


@triton.jit
def load_block_hash_operands(planes, beta, h, s0, c: tl.constexpr):
    """:func:`load_hash_operands` where the head's ``beta`` is loaded already."""
    high, low = load_planes(planes, h, s0, c)
    set_bits, clear_bits = bucket_bits(s0, c)
    return HashOperands(high, low, set_bits, clear_bits, beta)


@triton.jit
def load_planes(planes, h, s0, c: tl.constexpr):
    """The planes of features s0 .. s0 + SB, ``[BD, LPB]``, as two parts in the inputs' dtype (one, twice, where the planes
    have that dtype)."""
    slot = tl.arange(0, c.LPB)
    table = s0 // c.R + slot // c.P
    d = tl.arange(0, c.BD)
    inside = ((slot < c.TABLES_PER_BLOCK * c.P) & (table < c.L))[None, :] & (d < c.D)[:, None]
    offset = table[None, :] * planes.stride_l + (slot % c.P)[None, :] * planes.stride_p + d[:, None] * planes.stride_d
    W = tl.load(planes.ptr + h * planes.stride_h + offset, mask=inside, other=0.0)  # [BD, LPB]
    if c.fp32 or INTERPRET:
        return W.to(tl.float32), W.to(tl.float32)
    elif c.split_planes:
        W = W.to(tl.float32)
        if c.fp16:
            high = W.to(tl.float16)
            return high, (W - high.to(tl.float32)).to(tl.float16)
        else:
            high = W.to(tl.bfloat16)
            return high, (W - high.to(tl.float32)).to(tl.bfloat16)
    else:
        return W, W


@triton.jit
def bucket_bits(s0, c: tl.constexpr):
    """``set_bits`` and ``clear_bits`` of :class:`HashOperands`."""
    slot = tl.arange(0, c.LPB)
    s = s0 + tl.arange(0, c.SB)
    same_table = (s0 // c.R + slot // c.P)[:, None] == (s // c.R)[None, :]  # [LPB, SB]
    inside = same_table & (slot < c.TABLES_PER_BLOCK * c.P)[:, None] & (s < c.S)[None, :]
    bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1  # [LPB, SB]
    set_bits = to_operand((inside & (bit == 1)).to(tl.float32), c)
    clear_bits = to_operand((inside & (bit == 0)).to(tl.float32), c)
    return set_bits, clear_bits


@triton.jit
def project(x, hash, c: tl.constexpr):
    """``x @ planes``, ``[C, LPB]``, of rows ``x [C, BD]``."""
    if c.fp32 or INTERPRET:
        return matmul(x.to(tl.float32), hash.planes)
    elif c.split_planes:
        return matmul(x, hash.planes) + matmul(x, hash.planes_low)
    else:
        return matmul(x, hash.planes)


@triton.jit
def tanh_projection(x, hash, c: tl.constexpr):
    """The :class:`TanhProjection` of rows ``x [C, BD]``."""
    z = project(x, hash, c)  # [C, LPB]
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    u = tl.where(z < 0, -u, u)
    t = (2.0 * LOG2E) * hash.beta * u
    log1p = tl.log2(1.0 + tl.exp2(-tl.abs(t)))
    return TanhProjection(u, tl.minimum(t, 0.0) - log1p, tl.minimum(-t, 0.0) - log1p)


@triton.jit
def bucket_features(projection, hash, s0, c: tl.constexpr):
    """``phi [C, SB]``: the product of one sigmoid per plane of the table, as a sum of logarithms."""
    log_clear, log_set = split_operand(projection.log_clear, c), split_operand(projection.log_set, c)
    phi = matmul_split_lhs(log_set, hash.set_bits, None, c)
    phi = tl.exp2(matmul_split_lhs(log_clear, hash.clear_bits, phi, c))
    if c.S % c.SB != 0:
        phi = tl.where((s0 + tl.arange(0, c.SB) < c.S)[None, :], phi, 0.0)
    return phi


@triton.jit
def soft_hash(x, hash, s0, c: tl.constexpr):
    """``phi [C, SB]`` of rows ``x [C, BD]``."""
    return bucket_features(tanh_projection(x, hash, c), hash, s0, c)


@triton.jit
def key_features(k, hash, present, s0, c: tl.constexpr):
    """:func:`soft_hash` of keys, 0 for absent ones."""
    phi = soft_hash(k, hash, s0, c)
    return tl.where(present[:, None], phi, 0.0)


@triton.jit
def soft_hash_backward(y, projection, hash, c: tl.constexpr):
    """From ``y = phi * dphi [C, SB]``: ``dz [C, LPB]`` of the projections, and each row's part of dbeta, ``[C]``.

    A feature is a product of sigmoids, so y is the gradient of its logarithm; with t = 2 beta u,
    d log sigmoid(t) / dt = sigmoid(-t). A multiple of phi in y changes nothing: the chunk recurrence subtracts it
    (:func:`center_feature_gradient`), so that y can be rounded; a block of a table cannot, and keeps two parts.
    """
    if c.recurrent:
        y = to_operand(y, c)
        y_set = matmul(y, tl.trans(hash.set_bits))  # [C, LPB]
        y_clear = matmul(y, tl.trans(hash.clear_bits))
    else:
        y = split_operand(y, c)
        y_set = matmul_split_lhs(y, tl.trans(hash.set_bits), None, c)
        y_clear = matmul_split_lhs(y, tl.trans(hash.clear_bits), None, c)
    u = projection.u
    dt = y_set * tl.exp2(projection.log_clear) - y_clear * tl.exp2(projection.log_set)
    return 2.0 * hash.beta * dt * (1.0 - u * u), tl.sum(2.0 * u * dt, 1)


@triton.jit
def center_feature_gradient(phi, dphi, c: tl.constexpr):
    """``y = phi * dphi [C, SB]`` without its multiple of phi, and the sums ``[C]`` of ``phi * dphi`` over the features."""
    total = tl.sum(phi * dphi, 1)
    return phi * (dphi - (total / c.L)[:, None]), total


@triton.jit
def unproject(dz, hash, c: tl.constexpr):
    """``dz @ planes^T``, ``[C, BD]``."""
    if c.fp32 or INTERPRET:
        return matmul(to_operand(dz, c), tl.trans(hash.planes))
    elif c.fp16:
        dz = to_operand(dz, c)
        high = matmul(dz, tl.trans(hash.planes).to(tl.bfloat16))
        return high + matmul(dz, tl.trans(hash.planes_low).to(tl.bfloat16))
    elif c.split_planes:
        dz = to_operand(dz, c)
        return matmul(dz, tl.trans(hash.planes)) + matmul(dz, tl.trans(hash.planes_low))
    else:
        return matmul(to_operand(dz, c), tl.trans(hash.planes))


@triton.jit
def planes_gradient(x, dz, c: tl.constexpr):
    """``dz^T @ x``, ``[LPB, BD]``."""
    return matmul(tl.trans(to_operand(dz, c)), to_operand(x, c))


@triton.jit
def store_planes_gradient(dplanes, part, index, s0, c: tl.constexpr):
    """Store ``part [LPB, BD]`` of program ``index`` to ``dplanes [index, NSB, LPB, BD]``."""
    d = tl.arange(0, c.BD)
    slot = tl.arange(0, c.LPB)
    block = index * c.NSB + s0 // c.SB
    tl.store(dplanes + block * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :], part)
