"""Decay: how much of a token, or of a state, is seen from where.

The features part works out a chunk's weights once and hands them on as float32 vectors in shared memory: (G high, G low,
leave, through, sight, enter), G the running sum of the chunk's log decays in binary units. Without decay there is no ring.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from race_dist.kernels.common import LEAST_LOG_DECAY, LOG2E
from race_dist.kernels.hopper.soft_hash import one_part
from race_dist.kernels.hopper.layouts import left, product
from race_dist.kernels.hopper.pipeline import await_empty, await_full, load_scalars, make_ring, set_empty, set_full, vectors

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
def pass_block(M, m, weights, at, c: gl.constexpr):
    """:func:`pass_through` of a block whose mass is ``[SB]``."""
    if c.decay:
        M *= weights[5].index(at).load(gl.SliceLayout(1, product(c.BV)))[:, None]
        m *= weights[5].index(at).load(gl.SliceLayout(1, product(16)))
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
