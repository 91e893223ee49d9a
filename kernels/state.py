"""States in memory, and the denominators read from them.

State number ``index`` (64-bit) is ``S (Dv + 1)`` float32 numbers: values ``[S, Dv]``, then mass ``[S]``. A program holds
features s0 .. s0 + SB of it: ``M [SB, BV]`` and ``m [SB]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_DEN = tl.constexpr(2.0**-96)
BUCKET_EPS = tl.constexpr(1e-6)


@triton.jit
def load_state(states, index, s0, c: tl.constexpr):
    """``M [SB, BV]`` and ``m [SB]`` of state number ``index``."""
    values = states + index * (c.S * (c.Dv + 1))
    return load_sketch(values, values + c.S * c.Dv, s0, c)


@triton.jit
def load_sketch(values, mass, s0, c: tl.constexpr):
    """``M [SB, BV]`` and ``m [SB]`` of one state whose values and mass are separate tensors; as float32."""
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


@triton.jit
def inverse_den(den):
    """``1 / den``, 0 where den is below the least denominator."""
    empty = den < MIN_DEN
    return tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, den))


@triton.jit
def tile_end_decay_gradient(states, final, Cs, cs, tile_index, tile, h, H, s0, c: tl.constexpr):
    """What every log decay of the tile gets from the tokens after it: <state after the tile, its gradient>, a scalar.

    ``states``: before each tile; ``final``: the :class:`Sketch`. ``Cs [SB, BV]`` and ``cs [SB]``, the suffix state behind the
    tile, are that gradient. Over features s0 .. s0 + SB."""
    if tile.is_last:
        sketch = tile.sequence * H + h
        M, m = load_sketch(final.values_ptr + sketch * (c.S * c.Dv), final.mass_ptr + sketch * c.S, s0, c)
    else:
        M, m = load_state(states, (tile_index + 1).to(tl.int64) * H + h, s0, c)
    return tl.sum(tl.sum(M * Cs, 1), 0) + tl.sum(m * cs, 0)
