"""What the Hopper kernels share: rings of shared memory between warp groups, the soft hash on them, decay weights.

A program walks one tile of one head with four parts that run at the same time, each a chunk ahead of the next:

    loader    (1 warp)   rows come in by the copy engine
    features  (4 warps)  phi of the chunk's keys and queries, as bfloat16 operands in shared memory
    state     (4 warps)  the running state in registers, published as operands before each chunk
    rows      (4 warps)  the chunk's products, and the rows that leave

They hand chunks over in *rings*: ``depth`` buffers, each with a barrier for full and one for empty. The mathematics, the
letters and the Spec ``c`` are those of ``common.py``; 16-bit products only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from race_dist.kernels.common import LEAST_LOG_DECAY, LOG2E


@gluon.constexpr_function
def product(columns):
    """The layout of a product ``[C, columns]`` on four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def left(columns):
    """The layout of a product's left operand that stays in registers."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16]), 2)


@gluon.constexpr_function
def tile(rows, columns):
    """The layout of bfloat16 rows in shared memory, as the copy engine and the matrix units want them."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.constexpr_function
def by_rows(columns):
    """A layout for moving ``[rows, columns]`` between memory and registers, 8 columns a thread."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


# --- rings -----------------------------------------------------------------------------------------------------------------


@gluon.jit
def make_ring(depth: gl.constexpr, readers: gl.constexpr):
    """The barriers (full, empty) of a ring of ``depth`` buffers, each of which ``readers`` parts must have read. Buffers
    are put behind them: ``make_ring(2, 1) + (operands(2, C, BD),)``.

    Make no ring that no part waits at: the compiler gives the room of its barriers to other buffers, and what was set up as
    a barrier corrupts what is stored there (found on an H100)."""
    full = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(depth):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty


@gluon.jit
def operands(depth: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """``depth`` buffers of bfloat16 operands ``[rows, columns]``."""
    return gl.allocate_shared_memory(gl.bfloat16, [depth, rows, columns], tile(rows, columns))


@gluon.jit
def numbers(depth: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """``depth`` buffers of float32 numbers ``[rows, columns]``."""
    return gl.allocate_shared_memory(gl.float32, [depth, rows, columns], PLAIN_ROWS)


@gluon.jit
def vectors(depth: gl.constexpr, size: gl.constexpr):
    """``depth`` buffers of float32 numbers ``[size]``."""
    return gl.allocate_shared_memory(gl.float32, [depth, size], PLAIN)


@gluon.jit
def await_full(ring, j):
    """Wait until turn j's buffers are full; their place in the ring."""
    depth: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(ring[0].index(j % depth), (j // depth) & 1)
    return j % depth


@gluon.jit
def await_empty(ring, j):
    """Wait until turn j's buffers may be written; their place in the ring."""
    depth: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(ring[1].index(j % depth), ((j // depth) & 1) ^ 1)
    return j % depth


@gluon.jit
def set_full(ring, j):
    """Hand on turn j's buffers: what ordinary stores wrote is seen by the matrix units too."""
    fence_async_shared()
    mbarrier.arrive(ring[0].index(j % ring[0].shape[0]))


@gluon.jit
def set_empty(ring, j, really=True):
    """Give turn j's buffers back."""
    mbarrier.arrive(ring[1].index(j % ring[1].shape[0]), pred=really)


@gluon.jit
def next_full(ring, j):
    """Turn j's first buffer, once it is full."""
    return ring[2].index(await_full(ring, j))


# --- rows ------------------------------------------------------------------------------------------------------------------


@gluon.jit
def open_rows(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """A copy descriptor of head h of row b of ``x [B, T, H, X]``, tokens before ``end``, C at a time."""
    return tma.make_tensor_descriptor(x[0] + b * x[1] + h * x[3], [end.to(gl.int32), X], [x[2].to(gl.int64), 1], [c.C, BX],
                                      tile(c.C, BX))


@gluon.jit
def open_heads(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """:func:`open_rows` of each query head that reads key/value head h."""
    heads = ()
    for g in gl.static_range(c.G):
        heads = heads + (open_rows(x, b, h * c.G + g, end, X, BX, c),)
    return heads


@gluon.jit
def fetch(rows, t, ring, j, BX: gl.constexpr, c: gl.constexpr):
    """Ask the copy engine for tokens t on, into turn j's buffer."""
    at = await_empty(ring, j)
    mbarrier.expect(ring[0].index(at), c.C * BX * 2)
    tma.async_copy_global_to_shared(rows, [t.to(gl.int32), 0], ring[0].index(at), ring[2].index(at))


@gluon.jit
def send(rows, t, buffer, value):
    """Store ``value [C, BX]`` as tokens t on, through a buffer that is free again when the next value is sent."""
    tma.store_wait(0)
    buffer.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(rows, [t.to(gl.int32), 0], buffer)


@gluon.jit
def load_scalars(x, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """One number a token, ``[C]``, of ``x [B, T, H]`` given as (pointer, three strides); 0 past n."""
    rows = gl.arange(0, c.C, layout)
    return gl.load(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(gl.int64) * x[2], mask=rows < n, other=0.0)


@gluon.jit
def store_scalars(x, value, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """The inverse of :func:`load_scalars`."""
    rows = gl.arange(0, c.C, layout)
    gl.store(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(gl.int64) * x[2], value, mask=rows < n)


# --- the soft hash -----------------------------------------------------------------------------------------------------------


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
    high = x.to(gl.bfloat16)
    low = (x - high.to(gl.float32)).to(gl.bfloat16)
    return gl.convert_layout(high, layout), gl.convert_layout(low, layout)


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
def add_corners(sums, y, n, planes_s, c: gl.constexpr):
    """Add ``y [C, SB]`` of block n to its sums over the corners that have a plane's bit set, and clear, ``[C, LPB]`` each.

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


# --- states ------------------------------------------------------------------------------------------------------------------


@gluon.jit
def load_state(states, index, n, c: gl.constexpr):
    """``M [SB, BV]``, and the mass in column 0 of ``[SB, 16]``, of block n of state number ``index`` (64-bit)."""
    values = states + index * (c.S * (c.Dv + 1))
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(c.BV)))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, product(c.BV)))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    M = gl.load(values + s[:, None] * c.Dv + column[None, :], mask=inside, other=0.0)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(16)))
    column = gl.arange(0, 16, gl.SliceLayout(0, product(16)))
    inside = (s < c.S)[:, None] & (column == 0)[None, :]
    m = gl.load(values + c.S * c.Dv + s[:, None] + column[None, :], mask=inside, other=0.0)
    return M, m


@gluon.jit
def open_room(rooms, index, c: gl.constexpr):
    """A program's room for :func:`put_block`; None where its state fits in registers."""
    if c.NSB > 1:
        return rooms + index * (c.NSB * c.SB * (c.BV + 16))
    else:
        return rooms


@gluon.jit
def take_block(room, n, c: gl.constexpr):
    """Block n of a running state that is too large for registers: ``M [SB, BV]`` and the mass ``[SB, 16]``, from the
    program's room in memory (in L2, in practice). Each thread reads what it wrote."""
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(c.BV)))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, product(c.BV)))
    M = gl.load(room + s[:, None] * c.BV + column[None, :])
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(16)))
    column = gl.arange(0, 16, gl.SliceLayout(0, product(16)))
    return M, gl.load(room + c.NSB * c.SB * c.BV + s[:, None] * 16 + column[None, :])


@gluon.jit
def put_block(room, n, M, m, c: gl.constexpr):
    """The inverse of :func:`take_block`."""
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(c.BV)))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, product(c.BV)))
    gl.store(room + s[:, None] * c.BV + column[None, :], M)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(16)))
    column = gl.arange(0, 16, gl.SliceLayout(0, product(16)))
    gl.store(room + c.NSB * c.SB * c.BV + s[:, None] * 16 + column[None, :], m)


