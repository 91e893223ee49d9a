"""Decay weights of a chunk, in shared memory.

The hash partition computes a chunk's weights once and produces them as float32 vectors. G is the running sum of the chunk's log
decays in binary units. Without decay there is no pipeline, and a function here returns its argument as it is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from race_dist.kernels.decay import MIN_LOG_DECAY
from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.layouts import LINE_LAYOUT, to_lhs, lhs_layout, wgmma_layout
from race_dist.kernels.hopper.pipeline import Mbarriers, allocate_vectors, load_scalars, make_mbarriers
from race_dist.kernels.soft_hash import LOG2E


@aggregate
class DecayPipeline(Mbarriers):
    """A pipeline of a chunk's decay weights, ``[depth, C]`` each."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    high: gl.shared_memory_descriptor  # G_i = high + low, so that differences are exact beside a hard reset
    low: gl.shared_memory_descriptor
    to_end: gl.shared_memory_descriptor  # exp(G_last - G_j): token j as seen after the chunk
    over_chunk: gl.shared_memory_descriptor  # exp(G_last), C times
    from_tile: gl.shared_memory_descriptor  # exp(G_i + decay since the tile's start): as the tile's first token is seen
    from_start: gl.shared_memory_descriptor  # exp(G_i): what was there before the chunk, as seen by token i


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def reverse_cumsum(x):
    """Sums of ``x [C]`` from each token on."""
    return gl.associative_scan(x, 0, _add, reverse=True)


@gluon.jit
def make_decay_pipeline(c: gl.constexpr):
    """The pipeline, two consumers."""
    full, empty = make_mbarriers(2, 2)
    return DecayPipeline(
        full,
        empty,
        allocate_vectors(2, c.C),
        allocate_vectors(2, c.C),
        allocate_vectors(2, c.C),
        allocate_vectors(2, c.C),
        allocate_vectors(2, c.C),
        allocate_vectors(2, c.C),
    )


@gluon.jit
def wait_decay(decay, i, c: gl.constexpr):
    """Wait for chunk i's weights; their stage."""
    if c.decay:
        return decay.consumer_wait(i)
    else:
        return 0


@gluon.jit
def release_decay(decay, i, c: gl.constexpr):
    """Release chunk i's weights."""
    if c.decay:
        decay.consumer_release(i)


@gluon.jit
def produce_decay(decay, i, log_decay, b, t, h, n, reach, c: gl.constexpr):
    """Compute and commit chunk i's weights. ``reach``: the log decay from the tile's first token to the chunk; returned with
    the chunk's added."""
    rate = load_scalars(log_decay, b, t, h, n, LINE_LAYOUT, c).to(gl.float32)  # [C]
    rate = gl.maximum(rate, MIN_LOG_DECAY).to(gl.float64) * LOG2E
    G = gl.associative_scan(rate, 0, _add)
    total = gl.sum(rate, 0)
    high = G.to(gl.float32)
    stage = decay.producer_acquire(i)
    decay.high.index(stage).store(high)
    decay.low.index(stage).store((G - high.to(gl.float64)).to(gl.float32))
    decay.to_end.index(stage).store(gl.exp2((total - G).to(gl.float32)))
    decay.over_chunk.index(stage).store(gl.exp2((total + (G - G)).to(gl.float32)))
    decay.from_tile.index(stage).store(gl.exp2((reach + G).to(gl.float32)))
    decay.from_start.index(stage).store(gl.exp2(high))
    decay.producer_commit(i)
    return reach + total


