"""A running state: in memory, in shared memory where it is published, and what it gives the log decays.

A program holds one block of SB features of a state: ``M [SB, BV]`` and its mass, in column 0 of ``m [SB, 16]`` (several blocks:
``m [SB]``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.decay import decay_block, release_decay, transpose_to_end, wait_decay
from race_dist.kernels.hopper.layouts import (
    blocked_layout,
    round_to_bf16,
    shared_layout,
    truncate_to_bf16,
    wgmma_layout,
)
from race_dist.kernels.hopper.pipeline import Mbarriers, allocate_operands, allocate_vectors, make_mbarriers


@aggregate
class StatePipeline(Mbarriers):
    """A pipeline of published states: M, in one or two bfloat16 parts, and m."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor  # [depth, SB, BV] bfloat16
    values_low: gl.shared_memory_descriptor  # the same: M - values; None where M is published in one part
    mass: gl.shared_memory_descriptor  # [depth, SB] float32


@gluon.jit
def make_state_pipeline(depth: gl.constexpr, consumers: gl.constexpr, parts: gl.constexpr, c: gl.constexpr):
    """A :class:`StatePipeline` of states in ``parts`` parts."""
    full, empty = make_mbarriers(depth, consumers)
    values = allocate_operands(depth, c.SB, c.BV)
    if parts == 2:
        values_low = allocate_operands(depth, c.SB, c.BV)
        return StatePipeline(full, empty, values, values_low, allocate_vectors(depth, c.SB))
    else:
        return StatePipeline(full, empty, values, None, allocate_vectors(depth, c.SB))


@gluon.jit
def load_state(states, index, n, c: gl.constexpr, first=0):
    """``M [SB, BV]``, columns ``first`` on, and the mass in column 0 of ``[SB, 16]``, of block n of state number ``index``
    (64-bit)."""
    values = states + index * (c.S * (c.Dv + 1))
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, wgmma_layout(c.BV)))
    column = first + gl.arange(0, c.BV, gl.SliceLayout(0, wgmma_layout(c.BV)))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    M = gl.load(values + s[:, None] * c.Dv + column[None, :], mask=inside, other=0.0)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, wgmma_layout(16)))
    column = gl.arange(0, 16, gl.SliceLayout(0, wgmma_layout(16)))
    inside = (s < c.S)[:, None] & (column == 0)[None, :]
    m = gl.load(values + c.S * c.Dv + s[:, None] + column[None, :], mask=inside, other=0.0)
    return M, m


@gluon.jit
def load_blocks(states, index, first, c: gl.constexpr):
    """Every block of state number ``index``: NSB x ``[SB, BV]`` values, columns ``first`` on, and NSB x ``[SB]`` mass."""
    Ms, ms = (), ()
    for n in gl.static_range(c.NSB):
        M, m = load_state(states, index, n, c, first)
        Ms, ms = Ms + (M,), ms + (gl.sum(m, 1),)
    return Ms, ms


@gluon.jit
def store_values(states, index, M, c: gl.constexpr):
    """Store ``M [SB, BV]`` of state number ``index``."""
    s = gl.arange(0, c.SB, gl.SliceLayout(1, wgmma_layout(c.BV)))
    column = gl.arange(0, c.BV, gl.SliceLayout(0, wgmma_layout(c.BV)))
    values = states + index * (c.S * (c.Dv + 1))
    gl.store(values + s[:, None] * c.Dv + column[None, :], M, mask=(s < c.S)[:, None] & (column < c.Dv)[None, :])


@gluon.jit
def store_mass(states, index, m, c: gl.constexpr):
    """Store the mass of state number ``index``, given as ``[SB, 16]`` whose columns add to it."""
    s = gl.arange(0, c.SB, gl.SliceLayout(1, wgmma_layout(16)))
    gl.store(states + index * (c.S * (c.Dv + 1)) + c.S * c.Dv + s, gl.sum(m, 1), mask=s < c.S)


@gluon.jit
def make_mass_operand(c: gl.constexpr):
    """The right operand ``[16, C]`` (given transposed) that sums a chunk's features into a mass: its first row is ones."""
    layout: gl.constexpr = blocked_layout(c.C)
    first = gl.arange(0, 16, gl.SliceLayout(1, layout)) == 0
    value = gl.zeros([16, c.C], gl.float32, layout) + gl.where(first, 1.0, 0.0)[:, None]
    ones = gl.allocate_shared_memory(gl.bfloat16, [16, c.C], shared_layout(16, c.C), value.to(gl.bfloat16))
    fence_async_shared()
    return ones


@gluon.jit
def store_parts(high, low, M, exact: gl.constexpr = False):
    """Store M as two bfloat16 operands in shared memory. ``exact``: the first is also read without the second, so it is rounded
    and not truncated."""
    upper = round_to_bf16(M) if exact else truncate_to_bf16(M)
    high.store(upper.to(gl.bfloat16))
    low.store((M - upper).to(gl.bfloat16))


@gluon.jit
def store_pair(buffer, x, c: gl.constexpr):
    """Store ``x [C]`` in two bfloat16 parts, as the first rows of a right operand ``[16, C]`` (given transposed)."""
    layout: gl.constexpr = blocked_layout(c.C)
    x = gl.convert_layout(x, gl.SliceLayout(0, layout))
    high = truncate_to_bf16(x)
    number = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    pair = gl.where(number == 0, high[None, :], gl.where(number == 1, (x - high)[None, :], 0.0))  # [16, C]
    buffer.store(pair.to(gl.bfloat16))


