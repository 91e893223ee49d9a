"""The forward read-out (``walk.race_recurrent_fwd_kernel``) as a pipeline of warp groups; see the package."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import inverse_den, locate
from race_dist.kernels.hopper.blocks import walk_blocks
from race_dist.kernels.hopper.soft_hash import load_keep, one_part, put_features, put_planes, take_signs
from race_dist.kernels.hopper.layouts import left, product, rounded, tile
from race_dist.kernels.hopper.pipeline import (
    await_full,
    fetch,
    make_ring,
    next_full,
    open_heads,
    open_rows,
    operands,
    send,
    set_empty,
    store_scalars,
    vectors,
)
from race_dist.kernels.hopper.state import load_state, publish, put_ones
from race_dist.kernels.hopper.decay import (
    LEAVE,
    await_weights,
    enter_rows,
    enter_vector,
    free_weights,
    make_weights,
    pass_through,
    put_weights,
    seen,
    transposed,
)


@gluon.jit
def race_hopper_fwd_kernel(q, k, v, out, den, planes, beta, log_decay, key_mask, states, tiles, T, TILE, H, c: gl.constexpr):
    """Program (tile, head, block of value columns): writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``."""
    part = gl.program_id(0) % c.NVB
    h = (gl.program_id(0) // c.NVB % H).to(gl.int64)
    number = gl.program_id(0) // (c.NVB * H)
    b, row, start, end, _ = locate(tiles, number, T, TILE, c)
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32), part)
    index = (number if c.causal else row).to(gl.int64) * H + h
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, out_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(out, b, h, end, c.Dv, c.BV, c)
    q_s = make_ring(2, 1) + (operands(2, c.C, c.BD),)
    turns: gl.constexpr = 2 if c.NSB == 1 else 4
    queries = make_ring(turns, 1) + (operands(turns, c.C, c.SB),)  # phi(q)
    k_s, v_s, keys = q_s, q_s, queries  # unused, where not causal
    if c.causal:
        k_s = make_ring(2, 1) + (operands(2, c.C, c.BD),)
        v_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
        keys = make_ring(turns, 2) + (operands(turns, c.C, c.SB),)  # phi(k)
    state = make_ring(2, 1) + (operands(2, c.SB, c.BV), vectors(2, c.SB))  # M, m
    weights = make_weights(c)
    # of threads of the hash and of the state
    registers: gl.constexpr = (128, 176) if c.NSB == 1 else (96, 208)
    gl.warp_specialize(
        [
            (_rows, (out_rows, v_s, keys, queries, state, weights, place, den, c)),
            (_features, (k_s, q_s, keys, queries, weights, place, planes_s, beta, log_decay, key_mask, c)),
            (_state, (v_s, keys, state, weights, place, put_ones(c), states, index, c)),
            (_loader, (k_rows, v_rows, q_rows, k_s, v_s, q_s, place, c)),
        ],
        [4, 4, 1],
        [registers[0], registers[1], 24],
    )


@gluon.jit
def _loader(k_rows, v_rows, q_rows, k_s, v_s, q_s, place, c: gl.constexpr):
    _, _, start, _, chunks, part = place
    for i in range(chunks):
        t = start + i * c.C
        if c.causal:
            fetch(k_rows, t, k_s, i, c.BD, c)
            fetch(v_rows, t, v_s, i, c.BV, c, part * c.BV)
        for g in gl.static_range(c.G):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)


@gluon.jit
def _features(k_s, q_s, keys, queries, weights, place, planes_s, beta, log_decay, key_mask, c: gl.constexpr):
    b, h, start, end, chunks, _ = place
    sharp = gl.load(beta + h).to(gl.float32)
    ones = gl.full([c.C], 1.0, gl.float32, gl.SliceLayout(1, product(c.SB)))
    for i in range(chunks):
        t = start + i * c.C
        if c.causal:
            keep = load_keep(key_mask, b, t, end - t, c)
            u = take_signs(k_s, i, planes_s, c)
            if c.decay:
                put_weights(weights, i, log_decay, b, t, h, end - t, 0.0, c)
            put_features(keys, i, u, keep, sharp, planes_s, c)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            put_features(queries, j, take_signs(q_s, j, planes_s, c), ones, sharp, planes_s, c)


@gluon.jit
def _state(v_s, keys, state, weights, place, ones, states, index, c: gl.constexpr):
    if c.NSB == 1:
        _one_block(v_s, keys, state, weights, place, ones, states, index, c)
    else:
        walk_blocks(v_s, keys, state, weights, place[4], ones, states, index, place[5] * c.BV, 1, c)


@gluon.jit
def _one_block(v_s, keys, state, weights, place, ones, states, index, c: gl.constexpr):
    M, m = load_state(states, index, 0, c)
    if not c.causal:
        publish(M, m, 0, state, 1, c)
    for i in range(place[4] if c.causal else 0):
        at = await_weights(weights, i, c)
        publish(M, m, i, state, 1, c)
        Fk = transposed(next_full(keys, i), weights, LEAVE, at, c)
        M, m = pass_through(M, m, weights, at, c)
        M = warpgroup_mma(Fk, next_full(v_s, i), M, is_async=True)
        if c.is_global:
            m = warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True)
        M, m = warpgroup_mma_wait(0, (M, m))
        set_empty(keys, i)
        set_empty(v_s, i)
        free_weights(weights, i, c)


@gluon.jit
def _rows(out_rows, v_s, keys, queries, state, weights, place, den, c: gl.constexpr):
    b, h, start, end, chunks, part = place
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], tile(c.C, c.BV))
    of_tokens: gl.constexpr = gl.SliceLayout(1, product(c.BV))
    for i in range(chunks):
        t = start + i * c.C
        at = await_weights(weights, i, c)
        for g in gl.static_range(c.G):
            A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            num = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
            total = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.SB)))
            for n in range(c.NSB):
                before = await_full(state, i * c.NSB + n if c.causal else n)
                j = (i * c.G + g) * c.NSB + n
                Fq = next_full(queries, j)
                if c.causal:
                    A = warpgroup_mma(Fq, next_full(keys, i * c.NSB + n).permute((1, 0)), A, is_async=True)
                num = warpgroup_mma(Fq, state[2].index(before), num, is_async=True)
                if c.is_global:
                    m = state[3].index(before).load(gl.SliceLayout(0, product(c.SB)))
                    total += gl.sum(Fq.load(product(c.SB)).to(gl.float32) * m[None, :], 1)
                A, num = warpgroup_mma_wait(0, (A, num))
                set_empty(queries, j)
                if c.causal and g == c.G - 1:
                    set_empty(state, i * c.NSB + n)
                    set_empty(keys, i * c.NSB + n)
            if c.causal:
                A = rounded(seen(A, weights, at, c))
                num = enter_rows(num, weights, at, product(c.BV), c)
                num = warpgroup_mma(one_part(A, left(c.BV)), next_full(v_s, i), num, is_async=True)
            if c.is_global:
                total = enter_vector(total, weights, at, gl.SliceLayout(1, product(c.SB)), c)
                total = gl.convert_layout(total + gl.sum(A, 1), of_tokens)
                store_scalars(den, total, b, t, h * c.G + g, gl.where(part == 0, end - t, 0), of_tokens, c)
            num = warpgroup_mma_wait(0, (num,))
            if c.causal and g == c.G - 1:
                set_empty(v_s, i)
                free_weights(weights, i, c)
            if c.is_global:
                num *= inverse_den(total)[:, None]
            send(out_rows[g], t, staging, num, part * c.BV)
    tma.store_wait(0)