@gluon.jit
def decay_rows_from_start(x, decay, stage, layout: gl.constexpr, c: gl.constexpr):
    """Rows of ``x [C, ...]`` times exp(G_i)."""
    if c.decay:
        return x * decay.from_start.index(stage).load(gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def decay_vector_from_start(x, decay, stage, layout: gl.constexpr, c: gl.constexpr):
    """``x [C]`` times exp(G_i)."""
    if c.decay:
        return x * decay.from_start.index(stage).load(layout)
    else:
        return x


@gluon.jit
def decay_vector_from_tile(x, decay, stage, layout: gl.constexpr, c: gl.constexpr):
    """``x [C]`` times the decay since the tile's first token."""
    if c.decay:
        return x * decay.from_tile.index(stage).load(layout)
    else:
        return x


@gluon.jit
def decay_rows_to_end(x, decay, stage, layout: gl.constexpr, c: gl.constexpr):
    """Rows of ``x [C, ...]`` times exp(G_last - G_j)."""
    if c.decay:
        return x * decay.to_end.index(stage).load(gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def decay_state(M, m, decay, stage, c: gl.constexpr):
    """A state ``M [SB, BV]``, ``m [SB, 16]`` times exp(G_last): as it is seen after the chunk."""
    if c.decay:
        M *= decay.over_chunk.index(stage).load(gl.SliceLayout(1, wgmma_layout(c.BV)))[:, None]
        m *= decay.over_chunk.index(stage).load(gl.SliceLayout(1, wgmma_layout(16)))[:, None]
    return M, m


@gluon.jit
def decay_block(M, m, decay, stage, c: gl.constexpr):
    """:func:`decay_state` of a block whose mass is ``[SB]``."""
    if c.decay:
        M *= decay.over_chunk.index(stage).load(gl.SliceLayout(1, wgmma_layout(c.BV)))[:, None]
        m *= decay.over_chunk.index(stage).load(gl.SliceLayout(1, wgmma_layout(16)))
    return M, m


@gluon.jit
def transpose_to_end(F, decay, stage, c: gl.constexpr):
    """``F^T [SB, C]`` as a left operand, F in shared memory; under decay in registers, token j times exp(G_last - G_j)."""
    if c.decay:
        return _transpose_weighted(F, decay.to_end.index(stage), c)
    else:
        return F.permute((1, 0))


@gluon.jit
def transpose_from_start(F, decay, stage, c: gl.constexpr):
    """:func:`transpose_to_end` with token i times exp(G_i)."""
    if c.decay:
        return _transpose_weighted(F, decay.from_start.index(stage), c)
    else:
        return F.permute((1, 0))


@gluon.jit
def transpose_from_tile(F, decay, stage, c: gl.constexpr):
    """:func:`transpose_to_end` with token i times the decay since the tile's first token."""
    if c.decay:
        return _transpose_weighted(F, decay.from_tile.index(stage), c)
    else:
        return F.permute((1, 0))


@gluon.jit
def _transpose_weighted(F, weights, c: gl.constexpr):
    x = F.permute((1, 0)).load(wgmma_layout(c.C)).to(gl.float32)  # [SB, C]
    x = x * weights.load(gl.SliceLayout(0, wgmma_layout(c.C)))[None, :]
    return to_lhs(x, lhs_layout(c.BV))


@gluon.jit
def causal_decay(x, decay, stage, c: gl.constexpr):
    """``x [C, C]`` of queries i and keys j times ``exp(G_i - G_j)``, 0 where j comes after i."""
    i = gl.arange(0, c.C, gl.SliceLayout(1, wgmma_layout(c.C)))
    j = gl.arange(0, c.C, gl.SliceLayout(0, wgmma_layout(c.C)))
    if c.decay:
        x = x * _decay_between(decay, stage, 1.0, c)
    return gl.where(i[:, None] >= j[None, :], x, 0.0)


@gluon.jit
def causal_decay_transposed(x, decay, stage, c: gl.constexpr):
    """:func:`causal_decay` of ``x [C, C]`` of keys j and queries i."""
    j = gl.arange(0, c.C, gl.SliceLayout(1, wgmma_layout(c.C)))
    i = gl.arange(0, c.C, gl.SliceLayout(0, wgmma_layout(c.C)))
    if c.decay:
        x = x * _decay_between(decay, stage, -1.0, c)
    return gl.where(j[:, None] <= i[None, :], x, 0.0)


@gluon.jit
def _decay_between(decay, stage, sign: gl.constexpr, c: gl.constexpr):
    """``exp(sign (G_row - G_column))``, ``[C, C]``, at most 1, from both parts of G."""
    rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.C))
    columns: gl.constexpr = gl.SliceLayout(0, wgmma_layout(c.C))
    high = decay.high.index(stage).load(rows)[:, None] - decay.high.index(stage).load(columns)[None, :]
    low = decay.low.index(stage).load(rows)[:, None] - decay.low.index(stage).load(columns)[None, :]
    return gl.exp2(gl.minimum(sign * (high + low), 0.0))