@gluon.jit
def store_values(states, index, M, c: gl.constexpr):
    """Write ``M [SB, BV]`` of state number ``index``."""
    s = gl.arange(0, c.SB, gl.SliceLayout(1, product(c.BV)))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, product(c.BV)))
    values = states + index * (c.S * (c.Dv + 1))
    gl.store(values + s[:, None] * c.Dv + column[None, :], M, mask=(s < c.S)[:, None] & (column < c.Dv)[None, :])


@gluon.jit
def store_mass(states, index, m, c: gl.constexpr):
    """Write the mass of state number ``index``, given spread over 16 columns."""
    s = gl.arange(0, c.SB, gl.SliceLayout(1, product(16)))
    gl.store(states + index * (c.S * (c.Dv + 1)) + c.S * c.Dv + s, gl.sum(m, 1), mask=s < c.S)


@gluon.jit
def put_ones(c: gl.constexpr):
    """The right operand ``[16, C]`` (given transposed) that sums a chunk's features into a mass."""
    layout: gl.constexpr = by_rows(c.C)
    first = gl.arange(0, 16, gl.SliceLayout(1, layout)) == 0
    value = gl.zeros([16, c.C], gl.float32, layout) + gl.where(first, 1.0, 0.0)[:, None]
    return gl.allocate_shared_memory(gl.bfloat16, [16, c.C], tile(16, c.C), value.to(gl.bfloat16))


