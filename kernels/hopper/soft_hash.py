"""The soft hash and its gradient, with operands in shared memory.

Letters: C tokens per chunk, LPB plane slots (all planes of a head), SB features per block, NSB blocks. A table of more than SB
buckets has BLOCKS_PER_TABLE blocks, which its first BLOCK_PLANES planes tell apart: a feature is then a factor of its block,
the product over those planes, times one that all blocks of the table share.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.layouts import (
    blocked_layout,
    lhs_layout,
    round_to_bf16,
    split_lhs,
    to_lhs,
    wgmma_layout,
)
from race_dist.kernels.hopper.pipeline import allocate_operands, load_scalars
from race_dist.kernels.soft_hash import LOG2E
from race_dist.kernels.state import inverse_den


@aggregate
class HashOperands:
    """The right operands of the hash's products, in shared memory.

    The bits are of one block per table: where a table has several blocks, they leave out the BLOCK_PLANES."""

    planes: gl.shared_memory_descriptor  # [1 or 2, LPB, BD], two parts where they are wider than bfloat16
    set_bits: gl.shared_memory_descriptor  # [NSB / BLOCKS_PER_TABLE, LPB, SB], 1 where the bucket has the plane's bit set
    clear_bits: gl.shared_memory_descriptor  # the same, clear
    beta: gl.tensor  # pointer [H]


@aggregate
class PlaneSums:
    """Sums of ``y = phi * dphi`` over the buckets that have a plane's bit set, and clear; ``[C, LPB]`` each."""

    set: gl.tensor
    clear: gl.tensor


@aggregate
class TableSums:
    """Sums over the blocks of one table."""

    features: gl.tensor  # [C, SB], of y itself: what the planes need that all blocks share
    total: gl.tensor  # [C], of the row sums of y
    block_planes: gl.tuple  # BLOCK_PLANES x [C], of the row sums of the blocks that have that plane's bit set


