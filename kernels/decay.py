"""Decay weights inside a chunk: ``exp(G_i - G_j)`` of a query i and a key j, with G the running sum of the log decays."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from race_dist.kernels.rows import load_scalars
from race_dist.kernels.soft_hash import LOG2E

MIN_LOG_DECAY = tl.constexpr(-1000.0)  # exp of it is 0 in float32; keeps -inf and a reset's size out of the sums


class ChunkDecay(NamedTuple):
    """G, the running sum ``[C]`` of a chunk's log decays in binary units, and its last value ``total``.

    G is the sum of two float32 parts, so that the difference of neighbours is exact beside a hard reset that is many times as
    large. Zeros without decay.
    """

    high: Any
    low: Any
    total: Any


@triton.jit
def load_decay(log_decay, b, t, h, n, c: tl.constexpr):
    """The :class:`ChunkDecay` of tokens t .. t + n."""
    if c.decay:
        rate = tl.maximum(load_scalars(log_decay, b, t, h, n, c).to(tl.float32), MIN_LOG_DECAY).to(tl.float64) * LOG2E
        G = tl.cumsum(rate, 0)
        high = G.to(tl.float32)
        return ChunkDecay(high, (G - high.to(tl.float64)).to(tl.float32), tl.sum(rate, 0))
    else:
        return ChunkDecay(0.0, 0.0, 0.0)


@triton.jit
def decay_from_start(x, G, c: tl.constexpr):
    """Rows ``x [C, ...]`` times exp(G_i): as token i sees what was there before the chunk."""
    if c.decay:
        return x * tl.exp2(G.high)[:, None]
    else:
        return x


@triton.jit
def decay_to_end(x, G, c: tl.constexpr):
    """Rows ``x [C, ...]`` times exp(G_last - G_j): as token j is seen after the chunk."""
    if c.decay:
        return x * tl.exp2((G.total - G.high.to(tl.float64) - G.low.to(tl.float64)).to(tl.float32))[:, None]
    else:
        return x


@triton.jit
def decay_over_chunk(x, G, c: tl.constexpr):
    """x times exp(G_last): a state from before the chunk, as it is seen after it."""
    if c.decay:
        return x * tl.exp2(G.total.to(tl.float32))
    else:
        return x


@triton.jit
def causal_decay(x, t, G, c: tl.constexpr):
    """``x [C, C]`` of queries i and keys j times ``exp(G_i - G_j)``; 0 where j comes after i.

    Rows and columns are counted from the chunk's first token t: a mask that is the same in each chunk would be kept in
    registers.
    """
    i = (t + tl.arange(0, c.C)).to(tl.int32)
    if c.decay:
        high = G.high[:, None] - G.high[None, :]
        low = G.low[:, None] - G.low[None, :]
        x = x * tl.exp2(tl.minimum(high + low, 0.0))
    return tl.where(i[:, None] >= i[None, :], x, 0.0)


@triton.jit
def causal_decay_transposed(x, t, G, c: tl.constexpr):
    """:func:`causal_decay` of ``x [C, C]`` of keys j and queries i."""
    i = (t + tl.arange(0, c.C)).to(tl.int32)
    if c.decay:
        high = G.high[None, :] - G.high[:, None]
        low = G.low[None, :] - G.low[:, None]
        x = x * tl.exp2(tl.minimum(high + low, 0.0))
    return tl.where(i[:, None] <= i[None, :], x, 0.0)