@gluon.jit
def put_mass(buffer, m, c: gl.constexpr):
    """The mass as ``[SB]`` in shared memory."""
    buffer.store(gl.sum(m, 1))


@gluon.jit
def put_parts(high, low, M):
    """M as two bfloat16 operands in shared memory."""
    upper = M.to(gl.bfloat16)
    high.store(upper)
    low.store((M - upper.to(gl.float32)).to(gl.bfloat16))


@gluon.jit
def put_pair(buffer, x, c: gl.constexpr):
    """``x [C]`` in two bfloat16 parts, as the first rows of a right operand ``[16, C]`` (given transposed)."""
    layout: gl.constexpr = by_rows(c.C)
    x = gl.convert_layout(x, gl.SliceLayout(0, layout))
    high = x.to(gl.bfloat16).to(gl.float32)
    number = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    buffer.store(gl.where(number == 0, high[None, :], gl.where(number == 1, (x - high)[None, :], 0.0)).to(gl.bfloat16))


@gluon.jit
def crossing(states, final_values, final_mass, suffixes, number, index, row, last, h, H, c: gl.constexpr):
    """What the log decays share at a tile's end: <state after the tile, its gradient>."""
    total = 0.0
    for n in gl.static_range(c.NSB):
        if last:
            sketch = row * H + h
            total += _inner(final_values + sketch * (c.S * c.Dv), final_mass + sketch * c.S, suffixes, index, n, c)
        else:
            after = states + ((number + 1).to(gl.int64) * H + h) * (c.S * (c.Dv + 1))
            total += _inner(after, after + c.S * c.Dv, suffixes, index, n, c)
    return total


@gluon.jit
def _inner(values, mass, suffixes, index, n, c: gl.constexpr):
    layout: gl.constexpr = by_rows(c.BV)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, layout))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, layout))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    place = s[:, None] * c.Dv + column[None, :]
    suffix = suffixes + index * (c.S * (c.Dv + 1))
    M = gl.load(values + place, mask=inside, other=0.0).to(gl.float32)
    m = gl.load(mass + s, mask=s < c.S, other=0.0).to(gl.float32)
    Cs = gl.load(suffix + place, mask=inside, other=0.0)
    cs = gl.load(suffix + c.S * c.Dv + s, mask=s < c.S, other=0.0)
    return gl.sum(gl.sum(M * Cs, 1), 0) + gl.sum(m * cs, 0)


# --- decay -------------------------------------------------------------------------------------------------------------------
#
# The features part works out a chunk's weights once and hands them on as float32 vectors in shared memory: (G high, G low,
# leave, through, sight, enter), G the running sum of the chunk's log decays in binary units. Without decay: no ring.

LEAVE, SIGHT, ENTER = gl.constexpr(4), gl.constexpr(6), gl.constexpr(7)  # their places in the ring
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def reverse_sums(x):
    """Sums of ``x [C]`` from each token on."""
    return gl.associative_scan(x, 0, _add, reverse=True)


@gluon.jit
def make_weights(c: gl.constexpr):
    """The ring of the weights, two readers; nothing without decay."""
    weights = ()
    if c.decay:
        weights = make_ring(2, 2)
        for _ in gl.static_range(6):
            weights = weights + (vectors(2, c.C),)
    return weights


@gluon.jit
def await_weights(weights, i, c: gl.constexpr):
    """Wait for chunk i's weights; their place."""
    if c.decay:
        return await_full(weights, i)
    else:
        return 0


@gluon.jit
def free_weights(weights, i, c: gl.constexpr, really=True):
    """Give chunk i's weights back."""
    if c.decay:
        set_empty(weights, i, really)


