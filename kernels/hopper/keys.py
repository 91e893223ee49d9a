"""The backward pass over the keys (``walk_backward.walk_keys``) as a pipeline of warp groups; see ``parts.py``.

Chunks in reverse, with the state behind each:

    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import inverse_den, locate
from race_dist.kernels.hopper.parts import (
    LINE, await_empty, await_full, by_rows, crossing, fetch, hash_gradient, leave_rows, left, load_keep, load_scalars,
    load_state, make_ring, make_weights, next_full, numbers, one_part, open_heads, open_rows, operands, pass_through,
    product, project, put_mass, put_pair, put_parts, put_planes, put_weights, reverse_sums, seen_by, send, set_empty,
    set_full, signs, soft_hash, store_scalars, tile, transposed, unproject, vectors,
)


@gluon.jit
def pipe_keys(q, k, v, dout, den, h_in, row_in, dk, dv, dlog_decay, planes, beta, log_decay, key_mask, states,
              final_values, final_mass, suffixes, dbeta, tiles, T, TILE, H, c: gl.constexpr):
    """Program (tile, head): writes dk, dv and dlog_decay ``[B, T, H]``."""
    h = (gl.program_id(0) % H).to(gl.int64)
    number = gl.program_id(0) // H
    b, row, start, end, last = locate(tiles, number, T, TILE, c)
    index = number.to(gl.int64) * H + h
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32))
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, do_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(dout, b, h, end, c.Dv, c.BV, c)
    dk_rows, dv_rows = open_rows(dk, b, h, end, c.D, c.BD, c), open_rows(dv, b, h, end, c.Dv, c.BV, c)
    deep: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the room
    k_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    v_s = make_ring(2, 1) + (operands(2, c.C, c.BV),)
    q_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    do_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
    keys = make_ring(deep, 2) + (operands(deep, c.C, c.SB), make_weights(deep, c), numbers(deep, c.C, c.LPB))  # phi(k), -, u
    queries = make_ring(2, 2) + (operands(2, c.C, c.SB), operands(2, 16, c.C))  # w, h
    state = make_ring(1, 2) + (operands(1, c.SB, c.BV), operands(1, c.SB, c.BV), vectors(1, c.SB))  # C in two parts, c
    flow = 0.0
    if c.decay:
        flow = crossing(states, final_values, final_mass, suffixes, number, index, row, last, h, H, c)
    gl.warp_specialize([
        (_rows, (dk_rows, v_s, do_s, keys, queries, state, place, planes_s, beta, h_in, row_in, dlog_decay, flow, dbeta + index,
                 c)),
        (_features, (k_s, q_s, keys, queries, place, planes_s, beta, den, h_in, log_decay, key_mask, c)),
        (_state, (dv_rows, do_s, keys, queries, state, place, suffixes, index if c.causal else row * H + h, c)),
        (_loader, (k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c)),
    ], [4, 4, 1], [128, 192, 24])


@gluon.jit
def _loader(k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c: gl.constexpr):
    _, _, start, _, chunks = place
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        fetch(k_rows, t, k_s, i, c.BD, c)
        fetch(v_rows, t, v_s, i, c.BV, c)
        for g in gl.static_range(c.G if c.causal else 0):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)
            fetch(do_rows[g], t, do_s, i * c.G + g, c.BV, c)


@gluon.jit
def _features(k_s, q_s, keys, queries, place, planes_s, beta, den, h_in, log_decay, key_mask, c: gl.constexpr):
    b, h, start, end, chunks = place
    W, ones, zeros = planes_s
    sharp = gl.load(beta + h).to(gl.float32)
    of_tokens: gl.constexpr = gl.SliceLayout(1, product(c.SB))
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        z = project(next_full(k_s, i), W, c)
        keep = load_keep(key_mask, b, t, end - t, c)
        u = signs(warpgroup_mma_wait(0, (z,)))
        set_empty(k_s, i)
        phi = gl.where(keep[:, None], soft_hash(u, sharp, ones, zeros, c), 0.0)
        at = await_empty(keys, i)
        keys[2].index(at).store(phi.to(gl.bfloat16))
        keys[4].index(at).store(u)
        if c.decay:
            put_weights(keys[3], at, log_decay, b, t, h, end - t, 0.0, c)
        set_full(keys, i)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            hq = h * c.G + g
            z = project(next_full(q_s, j), W, c)
            if c.is_global:
                r = inverse_den(load_scalars(den, b, t, hq, end - t, of_tokens, c))
                h_c = load_scalars(h_in, b, t, hq, end - t, gl.SliceLayout(0, by_rows(c.C)), c)
            u = signs(warpgroup_mma_wait(0, (z,)))
            set_empty(q_s, j)
            w = soft_hash(u, sharp, ones, zeros, c)
            at = await_empty(queries, j)
            if c.is_global:
                w *= r[:, None]
                put_pair(queries[3].index(at), h_c, c)
            queries[2].index(at).store(w.to(gl.bfloat16))
            set_full(queries, j)


@gluon.jit
def _state(dv_rows, do_s, keys, queries, state, place, suffixes, index, c: gl.constexpr):
    """The suffix state, and dv, which takes it whole."""
    _, _, start, _, chunks = place
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], tile(c.C, c.BV))
    Cs, cs = load_state(suffixes, index, c)
    if not c.causal:
        _publish(Cs, cs, 0, state, c)
    for i in range(chunks):
        if c.causal:
            _publish(Cs, cs, i, state, c)
        at = await_full(keys, i)
        Fk = keys[2].index(at)
        dv = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
        dv = warpgroup_mma(Fk, state[2].index(0), dv, use_acc=False, is_async=True)
        Cs, cs = pass_through(Cs, cs, keys[3], at, c)
        if c.decay or not c.causal:
            dv = leave_rows(warpgroup_mma_wait(0, (dv,)), keys[3], at, product(c.BV), c)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            turn = await_full(queries, j)
            w = queries[2].index(turn)
            do = next_full(do_s, j)
            P = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            P = warpgroup_mma(Fk, w.permute((1, 0)), P, use_acc=False, is_async=True)
            P = one_part(seen_by(warpgroup_mma_wait(0, (P,)), keys[3], at, c), left(c.BV))
            dv = warpgroup_mma(P, do, dv, is_async=True)
            w = transposed(w, keys[3][5].index(at), c.BV, c)
            Cs = warpgroup_mma(w, do, Cs, is_async=True)
            if c.is_global:
                cs = warpgroup_mma(w, queries[3].index(turn).permute((1, 0)), cs, is_async=True)
                cs = warpgroup_mma_wait(0, (cs,))
            Cs = warpgroup_mma_wait(0, (Cs,))
            dv = warpgroup_mma_wait(0, (dv,))
            set_empty(queries, j)
            set_empty(do_s, j)
        set_empty(keys, i)
        if c.causal:
            set_empty(state, i)
        send(dv_rows, start + (chunks - 1 - i) * c.C, staging, dv)
    tma.store_wait(0)


@gluon.jit
def _publish(Cs, cs, i, state, c: gl.constexpr):
    await_empty(state, i)
    put_parts(state[2].index(0), state[3].index(0), Cs)
    if c.is_global:
        put_mass(state[4].index(0), cs, c)
    set_full(state, i)


@gluon.jit
def _rows(dk_rows, v_s, do_s, keys, queries, state, place, planes_s, beta, h_in, row_in, dlog_decay, flow, dbeta,
          c: gl.constexpr):
    b, h, start, end, chunks = place
    W, ones, zeros = planes_s
    sharp = gl.load(beta + h).to(gl.float32)
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], tile(c.C, c.BD))
    features: gl.constexpr = product(c.SB)
    db = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.LPB)))
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        await_full(state, i if c.causal else 0)
        v_c = next_full(v_s, i)
        dphi = gl.zeros([c.C, c.SB], gl.float32, features)
        dphi = warpgroup_mma(v_c, state[2].index(0).permute((1, 0)), dphi, use_acc=False, is_async=True)
        dphi = warpgroup_mma(v_c, state[3].index(0).permute((1, 0)), dphi, is_async=True)
        at = await_full(keys, i)
        dphi = warpgroup_mma_wait(0, (dphi,))
        if c.is_global:
            dphi += state[4].index(0).load(gl.SliceLayout(0, features))[None, :]
        dphi = leave_rows(dphi, keys[3], at, features, c)
        if c.causal:
            set_empty(state, i)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            do = next_full(do_s, j)
            A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            A = warpgroup_mma(v_c, do.permute((1, 0)), A, use_acc=False, is_async=True)
            if c.is_global:
                h_c = load_scalars(h_in, b, t, h * c.G + g, end - t, gl.SliceLayout(0, product(c.C)), c)
            A = warpgroup_mma_wait(0, (A,))
            set_empty(do_s, j)
            if c.is_global:
                A += h_c[None, :]
            A = one_part(seen_by(A, keys[3], at, c), left(c.SB))
            dphi = warpgroup_mma(A, queries[2].index(await_full(queries, j)), dphi, is_async=True)
            dphi = warpgroup_mma_wait(0, (dphi,))
            set_empty(queries, j)
        set_empty(v_s, i)
        phi = keys[2].index(at).load(features).to(gl.float32)
        y = phi * dphi
        total = gl.sum(y, 1)
        y -= phi * (total / c.L)[:, None]
        u = keys[4].index(at).load(product(c.LPB))
        set_empty(keys, i)
        if c.decay:
            dG = -gl.convert_layout(total, LINE)
            if not c.is_global:
                dG += load_scalars(row_in, b, t, h, end - t, LINE, c)
            store_scalars(dlog_decay, reverse_sums(dG) + flow, b, t, h, end - t, LINE, c)
            flow += gl.sum(dG, 0)
        dz, part = hash_gradient(y, u, sharp, ones, zeros, c)
        db += part
        send(dk_rows, t, staging, unproject(dz, W, c))
    tma.store_wait(0)  # before the sum takes the room of what is being sent
    gl.store(dbeta, gl.sum(db, 0))
