"""The soft hash, and its gradient, on operands in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import LOG2E, inverse_den
from race_dist.kernels.hopper.layouts import by_rows, cut, left, product, rounded
from race_dist.kernels.hopper.pipeline import await_empty, load_scalars, next_full, operands, set_empty, set_full


@gluon.jit
def put_planes(planes, h, c: gl.constexpr):
    """The planes ``[1 or 2, LPB, BD]``, in two parts where they are wider than bfloat16, and, for each block of features
    (of a table of several: for all of them, without its first planes), slot and feature, whether
    the corner has the plane's bit set, and whether it has it clear, ``[.., LPB, SB]``, as operands in shared memory."""
    layout: gl.constexpr = by_rows(c.BD)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, layout))
    d = gl.arange(0, c.BD, gl.SliceLayout(0, layout))
    offset = (slot // c.P)[:, None] * planes[2] + (slot % c.P)[:, None] * planes[3] + d[None, :] * planes[4]
    x = gl.load(planes[0] + h * planes[1] + offset, mask=(slot < c.L * c.P)[:, None] & (d < c.D)[None, :], other=0.0)
    if c.split_planes:
        W = operands(2, c.LPB, c.BD)
        high = rounded(x.to(gl.float32))
        W.index(0).store(high.to(gl.bfloat16))
        W.index(1).store((x.to(gl.float32) - high).to(gl.bfloat16))
    else:
        W = operands(1, c.LPB, c.BD)
        W.index(0).store(x.to(gl.bfloat16))
    different: gl.constexpr = c.NSB // c.BLOCKS_PER_TABLE
    ones = operands(different, c.LPB, c.SB)
    zeros = operands(different, c.LPB, c.SB)
    bits: gl.constexpr = by_rows(c.SB)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, bits))
    inside = (slot < c.L * c.P) & (slot % c.P >= c.BLOCK_PLANES)
    for n in gl.static_range(different):
        s = n * c.BLOCKS_PER_TABLE * c.SB + gl.arange(0, c.SB, gl.SliceLayout(0, bits))
        same = ((slot // c.P)[:, None] == (s // c.R)[None, :]) & inside[:, None] & (s < c.S)[None, :]
        bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
        ones.index(n).store((same & (bit == 1)).to(gl.bfloat16))
        zeros.index(n).store((same & (bit == 0)).to(gl.bfloat16))
    fence_async_shared()
    return W, ones, zeros


@gluon.jit
def project(x, W, c: gl.constexpr):
    """Begin ``x @ planes^T``, ``[C, LPB]``."""
    z = gl.zeros([c.C, c.LPB], gl.float32, product(c.LPB))
    z = warpgroup_mma(x, W.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
    if c.split_planes:
        z = warpgroup_mma(x, W.index(1).permute((1, 0)), z, is_async=True)
    return z


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
    high = cut(x)
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
def heads(u, beta, table, c: gl.constexpr):
    """The factor ``[C]`` of each block of a table that has several, from ``u [C, LPB]``."""
    on, off = log_sigmoids(u, beta)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, product(c.LPB)))
    plane = slot - table * c.P
    inside = (plane >= 0) & (plane < c.BLOCK_PLANES)
    factors = ()
    for n in gl.static_range(c.BLOCKS_PER_TABLE):
        log = gl.where(((n >> gl.where(inside, c.BLOCK_PLANES - 1 - plane, 0)) & 1 == 1)[None, :], on, off)
        log = gl.sum(gl.where(inside[None, :], log, 0.0), 1)
        factors = factors + (gl.convert_layout(exp2(log), gl.SliceLayout(1, product(c.SB))),)
    return factors


@gluon.jit
def put_features(ring, j, u, scale, beta, planes_s, c: gl.constexpr):
    """Hand on ``phi``, row i times ``scale[i]``, of the rows of turn j that project to ``u``: an operand for each block. What
    the blocks of a table share is worked out once."""
    logs = log_operands(u, beta, c)
    for table in range(c.NSB // c.BLOCKS_PER_TABLE):
        phi = buckets(logs, table, planes_s, c)
        if c.BLOCKS_PER_TABLE == 1:
            put_operand(ring, j * c.NSB + table, phi * scale[:, None])
        else:
            factors = heads(u, beta, table, c)
            for n in gl.static_range(c.BLOCKS_PER_TABLE):
                put_operand(ring, j * c.NSB + table * c.BLOCKS_PER_TABLE + n, phi * (factors[n] * scale)[:, None])


@gluon.jit
def load_keep(key_mask, b, t, n, c: gl.constexpr):
    """1 for a chunk's keys that count, 0 for others, ``[C]``."""
    rows = gl.arange(0, c.C, gl.SliceLayout(1, product(c.SB)))
    keep = rows < n
    if c.masked:
        keep = keep & (gl.load(key_mask[0] + b * key_mask[1] + (t + rows) * key_mask[2], mask=keep, other=0) != 0)
    return gl.where(keep, 1.0, 0.0)


@gluon.jit
def load_inverse_den(den, b, t, h, n, c: gl.constexpr):
    """One over a chunk's denominators, ``[C]``; ones but for "global"."""
    rows: gl.constexpr = gl.SliceLayout(1, product(c.SB))
    if c.is_global:
        return inverse_den(load_scalars(den, b, t, h, n, rows, c))
    else:
        return gl.full([c.C], 1.0, gl.float32, rows)


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
def no_table(c: gl.constexpr):
    """The sums of :func:`add_block` over nothing."""
    none = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.SB)))
    of_heads = ()
    for _ in gl.static_range(c.BLOCK_PLANES):
        of_heads = of_heads + (none,)
    return gl.zeros([c.C, c.SB], gl.float32, product(c.SB)), none, of_heads


@gluon.jit
def add_block(sums, y, n, c: gl.constexpr):
    """Add ``y [C, SB]`` of a table's block n to the sums over its blocks: y itself, all that the planes need which the blocks
    share; the row sums of y; and, for each first plane, those of the blocks that have its bit set."""
    over, total, of_heads = sums
    row = gl.sum(y, 1)
    after = ()
    for plane in gl.static_range(c.BLOCK_PLANES):
        after = after + (of_heads[plane] + row * ((n >> (c.BLOCK_PLANES - 1 - plane)) & 1),)
    return over + y, total + row, after


@gluon.jit
def add_table(corners, sums, table, planes_s, c: gl.constexpr):
    """:func:`add_corners` of all blocks of a table."""
    over, total, of_heads = sums
    on, off = add_corners(corners, over, table, planes_s, c)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, product(c.LPB)))
    rows: gl.constexpr = gl.SliceLayout(1, product(c.LPB))
    for plane in gl.static_range(c.BLOCK_PLANES):
        here = (slot == table * c.P + plane)[None, :]
        on = gl.where(here, gl.convert_layout(of_heads[plane], rows)[:, None], on)
        off = gl.where(here, gl.convert_layout(total - of_heads[plane], rows)[:, None], off)
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
    dx = gl.zeros([c.C, c.BD], gl.float32, product(c.BD))
    dz = one_part(dz, left(c.BD))
    dx = warpgroup_mma(dz, W.index(0), dx, use_acc=False, is_async=True)
    if c.split_planes:
        dx = warpgroup_mma(dz, W.index(1), dx, is_async=True)
    return warpgroup_mma_wait(0, (dx,))