@gluon.jit
def put_weights(weights, i, log_decay, b, t, h, n, reach, c: gl.constexpr):
    """Hand on chunk i's weights; ``reach``: the log decay from the tile's first token to the chunk, to which the chunk's
    is added, and returned."""
    rate = gl.maximum(load_scalars(log_decay, b, t, h, n, LINE, c).to(gl.float32), LEAST_LOG_DECAY).to(gl.float64) * LOG2E
    G = gl.associative_scan(rate, 0, _add)
    total = gl.sum(rate, 0)
    high = G.to(gl.float32)
    at = await_empty(weights, i)
    weights[2].index(at).store(high)
    weights[3].index(at).store((G - high.to(gl.float64)).to(gl.float32))
    weights[4].index(at).store(gl.exp2((total - G).to(gl.float32)))
    weights[5].index(at).store(gl.exp2((total + (G - G)).to(gl.float32)))
    weights[6].index(at).store(gl.exp2((reach + G).to(gl.float32)))
    weights[7].index(at).store(gl.exp2(high))
    set_full(weights, i)
    return reach + total


@gluon.jit
def enter_rows(x, weights, at, layout: gl.constexpr, c: gl.constexpr):
    """Rows of x, weighted as a state from before the chunk is seen by each token."""
    if c.decay:
        return x * weights[7].index(at).load(gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def enter_vector(x, weights, at, layout: gl.constexpr, c: gl.constexpr):
    """:func:`enter_rows` of one number a token."""
    if c.decay:
        return x * weights[7].index(at).load(layout)
    else:
        return x


@gluon.jit
def enter_sight(x, weights, at, layout: gl.constexpr, c: gl.constexpr):
    """One number a token, weighted as the tile's first token sees it."""
    if c.decay:
        return x * weights[6].index(at).load(layout)
    else:
        return x


@gluon.jit
def leave_rows(x, weights, at, layout: gl.constexpr, c: gl.constexpr):
    """Rows of x, weighted as each token is seen after the chunk."""
    if c.decay:
        return x * weights[4].index(at).load(gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def pass_through(M, m, weights, at, c: gl.constexpr):
    """A state from before the chunk, as it is seen after it."""
    if c.decay:
        M *= weights[5].index(at).load(gl.SliceLayout(1, product(c.BV)))[:, None]
        m *= weights[5].index(at).load(gl.SliceLayout(1, product(16)))[:, None]
    return M, m


@gluon.jit
def transposed(F, weights, kind: gl.constexpr, at, c: gl.constexpr):
    """``F^T [SB, C]`` as a left operand: F in shared memory; under decay in registers, each token with its weight."""
    columns: gl.constexpr = c.BV
    if c.decay:
        x = F.permute((1, 0)).load(product(c.C)).to(gl.float32)
        x = x * weights[kind].index(at).load(gl.SliceLayout(0, product(c.C)))[None, :]
        return one_part(x, left(columns))
    else:
        return F.permute((1, 0))


@gluon.jit
def seen(x, weights, at, c: gl.constexpr):
    """``x [i, j]`` of queries i and keys j weighted by ``exp(G_i - G_j)``, 0 where j comes after i."""
    i = gl.arange(0, c.C, gl.SliceLayout(1, product(c.C)))
    j = gl.arange(0, c.C, gl.SliceLayout(0, product(c.C)))
    if c.decay:
        x = x * _between(weights, at, gl.SliceLayout(1, product(c.C)), gl.SliceLayout(0, product(c.C)), 1.0)
    return gl.where(i[:, None] >= j[None, :], x, 0.0)


@gluon.jit
def seen_by(x, weights, at, c: gl.constexpr):
    """:func:`seen` of ``x [j, i]``."""
    j = gl.arange(0, c.C, gl.SliceLayout(1, product(c.C)))
    i = gl.arange(0, c.C, gl.SliceLayout(0, product(c.C)))
    if c.decay:
        x = x * _between(weights, at, gl.SliceLayout(1, product(c.C)), gl.SliceLayout(0, product(c.C)), -1.0)
    return gl.where(j[:, None] <= i[None, :], x, 0.0)


@gluon.jit
def _between(weights, at, rows: gl.constexpr, columns: gl.constexpr, sign: gl.constexpr):
    """``exp(sign (G_row - G_column))``, at most 1, from both parts: exact beside a hard reset."""
    high = weights[2].index(at).load(rows)[:, None] - weights[2].index(at).load(columns)[None, :]
    low = weights[3].index(at).load(rows)[:, None] - weights[3].index(at).load(columns)[None, :]
    return gl.exp2(gl.minimum(sign * (high + low), 0.0))
