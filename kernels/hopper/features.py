"""The soft hash, and its gradient, on operands in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import LOG2E
from race_dist.kernels.hopper.layouts import by_rows, left, product, rounded, tile
from race_dist.kernels.hopper.rings import await_empty, next_full, operands, set_empty, set_full


@gluon.jit
def put_planes(planes, h, c: gl.constexpr):
    """The planes ``[LPB, BD]`` and, for each block of features, slot and feature, whether the corner has the plane's bit
    set, and whether it has it clear ``[NSB, LPB, SB]``, as operands in shared memory."""
    layout: gl.constexpr = by_rows(c.BD)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, layout))
    d = gl.arange(0, c.BD, gl.SliceLayout(0, layout))
    offset = (slot // c.P)[:, None] * planes[2] + (slot % c.P)[:, None] * planes[3] + d[None, :] * planes[4]
    W = gl.load(planes[0] + h * planes[1] + offset, mask=(slot < c.L * c.P)[:, None] & (d < c.D)[None, :], other=0.0)
    W = gl.allocate_shared_memory(gl.bfloat16, [c.LPB, c.BD], tile(c.LPB, c.BD), W.to(gl.bfloat16))
    ones = operands(c.NSB, c.LPB, c.SB)
    zeros = operands(c.NSB, c.LPB, c.SB)
    bits: gl.constexpr = by_rows(c.SB)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, bits))
    for n in gl.static_range(c.NSB):
        s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(0, bits))
        same = ((slot // c.P)[:, None] == (s // c.R)[None, :]) & (slot < c.L * c.P)[:, None] & (s < c.S)[None, :]
        bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
        ones.index(n).store((same & (bit == 1)).to(gl.bfloat16))
        zeros.index(n).store((same & (bit == 0)).to(gl.bfloat16))
    fence_async_shared()
    return W, ones, zeros


@gluon.jit
def project(x, W, c: gl.constexpr):
    """Begin ``x @ planes^T``, ``[C, LPB]``."""
    nothing = gl.zeros([c.C, c.LPB], gl.float32, product(c.LPB))
    return warpgroup_mma(x, W.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def exp2(x):
    """``2**x`` in one instruction; 0 where that is below float32's normal numbers, as a bfloat16 feature may be."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def log2(x):
    """The binary logarithm of 1 to 2, right to 2**-22, in one instruction."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def take_signs(ring, j, planes_s, c: gl.constexpr):
    """``u [C, LPB]`` of turn j's rows, which are given back."""
    z = project(next_full(ring, j), planes_s[0], c)
    u = signs(warpgroup_mma_wait(0, (z,)))
    set_empty(ring, j)
    return u


@gluon.jit
def put_operand(ring, j, x):
    """Hand on x as turn j's operand."""
    ring[2].index(await_empty(ring, j)).store(x.to(gl.bfloat16))
    set_full(ring, j)


@gluon.jit
def signs(z):
    """``tanh(z)``."""
    e = exp2(gl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    return gl.where(z < 0, -u, u)


@gluon.jit
def log_sigmoids(u, beta):
    """Binary logarithms of ``sigmoid(2 beta u)`` and ``sigmoid(-2 beta u)``."""
    t = (2.0 * LOG2E) * beta * u
    tail = log2(1.0 + exp2(-gl.abs(t)))
    return gl.minimum(t, 0.0) - tail, gl.minimum(-t, 0.0) - tail


@gluon.jit
def one_part(x, layout: gl.constexpr):
    """x rounded to a bfloat16 operand."""
    return gl.convert_layout(x.to(gl.bfloat16), layout)


@gluon.jit
def two_parts(x, layout: gl.constexpr):
    """x as the sum of two bfloat16 operands."""
    high = rounded(x)
    return one_part(high, layout), one_part(x - high, layout)


@gluon.jit
def log_operands(u, beta, c: gl.constexpr):
    """The logarithms of :func:`log_sigmoids`, each in two parts."""
    on, off = log_sigmoids(u, beta)
    return two_parts(on, left(c.SB)) + two_parts(off, left(c.SB))


@gluon.jit
def buckets(logs, n, planes_s, c: gl.constexpr):
    """``phi [C, SB]`` of block n, float32: the product over a table's planes of one sigmoid each, as a sum of
    logarithms."""
    ones, zeros = planes_s[1].index(n), planes_s[2].index(n)
    phi = gl.zeros([c.C, c.SB], gl.float32, product(c.SB))
    phi = warpgroup_mma(logs[0], ones, phi, use_acc=False, is_async=True)
    phi = warpgroup_mma(logs[1], ones, phi, is_async=True)
    phi = warpgroup_mma(logs[2], zeros, phi, is_async=True)
    phi = warpgroup_mma(logs[3], zeros, phi, is_async=True)
    phi = exp2(warpgroup_mma_wait(0, (phi,)))
    if c.S % c.SB != 0:
        phi = gl.where((n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(0, product(c.SB))) < c.S)[None, :], phi, 0.0)
    return phi


