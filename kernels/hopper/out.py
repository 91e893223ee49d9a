"""The forward read-out (``walk.walk_out``) as a pipeline of warp groups; see ``parts.py``."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import inverse_den, locate
from race_dist.kernels.hopper.parts import (
    await_empty, await_full, enter_rows, fetch, left, load_keep, load_state, make_ring, make_weights, next_full, open_heads,
    open_rows, operands, pass_through, product, project, put_mass, put_ones, put_planes, put_weights, seen, send, set_empty,
    set_full, signs, soft_hash, store_scalars, tile, transposed, vectors,
)


@gluon.jit
def pipe_out(q, k, v, out, den, planes, beta, log_decay, key_mask, states, tiles, T, TILE, H, c: gl.constexpr):
    """Program (tile, head): writes ``out [B, T, Hq, Dv]`` and, for "global", ``den [B, T, Hq]``."""
    h = (gl.program_id(0) % H).to(gl.int64)
    number = gl.program_id(0) // H
    b, row, start, end, _ = locate(tiles, number, T, TILE, c)
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32))
    index = (number if c.causal else row).to(gl.int64) * H + h
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, out_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(out, b, h, end, c.Dv, c.BV, c)
    k_s = make_ring(2, 1) + (operands(2, c.C, c.BD),)
    v_s = make_ring(3, 2) + (operands(3, c.C, c.BV),)
    q_s = make_ring(2, 1) + (operands(2, c.C, c.BD),)
    keys = make_ring(2, 2) + (operands(2, c.C, c.SB), make_weights(2, c))  # phi(k)
    queries = make_ring(2, 1) + (operands(2, c.C, c.SB),)  # phi(q)
    state = make_ring(2, 1) + (operands(2, c.SB, c.BV), vectors(2, c.SB))  # M, m
    gl.warp_specialize([
        (_rows, (out_rows, v_s, keys, queries, state, place, den, c)),
        (_features, (k_s, q_s, keys, queries, place, planes_s, beta, log_decay, key_mask, c)),
        (_state, (v_s, keys, state, place, put_ones(c), states, index, c)),
        (_loader, (k_rows, v_rows, q_rows, k_s, v_s, q_s, place, c)),
    ], [4, 4, 1], [152, 152, 24])


@gluon.jit
def _loader(k_rows, v_rows, q_rows, k_s, v_s, q_s, place, c: gl.constexpr):
    _, _, start, _, chunks = place
    for i in range(chunks):
        t = start + i * c.C
        if c.causal:
            fetch(k_rows, t, k_s, i, c.BD, c)
            fetch(v_rows, t, v_s, i, c.BV, c)
        for g in gl.static_range(c.G):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)


@gluon.jit
def _features(k_s, q_s, keys, queries, place, planes_s, beta, log_decay, key_mask, c: gl.constexpr):
    b, h, start, end, chunks = place
    W, ones, zeros = planes_s
    sharp = gl.load(beta + h).to(gl.float32)
    for i in range(chunks):
        t = start + i * c.C
        if c.causal:
            z = project(next_full(k_s, i), W, c)
            keep = load_keep(key_mask, b, t, end - t, c)
            u = signs(warpgroup_mma_wait(0, (z,)))
            set_empty(k_s, i)
            phi = gl.where(keep[:, None], soft_hash(u, sharp, ones, zeros, c), 0.0)
            at = await_empty(keys, i)
            keys[2].index(at).store(phi.to(gl.bfloat16))
            if c.decay:
                put_weights(keys[3], at, log_decay, b, t, h, end - t, 0.0, c)
            set_full(keys, i)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            z = project(next_full(q_s, j), W, c)
            u = signs(warpgroup_mma_wait(0, (z,)))
            set_empty(q_s, j)
            phi = soft_hash(u, sharp, ones, zeros, c)
            queries[2].index(await_empty(queries, j)).store(phi.to(gl.bfloat16))
            set_full(queries, j)


@gluon.jit
def _state(v_s, keys, state, place, ones, states, index, c: gl.constexpr):
    M, m = load_state(states, index, c)
    for i in range(place[4] if c.causal else 0):
        _publish(M, m, i, state, c)
        at = await_full(keys, i)
        Fk = transposed(keys[2].index(at), keys[3][2].index(at), c.BV, c)
        M, m = pass_through(M, m, keys[3], at, c)
        M = warpgroup_mma(Fk, next_full(v_s, i), M, is_async=True)
        if c.is_global:
            m = warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True)
            m = warpgroup_mma_wait(0, (m,))
        M = warpgroup_mma_wait(0, (M,))
        set_empty(keys, i)
        set_empty(v_s, i)
    if not c.causal:
        _publish(M, m, 0, state, c)


@gluon.jit
def _publish(M, m, i, state, c: gl.constexpr):
    at = await_empty(state, i)
    state[2].index(at).store(M.to(gl.bfloat16))
    if c.is_global:
        put_mass(state[3].index(at), m, c)
    set_full(state, i)


@gluon.jit
def _rows(out_rows, v_s, keys, queries, state, place, den, c: gl.constexpr):
    b, h, start, end, chunks = place
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], tile(c.C, c.BV))
    of_tokens: gl.constexpr = gl.SliceLayout(1, product(c.BV))
    for i in range(chunks):
        t = start + i * c.C
        before = await_full(state, i if c.causal else 0)
        at = await_full(keys, i) if c.causal else 0
        for g in gl.static_range(c.G):
            j = i * c.G + g
            Fq = next_full(queries, j)
            A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            if c.causal:
                A = warpgroup_mma(Fq, keys[2].index(at).permute((1, 0)), A, use_acc=False, is_async=True)
            num = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
            num = warpgroup_mma(Fq, state[2].index(before), num, use_acc=False, is_async=True)
            if c.causal:
                A = seen(warpgroup_mma_wait(1, (A,)), keys[3], at, c).to(gl.bfloat16)
                if c.decay:
                    num = enter_rows(warpgroup_mma_wait(0, (num,)), keys[3], at, product(c.BV), c)
                num = warpgroup_mma(gl.convert_layout(A, left(c.BV)), next_full(v_s, i), num, is_async=True)
            if c.is_global:
                m = state[3].index(before).load(gl.SliceLayout(0, product(c.SB)))
                total = enter_rows(Fq.load(product(c.SB)).to(gl.float32) * m[None, :], keys[3], at, product(c.SB), c)
                total = gl.convert_layout(gl.sum(total, 1) + gl.sum(A.to(gl.float32), 1), of_tokens)
                store_scalars(den, total, b, t, h * c.G + g, end - t, of_tokens, c)
            num = warpgroup_mma_wait(0, (num,))
            set_empty(queries, j)
            if c.causal and g == c.G - 1:
                set_empty(state, i)
                set_empty(keys, i)
                set_empty(v_s, i)
            if c.is_global:
                num *= inverse_den(total)[:, None]
            send(out_rows[g], t, staging, num)
    tma.store_wait(0)
