"""The walk of a running state over keys, where its features are several blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.layouts import product
from race_dist.kernels.hopper.pipeline import next_full, set_empty
from race_dist.kernels.hopper.state import load_blocks, publish
from race_dist.kernels.hopper.decay import LEAVE, await_weights, free_weights, pass_block, transposed


@gluon.jit
def _add_keys(M, m, Fk, v_c, ones, weights, at, c: gl.constexpr):
    """One of several blocks, with a chunk's keys in it."""
    Fk = transposed(Fk, weights, LEAVE, at, c)
    M, m = pass_block(M, m, weights, at, c)
    M = warpgroup_mma(Fk, v_c, M, is_async=True)
    if c.is_global:
        mass = warpgroup_mma(
            Fk, ones.permute((1, 0)), gl.zeros([c.SB, 16], gl.float32, product(16)), use_acc=False, is_async=True
        )
        M, mass = warpgroup_mma_wait(0, (M, mass))
        m += gl.sum(mass, 1)
    else:
        M = warpgroup_mma_wait(0, (M,))
    return M, m


@gluon.jit
def walk_blocks(v_s, keys, state, weights, chunks, ones, states, index, first, parts: gl.constexpr, c: gl.constexpr):
    """The walk of a running state of several blocks of features, all in registers, over a tile's keys; value columns from
    ``first`` on. Published before each chunk, in ``parts`` parts."""
    Ms, ms = load_blocks(states, index, first, c)
    for i in range(chunks):
        at = await_weights(weights, i, c)
        v_c = next_full(v_s, i)
        Ms_after, ms_after = (), ()
        for n in gl.static_range(c.NSB):
            M, m = Ms[n], ms[n]
            publish(M, m, i * c.NSB + n, state, parts, c)
            M, m = _add_keys(M, m, next_full(keys, i * c.NSB + n), v_c, ones, weights, at, c)
            set_empty(keys, i * c.NSB + n)
            Ms_after, ms_after = Ms_after + (M,), ms_after + (m,)
        Ms, ms = Ms_after, ms_after
        set_empty(v_s, i)
        free_weights(weights, i, c)