@gluon.jit
def load_keep(key_mask, b, t, n, c: gl.constexpr):
    """Which of a chunk's keys count, ``[C]``."""
    rows = gl.arange(0, c.C, gl.SliceLayout(1, product(c.SB)))
    keep = rows < n
    if c.masked:
        keep = keep & (gl.load(key_mask[0] + b * key_mask[1] + (t + rows) * key_mask[2], mask=keep, other=0) != 0)
    return keep


@gluon.jit
def no_corners(c: gl.constexpr):
    """The sums of :func:`add_corners` over nothing."""
    return gl.zeros([c.C, c.LPB], gl.float32, product(c.LPB)), gl.zeros([c.C, c.LPB], gl.float32, product(c.LPB))


@gluon.jit
def begin_corners(sums, y, n, planes_s, c: gl.constexpr):
    """Begin to add ``y [C, SB]`` of block n to its sums over the corners that have a plane's bit set, and clear, ``[C, LPB]``
    each.

    What every plane shares of y cancels between the two: one block takes it out before it rounds, several keep two parts.
    """
    on, off = sums
    ones, zeros = planes_s[1].index(n).permute((1, 0)), planes_s[2].index(n).permute((1, 0))
    if c.NSB == 1:
        y = one_part(y, left(c.LPB))
        on = warpgroup_mma(y, ones, on, is_async=True)
        off = warpgroup_mma(y, zeros, off, is_async=True)
    else:
        y, rest = two_parts(y, left(c.LPB))
        on = warpgroup_mma(y, ones, on, is_async=True)
        on = warpgroup_mma(rest, ones, on, is_async=True)
        off = warpgroup_mma(y, zeros, off, is_async=True)
        off = warpgroup_mma(rest, zeros, off, is_async=True)
    return on, off


@gluon.jit
def add_corners(sums, y, n, planes_s, c: gl.constexpr):
    """:func:`begin_corners`, to its end."""
    on, off = begin_corners(sums, y, n, planes_s, c)
    on, off = warpgroup_mma_wait(0, (on, off))
    return on, off


@gluon.jit
def hash_gradient(sums, u, beta):
    """From the sums of ``y = phi * dphi``: ``dz [C, LPB]`` of the projections, and each row's part of dbeta."""
    log_on, log_off = log_sigmoids(u, beta)
    dt = sums[0] * exp2(log_off) - sums[1] * exp2(log_on)
    return 2.0 * beta * dt * (1.0 - u * u), gl.sum(2.0 * u * dt, 1)


@gluon.jit
def unproject(dz, W, c: gl.constexpr):
    """``dz @ planes``, ``[C, BD]``."""
    nothing = gl.zeros([c.C, c.BD], gl.float32, product(c.BD))
    dz = one_part(dz, left(c.BD))
    return warpgroup_mma_wait(0, (warpgroup_mma(dz, W, nothing, use_acc=False, is_async=True),))
