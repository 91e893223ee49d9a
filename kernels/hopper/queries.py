"""The backward pass over the queries (``walk_backward.walk_queries``) as a pipeline of warp groups; see ``parts.py``.

With w = phi(q) / den ("global") or phi(q), rounded once, and the state before each chunk:

    e_i = M(i) do_i      h_i = -<w_i, e_i> / <w_i, m(i)>  ("global")      w dphi(q)_i = w_i (e_i + h_i m(i))

h is made of the very numbers that it is taken from, and e keeps two parts of every product, so what values have in common
cancels. The tile's sums of the
suffix state, ``C = sum w_i do_i^T`` and ``c = sum w_i h_i``, come out of the same pass.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import inverse_den, locate
from race_dist.kernels.hopper.parts import (
    await_empty, await_full, enter_rows, fetch, hash_gradient, left, load_keep, load_scalars, load_state, make_ring,
    make_weights, next_full, numbers, one_part, open_heads, open_rows, operands, pass_through, product, project, put_mass,
    put_ones, put_pair, put_parts, put_planes, put_weights, seen, send, set_empty, set_full, signs, soft_hash, store_mass,
    store_scalars, store_values, tile, transposed, two_parts, unproject, vectors,
)


@gluon.jit
def pipe_queries(q, k, v, dout, den, dq, h_out, row_out, planes, beta, log_decay, key_mask, states, sums, decays, dbeta,
                 tiles, T, TILE, H, c: gl.constexpr):
    """Program (tile, head): writes dq, ``h [B, T, Hq]`` ("global"), the queries' part of dG ``[B, T, H]`` (decay, "none"),
    its part of ``sums [tile, H, S (Dv + 1)]`` of the suffix state, and the tile's log decay ``decays [tile, H]``."""
    h = (gl.program_id(0) % H).to(gl.int64)
    number = gl.program_id(0) // H
    b, row, start, end, _ = locate(tiles, number, T, TILE, c)
    index = number.to(gl.int64) * H + h
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32), index)
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, do_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(dout, b, h, end, c.Dv, c.BV, c)
    dq_rows = open_heads(dq, b, h, end, c.D, c.BD, c)
    deep: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the room
    k_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    v_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
    q_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    do_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
    keys = make_ring(2, 2) + (operands(2, c.C, c.SB), make_weights(2, c))  # phi(k)
    queries = make_ring(deep, 2) + (operands(deep, c.C, c.SB), numbers(deep, c.C, c.LPB))  # w, tanh(planes q)
    state = make_ring(1, 1) + (operands(1, c.SB, c.BV), operands(1, c.SB, c.BV), vectors(1, c.SB))  # M in two parts, m
    gl.warp_specialize([
        (_rows, (dq_rows, v_s, do_s, keys, queries, state, place, planes_s, beta, h_out, row_out, sums, dbeta, c)),
        (_features, (k_s, q_s, keys, queries, place, planes_s, beta, den, log_decay, key_mask, decays, c)),
        (_state, (v_s, do_s, keys, queries, state, place, put_ones(c), states, index if c.causal else row * H + h, sums, c)),
        (_loader, (k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c)),
    ], [4, 4, 1], [120, 192, 24])


@gluon.jit
def _loader(k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c: gl.constexpr):
    start = place[2]
    for i in range(place[4]):
        t = start + i * c.C
        if c.causal:
            fetch(k_rows, t, k_s, i, c.BD, c)
            fetch(v_rows, t, v_s, i, c.BV, c)
        for g in gl.static_range(c.G):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)
            fetch(do_rows[g], t, do_s, i * c.G + g, c.BV, c)


@gluon.jit
def _features(k_s, q_s, keys, queries, place, planes_s, beta, den, log_decay, key_mask, decays, c: gl.constexpr):
    b, h, start, end, chunks, index = place
    W, ones, zeros = planes_s
    sharp = gl.load(beta + h).to(gl.float32)
    reach = (start * 0).to(gl.float64)
    of_tokens: gl.constexpr = gl.SliceLayout(1, product(c.SB))
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
                reach = put_weights(keys[3], at, log_decay, b, t, h, end - t, reach, c)
            set_full(keys, i)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            z = project(next_full(q_s, j), W, c)
            if c.is_global:
                r = inverse_den(load_scalars(den, b, t, h * c.G + g, end - t, of_tokens, c))
            u = signs(warpgroup_mma_wait(0, (z,)))
            set_empty(q_s, j)
            w = soft_hash(u, sharp, ones, zeros, c)
            if c.is_global:
                w *= r[:, None]
            at = await_empty(queries, j)
            queries[2].index(at).store(w.to(gl.bfloat16))
            queries[3].index(at).store(u)
            set_full(queries, j)
    if c.decay:
        gl.store(decays + index, reach)