@gluon.jit
def make_hash_operands(x, h, c: gl.constexpr):
    """The :class:`HashOperands` of head h of :class:`Inputs` x."""
    planes = x.planes
    layout: gl.constexpr = blocked_layout(c.BD)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, layout))
    d = gl.arange(0, c.BD, gl.SliceLayout(0, layout))
    offset = (slot // c.P)[:, None] * planes.stride_l + (slot % c.P)[:, None] * planes.stride_p + d[None, :] * planes.stride_d
    inside = (slot < c.L * c.P)[:, None] & (d < c.D)[None, :]
    W = gl.load(planes.ptr + h * planes.stride_h + offset, mask=inside, other=0.0)  # [LPB, BD]
    if c.split_planes:
        buffers = allocate_operands(2, c.LPB, c.BD)
        high = round_to_bf16(W.to(gl.float32))
        buffers.index(0).store(high.to(gl.bfloat16))
        buffers.index(1).store((W.to(gl.float32) - high).to(gl.bfloat16))
    else:
        buffers = allocate_operands(1, c.LPB, c.BD)
        buffers.index(0).store(W.to(gl.bfloat16))
    blocks: gl.constexpr = c.NSB // c.BLOCKS_PER_TABLE
    set_bits = allocate_operands(blocks, c.LPB, c.SB)
    clear_bits = allocate_operands(blocks, c.LPB, c.SB)
    bit_layout: gl.constexpr = blocked_layout(c.SB)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(1, bit_layout))
    used = (slot < c.L * c.P) & (slot % c.P >= c.BLOCK_PLANES)  # [LPB]
    for n in gl.static_range(blocks):
        s = n * c.BLOCKS_PER_TABLE * c.SB + gl.arange(0, c.SB, gl.SliceLayout(0, bit_layout))
        inside = ((slot // c.P)[:, None] == (s // c.R)[None, :]) & used[:, None] & (s < c.S)[None, :]  # [LPB, SB]
        bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
        set_bits.index(n).store((inside & (bit == 1)).to(gl.bfloat16))
        clear_bits.index(n).store((inside & (bit == 0)).to(gl.bfloat16))
    fence_async_shared()
    return HashOperands(buffers, set_bits, clear_bits, x.beta)


@gluon.jit
def start_projection(x, planes, c: gl.constexpr):
    """Start ``x @ planes^T``, ``[C, LPB]``, of rows ``x [C, BD]``."""
    z = gl.zeros([c.C, c.LPB], gl.float32, wgmma_layout(c.LPB))
    z = warpgroup_mma(x, planes.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
    if c.split_planes:
        z = warpgroup_mma(x, planes.index(1).permute((1, 0)), z, is_async=True)
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
def tanh(z):
    """``tanh(z)``."""
    e = exp2(gl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    return gl.where(z < 0, -u, u)


@gluon.jit
def tanh_projection(pipe, j, hash, c: gl.constexpr):
    """``u [C, LPB]``: tanh of the projections of turn j's rows, which are released."""
    z = start_projection(pipe.consumer_buffer(j), hash.planes, c)
    u = tanh(warpgroup_mma_wait(0, (z,)))
    pipe.consumer_release(j)
    return u


@gluon.jit
def log_sigmoids(u, beta):
    """Binary logarithms of ``sigmoid(2 beta u)`` and ``sigmoid(-2 beta u)``."""
    t = (2.0 * LOG2E) * beta * u
    log1p = log2(1.0 + exp2(-gl.abs(t)))
    return gl.minimum(t, 0.0) - log1p, gl.minimum(-t, 0.0) - log1p


@gluon.jit
def log_sigmoid_operands(u, beta, c: gl.constexpr):
    """The logarithms of :func:`log_sigmoids`, each in two parts: (set high, set low), (clear high, clear low)."""
    log_set, log_clear = log_sigmoids(u, beta)
    return split_lhs(log_set, lhs_layout(c.SB)), split_lhs(log_clear, lhs_layout(c.SB))


@gluon.jit
def bucket_features(log_set, log_clear, n, hash, c: gl.constexpr):
    """``phi [C, SB]`` of block n, float32: the product of one sigmoid per plane of the table, as a sum of logarithms."""
    set_bits, clear_bits = hash.set_bits.index(n), hash.clear_bits.index(n)  # [LPB, SB]
    phi = gl.zeros([c.C, c.SB], gl.float32, wgmma_layout(c.SB))
    phi = warpgroup_mma(log_set[0], set_bits, phi, use_acc=False, is_async=True)
    phi = warpgroup_mma(log_set[1], set_bits, phi, is_async=True)
    phi = warpgroup_mma(log_clear[0], clear_bits, phi, is_async=True)
    phi = warpgroup_mma(log_clear[1], clear_bits, phi, is_async=True)
    phi = exp2(warpgroup_mma_wait(0, (phi,)))
    if c.S % c.SB != 0:
        s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(0, wgmma_layout(c.SB)))
        phi = gl.where((s < c.S)[None, :], phi, 0.0)
    return phi


@gluon.jit
def block_factors(u, beta, table, c: gl.constexpr):
    """The factor ``[C]`` of each block of a table that has several, from ``u [C, LPB]``."""
    log_set, log_clear = log_sigmoids(u, beta)
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, wgmma_layout(c.LPB)))
    plane = slot - table * c.P
    used = (plane >= 0) & (plane < c.BLOCK_PLANES)
    factors = ()
    for n in gl.static_range(c.BLOCKS_PER_TABLE):
        bit = (n >> gl.where(used, c.BLOCK_PLANES - 1 - plane, 0)) & 1
        log = gl.where((bit == 1)[None, :], log_set, log_clear)
        log = gl.sum(gl.where(used[None, :], log, 0.0), 1)
        factors = factors + (gl.convert_layout(exp2(log), gl.SliceLayout(1, wgmma_layout(c.SB))),)
    return factors


@gluon.jit
def produce_features(pipe, j, u, scale, beta, hash, c: gl.constexpr):
    """Produce ``phi``, row i times ``scale[i]``, of the rows of turn j that project to ``u [C, LPB]``: one operand ``[C, SB]``
    per block. What the blocks of a table share is computed once."""
    log_set, log_clear = log_sigmoid_operands(u, beta, c)
    for table in range(c.NSB // c.BLOCKS_PER_TABLE):
        phi = bucket_features(log_set, log_clear, table, hash, c)
        if c.BLOCKS_PER_TABLE == 1:
            pipe.produce(j * c.NSB + table, phi * scale[:, None])
        else:
            factors = block_factors(u, beta, table, c)
            for n in gl.static_range(c.BLOCKS_PER_TABLE):
                pipe.produce(j * c.NSB + table * c.BLOCKS_PER_TABLE + n, phi * (factors[n] * scale)[:, None])


@gluon.jit
def load_key_mask(key_mask, b, t, n, c: gl.constexpr):
    """1 for a chunk's present keys, 0 for absent ones, ``[C]``."""
    rows = gl.arange(0, c.C, gl.SliceLayout(1, wgmma_layout(c.SB)))
    present = rows < n
    if c.masked:
        pointer = key_mask.ptr + b * key_mask.stride_b + (t + rows) * key_mask.stride_t
        present = present & (gl.load(pointer, mask=present, other=0) != 0)
    return gl.where(present, 1.0, 0.0)


@gluon.jit
def load_inverse_den(den, b, t, h, n, c: gl.constexpr):
    """One over a chunk's denominators, ``[C]``; ones unless "global"."""
    rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.SB))
    if c.is_global:
        return inverse_den(load_scalars(den, b, t, h, n, rows, c))
    else:
        return gl.full([c.C], 1.0, gl.float32, rows)


