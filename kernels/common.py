"""What every kernel shares: where a tile lies, its rows, the soft hash and its gradient, decay weights, products.

Letters: C tokens of a chunk, D and Dv columns (padded to BD, BV), S features in blocks of SB, N = LPB plane slots of a
block of features. ``c`` is the :class:`~race_dist.kernels.plan.Spec` that a kernel is compiled for. A strided tensor
``[B, T, H, X]`` travels as the tuple (pointer, stride of B, of T, of H, of X); element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.interpreter import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)
DEN_FLOOR = tl.constexpr(2.0**-96)
BUCKET_EPS = tl.constexpr(1e-6)
LEAST_LOG_DECAY = tl.constexpr(-1000.0)  # exp of it is 0 in float32; keeps -inf and a reset's size out of the sums


# --- places ------------------------------------------------------------------------------------------------------------


@triton.jit
def locate(tiles, tile, T, TILE, c: tl.constexpr):
    """A tile's batch row, state row, first token, end, and whether it is its sequence's last."""
    if c.packed:
        row = tl.load(tiles + 4 * tile)
        start = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
        last = tl.load(tiles + 4 * tile + 3) != 0
        batch = row * 0
    else:
        per_row = tl.cdiv(T, TILE)
        row = (tile // per_row).to(tl.int64)
        start = (tile % per_row).to(tl.int64) * TILE
        end = tl.minimum(start + TILE, T).to(tl.int64)
        last = tile % per_row == per_row - 1
        batch = row
    return batch, row, start, end, last


@triton.jit
def open_rows(x, b, h, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """Head h of row b of ``x [B, T, H, X]``, tokens before ``end``, with a tma-copy descriptor where the plan says so."""
    head = x[0] + b * x[1] + h * x[3]
    if c.tma:
        tma = tl.make_tensor_descriptor(head, [end.to(tl.int32), X], [x[2].to(tl.int64), 1], [c.C, BX])
        return (head, x[2], x[4], end, tma)
    else:
        return (head, x[2], x[4], end)


@triton.jit
def open_heads(x, b, h, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """:func:`open_rows` of each query head that reads key/value head h."""
    heads = ()
    for g in tl.static_range(c.G):
        heads = heads + (open_rows(x, b, h * c.G + g, end, X, BX, c),)
    return heads


@triton.jit
def load_rows(x, t, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """Tokens t .. t + C of opened rows, ``[C, BX]``; zeros past their end and past column X."""
    if c.tma:
        return x[4].load([t.to(tl.int32), 0])
    else:
        rows = tl.arange(0, c.C)
        cols = tl.arange(0, BX)
        pointer = x[0] + t * x[1] + rows[:, None].to(tl.int64) * x[1] + cols[None, :] * x[2]
        if X == BX:
            return tl.load(pointer, mask=(rows < x[3] - t)[:, None], other=0.0)
        else:
            return tl.load(pointer, mask=(rows < x[3] - t)[:, None] & (cols < X)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, t, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """The inverse of :func:`load_rows`."""
    if c.tma:
        x[4].store([t.to(tl.int32), 0], value.to(x[4].dtype))
    else:
        rows = tl.arange(0, c.C)
        cols = tl.arange(0, BX)
        pointer = x[0] + t * x[1] + rows[:, None].to(tl.int64) * x[1] + cols[None, :] * x[2]
        tl.store(pointer, value.to(x[0].dtype.element_ty), mask=(rows < x[3] - t)[:, None] & (cols < X)[None, :])


@triton.jit
def read_rows(x, b, t, h, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """:func:`load_rows` of rows that are opened for one chunk."""
    return load_rows(open_rows(x, b, h, end, X, BX, c), t, X, BX, c)


@triton.jit
def load_scalars(x, b, t, h, n, c: tl.constexpr):
    """One number a token, ``[C]``, of ``x [B, T, H]`` given as (pointer, three strides)."""
    rows = tl.arange(0, c.C)
    return tl.load(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(tl.int64) * x[2], mask=rows < n, other=0)


@triton.jit
def store_scalars(x, value, b, t, h, n, c: tl.constexpr):
    """The inverse of :func:`load_scalars`."""
    rows = tl.arange(0, c.C)
    tl.store(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(tl.int64) * x[2], value, mask=rows < n)


@triton.jit
def load_state(states, index, s0, c: tl.constexpr):
    """``M [SB, BV]`` and ``m [SB]``, features s0 on, of state number ``index`` (64-bit): values, then mass."""
    values = states + index * (c.S * (c.Dv + 1))
    return load_sketch(values, values + c.S * c.Dv, s0, c)


@triton.jit
def load_sketch(values, mass, s0, c: tl.constexpr):
    """``M [SB, BV]`` and ``m [SB]``, features s0 on, of one state whose two parts lie apart; as float32."""
    s = s0 + tl.arange(0, c.SB)
    cols = tl.arange(0, c.BV)
    inside = (s < c.S)[:, None] & (cols < c.Dv)[None, :]
    M = tl.load(values + s[:, None] * c.Dv + cols[None, :], mask=inside, other=0.0)
    m = tl.load(mass + s, mask=s < c.S, other=0.0)
    return M.to(tl.float32), m.to(tl.float32)


@triton.jit
def store_state(states, index, s0, M, m, c: tl.constexpr):
    """The inverse of :func:`load_state`."""
    values = states + index * (c.S * (c.Dv + 1))
    s = s0 + tl.arange(0, c.SB)
    cols = tl.arange(0, c.BV)
    tl.store(values + s[:, None] * c.Dv + cols[None, :], M, mask=(s < c.S)[:, None] & (cols < c.Dv)[None, :])
    tl.store(values + c.S * c.Dv + s, m, mask=s < c.S)


# --- products ------------------------------------------------------------------------------------------------------------


@triton.jit
def low(x, c: tl.constexpr):
    """The operand of a product: bfloat16 for 16-bit inputs, float32 otherwise."""
    if c.fp32:
        return x.to(tl.float32)
    elif INTERPRET:  # it multiplies bfloat16 as integers: the same numbers as float32
        return rounded(x.to(tl.float32), c)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def mm(a, b, acc=None):
    """``a @ b (+ acc)`` in float32, of operands from :func:`low`."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def rounded(x, c: tl.constexpr):
    """x at the precision of :func:`low`, still as float32. On the bits: the conversion there and back is slower."""
    if c.fp32:
        return x
    else:
        return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def parts(x, c: tl.constexpr):
    """x as the sum of two operands, 16 bits of mantissa together (float32: x itself, and x again, unused)."""
    if c.fp32:
        return x, x
    else:
        high = rounded(x, c)
        return low(high, c), low(x - high, c)