@gluon.jit
def _state(v_s, do_s, keys, queries, state, place, ones, states, number, sums, c: gl.constexpr):
    chunks, index = place[4], place[5]
    M, m = load_state(states, number, c)
    C_sum = gl.zeros([c.SB, c.BV], gl.float32, product(c.BV))
    if not c.causal:
        _publish(M, m, 0, state, c)
    for i in range(chunks):
        at = 0
        if c.causal:
            _publish(M, m, i, state, c)
            at = await_full(keys, i)
            Fk = transposed(keys[2].index(at), keys[3][2].index(at), c.BV, c)
            M, m = pass_through(M, m, keys[3], at, c)
            M = warpgroup_mma(Fk, next_full(v_s, i), M, is_async=True)
            if c.is_global:
                m = warpgroup_mma_wait(0, (warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True),))
            M = warpgroup_mma_wait(0, (M,))
            set_empty(v_s, i)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            w = transposed(queries[2].index(await_full(queries, j)), keys[3][4].index(at), c.BV, c)
            C_sum = warpgroup_mma(w, next_full(do_s, j), C_sum, is_async=True)
            C_sum = warpgroup_mma_wait(0, (C_sum,))
            set_empty(queries, j)
            set_empty(do_s, j)
        if c.causal:
            set_empty(keys, i)
    store_values(sums, index, C_sum, c)


@gluon.jit
def _publish(M, m, i, state, c: gl.constexpr):
    await_empty(state, i)
    put_parts(state[2].index(0), state[3].index(0), M)
    if c.is_global:
        put_mass(state[4].index(0), m, c)
    set_full(state, i)


@gluon.jit
def _all_seen(weights, at, c: gl.constexpr):
    """How much of each key a query sees, as a left operand."""
    return one_part(seen(gl.full([c.C, c.C], 1.0, gl.float32, product(c.C)), weights, at, c), left(c.SB))


@gluon.jit
def _rows(dq_rows, v_s, do_s, keys, queries, state, place, planes_s, beta, h_out, row_out, sums, dbeta, c: gl.constexpr):
    b, h, start, end, chunks, index = place
    W, ones, zeros = planes_s
    sharp = gl.load(beta + h).to(gl.float32)
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], tile(c.C, c.BD))
    pair = gl.allocate_shared_memory(gl.bfloat16, [16, c.C], tile(16, c.C))
    features: gl.constexpr = product(c.SB)
    of_tokens: gl.constexpr = gl.SliceLayout(1, features)
    none = gl.zeros([c.C, c.SB], gl.float32, features)
    db = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.LPB)))
    c_sum = gl.zeros([c.SB, 16], gl.float32, product(16))
    for i in range(chunks):
        t = start + i * c.C
        await_full(state, i if c.causal else 0)
        at = await_full(keys, i) if c.causal else 0
        Fk = keys[2].index(at)
        row = gl.zeros([c.C], gl.float32, of_tokens)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            do = next_full(do_s, j)
            A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            if c.causal:
                A = warpgroup_mma(do, next_full(v_s, i).permute((1, 0)), A, use_acc=False, is_async=True)
            e = warpgroup_mma(do, state[2].index(0).permute((1, 0)), none, use_acc=False, is_async=True)
            e = warpgroup_mma(do, state[3].index(0).permute((1, 0)), e, is_async=True)
            if c.causal:
                A, A_rest = two_parts(seen(warpgroup_mma_wait(2, (A,)), keys[3], at, c), left(c.SB))
            e = enter_rows(warpgroup_mma_wait(0, (e,)), keys[3], at, features, c)
            set_empty(do_s, j)
            if c.causal:
                e = warpgroup_mma(A, Fk, e, is_async=True)
                e = warpgroup_mma(A_rest, Fk, e, is_async=True)
            if c.is_global:
                m = none + state[4].index(0).load(gl.SliceLayout(0, features))[None, :]
                m = enter_rows(m, keys[3], at, features, c)
                if c.causal:
                    m = warpgroup_mma_wait(0, (warpgroup_mma(_all_seen(keys[3], at, c), Fk, m, is_async=True),))
            e = warpgroup_mma_wait(0, (e,))
            if c.causal and g == c.G - 1:
                set_empty(state, i)
                set_empty(v_s, i)
            turn = await_full(queries, j)
            w = queries[2].index(turn).load(features).to(gl.float32)
            u = queries[3].index(turn).load(product(c.LPB))
            y = w * e
            if c.is_global:
                total = gl.sum(w * m, 1)
                h_c = -gl.sum(y, 1) / gl.where(total == 0.0, 1.0, total)
                store_scalars(h_out, h_c, b, t, h * c.G + g, end - t, of_tokens, c)
                y += w * (h_c[:, None] * m)
                if c.decay:
                    h_c *= keys[3][4].index(at).load(of_tokens)
                put_pair(pair, h_c, c)
                fence_async_shared()
                c_sum = warpgroup_mma(queries[2].index(turn).permute((1, 0)), pair.permute((1, 0)), c_sum, is_async=True)
                c_sum = warpgroup_mma_wait(0, (c_sum,))
            else:
                total = gl.sum(y, 1)
                y -= w * (total / c.L)[:, None]
                row += total
            set_empty(queries, j)
            dz, part = hash_gradient(y, u, sharp, ones, zeros, c)
            db += part
            send(dq_rows[g], t, staging, unproject(dz, W, c))
        if c.causal:
            set_empty(keys, i)
        if c.decay and not c.is_global:
            store_scalars(row_out, row, b, t, h, end - t, of_tokens, c)
    tma.store_wait(0)  # before the sum takes the room of what is being sent
    gl.store(dbeta + index, gl.sum(db, 0))
    store_mass(sums, index, c_sum, c)