@gluon.jit
def zero_plane_sums(c: gl.constexpr):
    """Empty :class:`PlaneSums`."""
    layout: gl.constexpr = wgmma_layout(c.LPB)
    return PlaneSums(gl.zeros([c.C, c.LPB], gl.float32, layout), gl.zeros([c.C, c.LPB], gl.float32, layout))


@gluon.jit
def start_plane_sums(sums, y, n, hash, c: gl.constexpr):
    """Start to add ``y [C, SB]`` of block n to the :class:`PlaneSums`; returns the two accumulators.

    What every plane shares of y cancels between the two: one block subtracts it before rounding, several keep two parts.
    """
    y_set, y_clear = sums.set, sums.clear
    set_bits, clear_bits = hash.set_bits.index(n).permute((1, 0)), hash.clear_bits.index(n).permute((1, 0))  # [SB, LPB]
    if c.NSB == 1:
        y = to_lhs(y, lhs_layout(c.LPB))
        y_set = warpgroup_mma(y, set_bits, y_set, is_async=True)
        y_clear = warpgroup_mma(y, clear_bits, y_clear, is_async=True)
    else:
        y, y_low = split_lhs(y, lhs_layout(c.LPB))
        y_set = warpgroup_mma(y, set_bits, y_set, is_async=True)
        y_set = warpgroup_mma(y_low, set_bits, y_set, is_async=True)
        y_clear = warpgroup_mma(y, clear_bits, y_clear, is_async=True)
        y_clear = warpgroup_mma(y_low, clear_bits, y_clear, is_async=True)
    return y_set, y_clear


@gluon.jit
def add_plane_sums(sums, y, n, hash, c: gl.constexpr):
    """:func:`start_plane_sums`, and wait for it."""
    y_set, y_clear = start_plane_sums(sums, y, n, hash, c)
    y_set, y_clear = warpgroup_mma_wait(0, (y_set, y_clear))
    return PlaneSums(y_set, y_clear)


@gluon.jit
def zero_table_sums(c: gl.constexpr):
    """Empty :class:`TableSums`."""
    zeros = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, wgmma_layout(c.SB)))
    block_planes = ()
    for _ in gl.static_range(c.BLOCK_PLANES):
        block_planes = block_planes + (zeros,)
    return TableSums(gl.zeros([c.C, c.SB], gl.float32, wgmma_layout(c.SB)), zeros, block_planes)


@gluon.jit
def add_block(sums, y, n, c: gl.constexpr):
    """Add ``y [C, SB]`` of a table's block n to its :class:`TableSums`."""
    row = gl.sum(y, 1)
    block_planes = ()
    for plane in gl.static_range(c.BLOCK_PLANES):
        bit = (n >> (c.BLOCK_PLANES - 1 - plane)) & 1
        block_planes = block_planes + (sums.block_planes[plane] + row * bit,)
    return TableSums(sums.features + y, sums.total + row, block_planes)


@gluon.jit
def add_table(plane_sums, sums, table, hash, c: gl.constexpr):
    """Add a table's :class:`TableSums` to the :class:`PlaneSums`."""
    added = add_plane_sums(plane_sums, sums.features, table, hash, c)
    y_set, y_clear = added.set, added.clear
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, wgmma_layout(c.LPB)))
    rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.LPB))
    for plane in gl.static_range(c.BLOCK_PLANES):
        at_plane = (slot == table * c.P + plane)[None, :]
        y_set = gl.where(at_plane, gl.convert_layout(sums.block_planes[plane], rows)[:, None], y_set)
        y_clear = gl.where(at_plane, gl.convert_layout(sums.total - sums.block_planes[plane], rows)[:, None], y_clear)
    return PlaneSums(y_set, y_clear)


@gluon.jit
def soft_hash_backward(sums, u, beta):
    """From the :class:`PlaneSums`: ``dz [C, LPB]`` of the projections, and each row's part of dbeta, ``[C]``."""
    log_set, log_clear = log_sigmoids(u, beta)
    dt = sums.set * exp2(log_clear) - sums.clear * exp2(log_set)
    return 2.0 * beta * dt * (1.0 - u * u), gl.sum(2.0 * u * dt, 1)


@gluon.jit
def unproject(dz, hash, c: gl.constexpr):
    """``dz @ planes``, ``[C, BD]``, of ``dz [C, LPB]``."""
    dx = gl.zeros([c.C, c.BD], gl.float32, wgmma_layout(c.BD))
    dz = to_lhs(dz, lhs_layout(c.BD))
    dx = warpgroup_mma(dz, hash.planes.index(0), dx, use_acc=False, is_async=True)
    if c.split_planes:
        dx = warpgroup_mma(dz, hash.planes.index(1), dx, is_async=True)
    return warpgroup_mma_wait(0, (dx,))