@gluon.jit
def publish_state(pipe, j, M, m, parts: gl.constexpr, c: gl.constexpr, exact: gl.constexpr = False):
    """Publish a running state, before it is changed, as turn j: M in one or two parts (:func:`store_parts`), and m.

    Returns the stage."""
    stage = pipe.producer_acquire(j)
    if parts == 2:
        store_parts(pipe.values.index(stage), pipe.values_low.index(stage), M, exact)
    else:
        pipe.values.index(stage).store(M.to(gl.bfloat16))
    if c.is_global:
        if c.NSB == 1:
            pipe.mass.index(stage).store(gl.sum(m, 1))
        else:
            pipe.mass.index(stage).store(m)
    pipe.producer_commit(j)
    return stage


@gluon.jit
def _add_keys(M, m, Fk, v_c, ones, decay, stage, c: gl.constexpr):
    """One of several blocks ``M [SB, BV]``, ``m [SB]``, with a chunk's keys ``Fk [C, SB]`` and values ``v_c [C, BV]`` added."""
    Fk = transpose_to_end(Fk, decay, stage, c)
    M, m = decay_block(M, m, decay, stage, c)
    M = warpgroup_mma(Fk, v_c, M, is_async=True)
    if c.is_global:
        mass = gl.zeros([c.SB, 16], gl.float32, wgmma_layout(16))
        mass = warpgroup_mma(Fk, ones.permute((1, 0)), mass, use_acc=False, is_async=True)
        M, mass = warpgroup_mma_wait(0, (M, mass))
        m += gl.sum(mass, 1)
    else:
        M = warpgroup_mma_wait(0, (M,))
    return M, m


@gluon.jit
def prefix_state_blocks(args, ones, states, index, parts: gl.constexpr, c: gl.constexpr):
    """The chunk recurrence of a prefix state of several blocks of features, all in registers, over a tile's keys; published
    before each chunk, in ``parts`` parts. ``args``: the kernel's :class:`PartitionArgs`."""
    v_pipe, decay = args.v_pipe, args.decay
    Ms, ms = load_blocks(states, index, args.program.value_block * c.BV, c)
    for i in range(args.program.num_chunks):
        stage = wait_decay(decay, i, c)
        v_c = v_pipe.consumer_buffer(i)  # [C, BV]
        new_Ms, new_ms = (), ()
        for n in gl.static_range(c.NSB):
            M, m = Ms[n], ms[n]
            j = i * c.NSB + n
            publish_state(args.state_pipe, j, M, m, parts, c)
            M, m = _add_keys(M, m, args.phi_k_pipe.consumer_buffer(j), v_c, ones, decay, stage, c)
            args.phi_k_pipe.consumer_release(j)
            new_Ms, new_ms = new_Ms + (M,), new_ms + (m,)
        Ms, ms = new_Ms, new_ms
        v_pipe.consumer_release(i)
        release_decay(decay, i, c)


@gluon.jit
def tile_end_decay_gradient(states, final, suffixes, program, tile, c: gl.constexpr):
    """What every log decay of the tile gets from the tokens after it: <state after the tile, its gradient>, a scalar, over the
    program's value columns, the first block of which has the mass.

    ``states``: before each tile; ``final``: the :class:`Sketch`; ``suffixes``: behind each tile."""
    total = 0.0
    for n in gl.static_range(c.NSB):
        if tile.is_last:
            sketch = tile.sequence * program.H + program.h
            values = final.values_ptr + sketch * (c.S * c.Dv)
            total += _inner_product(values, final.mass_ptr + sketch * c.S, suffixes, program, n, c)
        else:
            after = ((program.tile_index + 1).to(gl.int64) * program.H + program.h) * (c.S * (c.Dv + 1))
            values = states + after
            total += _inner_product(values, values + c.S * c.Dv, suffixes, program, n, c)
    return total


@gluon.jit
def _inner_product(values, mass, suffixes, program, n, c: gl.constexpr):
    """<state, suffix state> of block n."""
    layout: gl.constexpr = blocked_layout(c.BV)
    s = n * c.SB + gl.arange(0, c.SB, gl.SliceLayout(1, layout))
    column = program.value_block * c.BV + gl.arange(0, c.BV, gl.SliceLayout(0, layout))
    inside = (s < c.S)[:, None] & (column < c.Dv)[None, :]
    offset = s[:, None] * c.Dv + column[None, :]
    suffix = suffixes + program.index * (c.S * (c.Dv + 1))
    M = gl.load(values + offset, mask=inside, other=0.0).to(gl.float32)  # [SB, BV]
    m = gl.load(mass + s, mask=(s < c.S) & (program.value_block == 0), other=0.0).to(gl.float32)  # [SB]
    Cs = gl.load(suffix + offset, mask=inside, other=0.0)  # [SB, BV]
    cs = gl.load(suffix + c.S * c.Dv + s, mask=s < c.S, other=0.0)  # [SB]
    return gl.sum(gl.sum(M * Cs, 1), 0) + gl.sum(m * cs, 0)