@triton.jit
def mm_right(a, b, acc, c: tl.constexpr):
    """``a @ b (+ acc)`` where b is given in :func:`parts`."""
    acc = mm(a, b[0], acc)
    if not c.fp32:
        acc = mm(a, b[1], acc)
    return acc


@triton.jit
def mm_left(a, b, acc, c: tl.constexpr):
    """``a @ b (+ acc)`` where a is given in :func:`parts`."""
    acc = mm(a[0], b, acc)
    if not c.fp32:
        acc = mm(a[1], b, acc)
    return acc


# --- the soft hash -------------------------------------------------------------------------------------------------------


@triton.jit
def load_planes(planes, h, s0, c: tl.constexpr):
    """The planes behind features s0 .. s0 + SB, ``[BD, LPB]``, as two parts in the inputs' dtype (one where the planes
    have it already)."""
    slot = tl.arange(0, c.LPB)
    table = s0 // c.R + slot // c.P
    d = tl.arange(0, c.BD)
    inside = ((slot < c.TABLES_PER_BLOCK * c.P) & (table < c.L))[None, :] & (d < c.D)[:, None]
    offset = table[None, :] * planes[2] + (slot % c.P)[None, :] * planes[3] + d[:, None] * planes[4]
    W = tl.load(planes[0] + h * planes[1] + offset, mask=inside, other=0.0)
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
def corner_bits(s0, c: tl.constexpr):
    """``[LPB, SB]`` twice: 1 where the feature's corner has the plane's bit set; 1 where it has it clear."""
    slot = tl.arange(0, c.LPB)
    s = s0 + tl.arange(0, c.SB)
    same = (
        ((s0 // c.R + slot // c.P)[:, None] == (s // c.R)[None, :])
        & (slot < c.TABLES_PER_BLOCK * c.P)[:, None]
        & (s < c.S)[None, :]
    )
    bit = ((s % c.R)[None, :] >> (c.P - 1 - slot % c.P)[:, None]) & 1
    ones = low((same & (bit == 1)).to(tl.float32), c)
    zeros = low((same & (bit == 0)).to(tl.float32), c)
    return ones, zeros


@triton.jit
def project(x, W, W_rest, c: tl.constexpr):
    """``x @ planes``, ``[C, LPB]``."""
    if c.fp32 or INTERPRET:
        return mm(x.to(tl.float32), W)
    elif c.split_planes:
        return mm(x, W) + mm(x, W_rest)
    else:
        return mm(x, W)


@triton.jit
def signs(x, W, W_rest, beta, c: tl.constexpr):
    """``u = tanh(planes x)`` and the binary logarithms of ``sigmoid(2 beta u)`` and ``sigmoid(-2 beta u)``, ``[C, LPB]``."""
    z = project(x, W, W_rest, c)
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
    u = (1.0 - e) / (1.0 + e)
    u = tl.where(z < 0, -u, u)
    t = (2.0 * LOG2E) * beta * u
    tail = tl.log2(1.0 + tl.exp2(-tl.abs(t)))
    return u, tl.minimum(t, 0.0) - tail, tl.minimum(-t, 0.0) - tail


@triton.jit
def buckets(log_on, log_off, ones, zeros, s0, c: tl.constexpr):
    """``phi [C, SB]``: the product over a table's planes of one sigmoid each, as a sum of logarithms."""
    phi = tl.exp2(mm_left(parts(log_off, c), zeros, mm_left(parts(log_on, c), ones, None, c), c))
    if c.S % c.SB != 0:
        phi = tl.where((s0 + tl.arange(0, c.SB) < c.S)[None, :], phi, 0.0)
    return phi


@triton.jit
def soft_hash(x, W, W_rest, ones, zeros, beta, s0, c: tl.constexpr):
    """``phi [C, SB]`` of rows x."""
    _, log_on, log_off = signs(x, W, W_rest, beta, c)
    return buckets(log_on, log_off, ones, zeros, s0, c)


@triton.jit
def hash_gradient(y, u, log_on, log_off, ones, zeros, beta, c: tl.constexpr):
    """From ``y = phi * dphi [C, SB]``: ``dz [C, LPB]`` of the projections, and each row's part of dbeta.

    A corner's feature is a product of sigmoids, so y is the gradient of its logarithm; with t = 2 beta u,
    d log sigmoid(t) / dt = sigmoid(-t). A multiple of phi in y changes nothing: the walks take it out (see
    :func:`centred`), so that y can be rounded; a block of a table cannot, and keeps two parts.
    """
    if c.recurrent:
        y = low(y, c)
        on = mm(y, tl.trans(ones))
        off = mm(y, tl.trans(zeros))
    else:
        y = parts(y, c)
        on = mm_left(y, tl.trans(ones), None, c)
        off = mm_left(y, tl.trans(zeros), None, c)
    dt = on * tl.exp2(log_off) - off * tl.exp2(log_on)
    return 2.0 * beta * dt * (1.0 - u * u), tl.sum(2.0 * u * dt, 1)


@triton.jit
def centred(phi, dphi, c: tl.constexpr):
    """``y = phi * dphi`` without its multiple of phi, and its sums over the features."""
    total = tl.sum(phi * dphi, 1)
    return phi * (dphi - (total / c.L)[:, None]), total


@triton.jit
def unproject(dz, W, W_rest, c: tl.constexpr):
    """``dz @ planes^T``, ``[C, BD]``."""
    if c.fp32 or INTERPRET:
        return mm(low(dz, c), tl.trans(W))
    elif c.fp16:
        dz = low(dz, c)
        return mm(dz, tl.trans(W).to(tl.bfloat16)) + mm(dz, tl.trans(W_rest).to(tl.bfloat16))
    elif c.split_planes:
        dz = low(dz, c)
        return mm(dz, tl.trans(W)) + mm(dz, tl.trans(W_rest))
    else:
        return mm(low(dz, c), tl.trans(W))


@triton.jit
def planes_gradient(x, dz, c: tl.constexpr):
    """``dz^T @ x``, ``[LPB, BD]``."""
    return mm(tl.trans(low(dz, c)), low(x, c))


@triton.jit
def store_planes_gradient(dplanes, part, index, s0, c: tl.constexpr):
    """Program ``index``'s part, laid out ``[index, feature block, LPB, BD]``."""
    d = tl.arange(0, c.BD)
    slot = tl.arange(0, c.LPB)
    block = index * c.NSB + s0 // c.SB
    tl.store(dplanes + block * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :], part)


@triton.jit
def key_features(k, W, W_rest, ones, zeros, beta, keep, s0, c: tl.constexpr):
    """:func:`soft_hash` of keys, 0 for those that add nothing."""
    phi = soft_hash(k, W, W_rest, ones, zeros, beta, s0, c)
    return tl.where(keep[:, None], phi, 0.0)


@triton.jit
def load_keep(key_mask, b, t, n, c: tl.constexpr):
    """Which of a chunk's keys count, ``[C]``."""
    rows = tl.arange(0, c.C)
    keep = rows < n
    if c.masked:
        keep = keep & (tl.load(key_mask[0] + b * key_mask[1] + (t + rows) * key_mask[2], mask=keep, other=0) != 0)
    return keep


# --- decay -----------------------------------------------------------------------------------------------------------------


@triton.jit
def load_decay(log_decay, b, t, h, n, c: tl.constexpr):
    """``G [C]``, the running sum of a chunk's log decays in binary units, as two float32 parts, and its last value.

    Two parts, so that the difference of neighbours is exact beside a hard reset that is many times as large.
    """
    if c.decay:
        rate = tl.maximum(load_scalars(log_decay, b, t, h, n, c).to(tl.float32), LEAST_LOG_DECAY).to(tl.float64) * LOG2E
        G = tl.cumsum(rate, 0)
        high = G.to(tl.float32)
        return high, (G - high.to(tl.float64)).to(tl.float32), tl.sum(rate, 0)
    else:
        return 0.0, 0.0, 0.0


@triton.jit
def entering(x, G, c: tl.constexpr):
    """Rows of x, weighted as a state from before the chunk is seen by each token."""
    if c.decay:
        return x * tl.exp2(G[0])[:, None]
    else:
        return x


@triton.jit
def leaving(x, G, c: tl.constexpr):
    """Rows of x, weighted as each token is seen after the chunk."""
    if c.decay:
        return x * tl.exp2((G[2] - G[0].to(tl.float64) - G[1].to(tl.float64)).to(tl.float32))[:, None]
    else:
        return x


@triton.jit
def through(x, G, c: tl.constexpr):
    """A state from before the chunk, as it is seen after it."""
    if c.decay:
        return x * tl.exp2(G[2].to(tl.float32))
    else:
        return x


@triton.jit
def seen(x, t, G, c: tl.constexpr):
    """``x [i, j]`` of queries i and keys j, weighted by ``exp(G_i - G_j)``; 0 where j comes after i.

    Rows and columns are counted from t, the chunk: a mask that is the same in each would be kept in registers.
    """
    i = (t + tl.arange(0, c.C)).to(tl.int32)
    if c.decay:
        x = x * tl.exp2(tl.minimum((G[0][:, None] - G[0][None, :]) + (G[1][:, None] - G[1][None, :]), 0.0))
    return tl.where(i[:, None] >= i[None, :], x, 0.0)


@triton.jit
def seen_by(x, t, G, c: tl.constexpr):
    """:func:`seen` of ``x [j, i]``."""
    i = (t + tl.arange(0, c.C)).to(tl.int32)
    if c.decay:
        x = x * tl.exp2(tl.minimum((G[0][None, :] - G[0][:, None]) + (G[1][None, :] - G[1][:, None]), 0.0))
    return tl.where(i[:, None] <= i[None, :], x, 0.0)


@triton.jit
def inverse_den(den):
    """``1 / den``, 0 where den is under the floor."""
    empty = den < DEN_FLOOR
    return tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, den))


@triton.jit
def crossing(states, final_values, final_mass, Cs, cs, tile, row, last, h, H, s0, c: tl.constexpr):
    """What the log decays share at a tile's end: <state after the tile, its gradient>, over features s0 .. s0 + SB."""
    if last:
        sketch = row * H + h
        M, m = load_sketch(final_values + sketch * (c.S * c.Dv), final_mass + sketch * c.S, s0, c)
    else:
        M, m = load_state(states, (tile + 1).to(tl.int64) * H + h, s0, c)
    return tl.sum(tl.sum(M * Cs, 1), 0) + tl.sum(m * cs, 0)
