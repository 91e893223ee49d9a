"""A running state: where it lies, how it is published, what it gives the log decays."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from race_dist.kernels.hopper.layouts import by_rows, cut, product, rounded, tile
from race_dist.kernels.hopper.pipeline import await_empty, set_full


@gluon.jit
def load_state(states, index, n, c: gl.constexpr, first=0):
    """``M [SB, BV]``, columns from ``first`` on, and the mass in column 0 of ``[SB, 16]``, of block n of state number
    ``index`` (64-bit)."""
    values = states + index * (c.S * (c.Dv + 1))
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(c.BV)))
    column = first + gl.arange(0, c.BV, gl.SliceLayout(0, product(c.BV)))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    M = gl.load(values + s[:, None] * c.Dv + column[None, :], mask=inside, other=0.0)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, product(16)))
    column = gl.arange(0, 16, gl.SliceLayout(0, product(16)))
    inside = (s < c.S)[:, None] & (column == 0)[None, :]
    m = gl.load(values + c.S * c.Dv + s[:, None] + column[None, :], mask=inside, other=0.0)
    return M, m


@gluon.jit
def load_blocks(states, index, first, c: gl.constexpr):
    """Every block of state number ``index``: its values from column ``first`` on, ``[SB, BV]``, and its mass ``[SB]``."""
    Ms, ms = (), ()
    for n in gl.static_range(c.NSB):
        M, m = load_state(states, index, n, c, first)
        Ms, ms = Ms + (M,), ms + (gl.sum(m, 1),)
    return Ms, ms


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
    ones = gl.allocate_shared_memory(gl.bfloat16, [16, c.C], tile(16, c.C), value.to(gl.bfloat16))
    fence_async_shared()
    return ones


@gluon.jit
def put_mass(buffer, m, c: gl.constexpr):
    """The mass as ``[SB]`` in shared memory."""
    if c.NSB == 1:
        buffer.store(gl.sum(m, 1))
    else:
        buffer.store(m)


@gluon.jit
def put_parts(high, low, M, apart: gl.constexpr = False):
    """M as two bfloat16 operands in shared memory. ``apart``: the first is also read without the second."""
    upper = rounded(M) if apart else cut(M)
    high.store(upper.to(gl.bfloat16))
    low.store((M - upper).to(gl.bfloat16))


@gluon.jit
def put_pair(buffer, x, c: gl.constexpr):
    """``x [C]`` in two bfloat16 parts, as the first rows of a right operand ``[16, C]`` (given transposed)."""
    layout: gl.constexpr = by_rows(c.C)
    x = gl.convert_layout(x, gl.SliceLayout(0, layout))
    high = cut(x)
    number = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    buffer.store(gl.where(number == 0, high[None, :], gl.where(number == 1, (x - high)[None, :], 0.0)).to(gl.bfloat16))


@gluon.jit
def publish(M, m, turn, state, parts: gl.constexpr, c: gl.constexpr, apart: gl.constexpr = False):
    """Hand on a running state before it is changed, as turn ``turn`` of a ring: M in one or two parts (:func:`put_parts`), and
    m. Its place."""
    at = await_empty(state, turn)
    if parts == 2:
        put_parts(state[2].index(at), state[3].index(at), M, apart)
    else:
        state[2].index(at).store(M.to(gl.bfloat16))
    if c.is_global:
        put_mass(state[2 + parts].index(at), m, c)
    set_full(state, turn)
    return at


@gluon.jit
def crossing(states, final_values, final_mass, suffixes, number, index, row, last, h, H, part, c: gl.constexpr):
    """What the log decays share at a tile's end: <state after the tile, its gradient>, over block ``part`` of the value
    columns, the first of which has the mass."""
    total = 0.0
    for n in gl.static_range(c.NSB):
        if last:
            sketch = row * H + h
            total += _inner(final_values + sketch * (c.S * c.Dv), final_mass + sketch * c.S, suffixes, index, n, part, c)
        else:
            after = states + ((number + 1).to(gl.int64) * H + h) * (c.S * (c.Dv + 1))
            total += _inner(after, after + c.S * c.Dv, suffixes, index, n, part, c)
    return total


@gluon.jit
def _inner(values, mass, suffixes, index, n, part, c: gl.constexpr):
    layout: gl.constexpr = by_rows(c.BV)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, layout))
    column = part * c.BV + gl.arange(0, c.BV, gl.SliceLayout(0, layout))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    place = s[:, None] * c.Dv + column[None, :]
    suffix = suffixes + index * (c.S * (c.Dv + 1))
    M = gl.load(values + place, mask=inside, other=0.0).to(gl.float32)
    m = gl.load(mass + s, mask=(s < c.S) & (part == 0), other=0.0).to(gl.float32)
    Cs = gl.load(suffix + place, mask=inside, other=0.0)
    cs = gl.load(suffix + c.S * c.Dv + s, mask=s < c.S, other=0.0)
    return gl.sum(gl.sum(M * Cs, 1), 0) + gl.sum(m * cs, 0)
