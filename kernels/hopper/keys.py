"""The backward pass over the keys (``walk_backward.walk_keys``) as a pipeline of warp groups; see the package.

Chunks in reverse, with the state behind each:

    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import inverse_den, locate
from race_dist.kernels.hopper.features import (
    add_corners, buckets, hash_gradient, load_keep, log_operands, no_corners, one_part, put_operand, put_planes, take_signs,
    unproject,
)
from race_dist.kernels.hopper.layouts import by_rows, left, product, tile
from race_dist.kernels.hopper.rings import (
    await_empty, await_full, fetch, load_scalars, make_ring, next_full, numbers, open_heads, open_rows, operands, send,
    set_empty, set_full, store_scalars, vectors,
)
from race_dist.kernels.hopper.states import crossing, load_state, open_room, publish, put_block, put_pair, take_block
from race_dist.kernels.hopper.weights import (
    ENTER, LINE, await_weights, free_weights, leave_rows, make_weights, pass_through, put_weights, reverse_sums, seen_by,
    transposed,
)


@gluon.jit
def pipe_keys(q, k, v, dout, den, h_in, row_in, dk, dv, dlog_decay, planes, beta, log_decay, key_mask, states,
              final_values, final_mass, suffixes, dbeta, rooms, tiles, T, TILE, H, c: gl.constexpr):
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
    keys = make_ring(deep, 2) + (operands(deep, c.C, c.SB),)  # phi(k)
    tanhs = make_ring(deep, 1) + (numbers(deep, c.C, c.LPB),)  # of the projected keys
    q_s, do_s, queries, pairs = k_s, v_s, keys, keys  # unused, where not causal
    if c.causal:
        q_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
        do_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
        queries = make_ring(2, 2) + (operands(2, c.C, c.SB),)  # w
        if c.is_global:
            pairs = make_ring(2, 1) + (operands(2, 16, c.C),)  # h
    state = make_ring(1, 2) + (operands(1, c.SB, c.BV), operands(1, c.SB, c.BV), vectors(1, c.SB))  # C in two parts, c
    weights = make_weights(c)
    flow = 0.0
    if c.decay:
        flow = crossing(states, final_values, final_mass, suffixes, number, index, row, last, h, H, c)
    gl.warp_specialize([
        (_rows, (dk_rows, v_s, do_s, keys, tanhs, queries, state, weights, place, planes_s, beta, h_in, row_in, dlog_decay,
                 flow, dbeta + index, c)),
        (_features, (k_s, q_s, keys, tanhs, queries, pairs, weights, place, planes_s, beta, den, h_in, log_decay, key_mask, c)),
        (_state, (dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index if c.causal else row * H + h,
                  open_room(rooms, index, c), c)),
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
def _features(k_s, q_s, keys, tanhs, queries, pairs, weights, place, planes_s, beta, den, h_in, log_decay, key_mask,
              c: gl.constexpr):
    b, h, start, end, chunks = place
    sharp = gl.load(beta + h).to(gl.float32)
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        keep = load_keep(key_mask, b, t, end - t, c)
        u = take_signs(k_s, i, planes_s, c)
        tanhs[2].index(await_empty(tanhs, i)).store(u)
        set_full(tanhs, i)
        k_logs = log_operands(u, sharp, c)
        if c.decay:
            put_weights(weights, i, log_decay, b, t, h, end - t, 0.0, c)
        if c.NSB == 1:
            put_operand(keys, i, gl.where(keep[:, None], buckets(k_logs, 0, planes_s, c), 0.0))
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            if c.is_global:
                hq = h * c.G + g
                r = inverse_den(load_scalars(den, b, t, hq, end - t, gl.SliceLayout(1, product(c.SB)), c))
                h_c = load_scalars(h_in, b, t, hq, end - t, gl.SliceLayout(0, by_rows(c.C)), c)
                put_pair(pairs[2].index(await_empty(pairs, j)), h_c, c)
                set_full(pairs, j)
            q_logs = log_operands(take_signs(q_s, j, planes_s, c), sharp, c)
            for n in range(c.NSB):
                if c.NSB > 1:
                    put_operand(keys, i * c.NSB + n, gl.where(keep[:, None], buckets(k_logs, n, planes_s, c), 0.0))
                w = buckets(q_logs, n, planes_s, c)
                if c.is_global:
                    w *= r[:, None]
                put_operand(queries, j * c.NSB + n, w)


@gluon.jit
def _state(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, room, c: gl.constexpr):
    """The suffix state, and dv, which takes it whole."""
    _, _, start, _, chunks = place
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], tile(c.C, c.BV))
    Cs, cs = load_state(suffixes, index, 0, c)
    if c.NSB > 1:
        for n in range(c.NSB):
            Cs, cs = load_state(suffixes, index, n, c)
            put_block(room, n, Cs, cs, c)
    if not c.causal:
        publish(Cs, cs, 0, state, c)
    for i in range(chunks):
        at = await_weights(weights, i, c)
        dv = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
        if c.NSB == 1:
            if c.causal:
                publish(Cs, cs, i, state, c)
            Fk = next_full(keys, i)
            dv = warpgroup_mma_wait(0, (warpgroup_mma(Fk, state[2].index(0), dv, use_acc=False, is_async=True),))
            dv = leave_rows(dv, weights, at, product(c.BV), c)
            if c.causal:
                set_empty(state, i)
            Cs, cs = pass_through(Cs, cs, weights, at, c)
            for g in gl.static_range(c.G if c.causal else 0):
                j = i * c.G + g
                P = gl.zeros([c.C, c.C], gl.float32, product(c.C))
                w = next_full(queries, j)
                P = warpgroup_mma_wait(0, (warpgroup_mma(Fk, w.permute((1, 0)), P, use_acc=False, is_async=True),))
                P = one_part(seen_by(P, weights, at, c), left(c.BV))
                do = next_full(do_s, j)
                dv = warpgroup_mma(P, do, dv, is_async=True)
                Cs, cs = _add_queries(Cs, cs, w, do, pairs, j, weights, at, c)
                dv = warpgroup_mma_wait(0, (dv,))
                set_empty(queries, j)
                set_empty(do_s, j)
                free_pair(pairs, j, c)
            set_empty(keys, i)
        else:
            P = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            do = next_full(do_s, i)
            for n in range(c.NSB):
                turn = i * c.NSB + n
                Cs, cs = take_block(room, n, c)
                publish(Cs, cs, turn, state, c)
                Fk = next_full(keys, turn)
                w = next_full(queries, turn)
                dv = warpgroup_mma(Fk, state[2].index(0), dv, is_async=True)
                P = warpgroup_mma(Fk, w.permute((1, 0)), P, is_async=True)
                Cs, cs = pass_through(Cs, cs, weights, at, c)
                Cs, cs = _add_queries(Cs, cs, w, do, pairs, i, weights, at, c)
                dv, P = warpgroup_mma_wait(0, (dv, P))
                put_block(room, n, Cs, cs, c)
                set_empty(state, turn)
                set_empty(keys, turn)
                set_empty(queries, turn)
            free_pair(pairs, i, c)
            dv = leave_rows(dv, weights, at, product(c.BV), c)
            P = one_part(seen_by(P, weights, at, c), left(c.BV))
            dv = warpgroup_mma_wait(0, (warpgroup_mma(P, do, dv, is_async=True),))
            set_empty(do_s, i)
        free_weights(weights, i, c)
        send(dv_rows, start + (chunks - 1 - i) * c.C, staging, dv)
    tma.store_wait(0)


@gluon.jit
def _add_queries(Cs, cs, w, do, pairs, j, weights, at, c: gl.constexpr):
    """The state with a chunk's queries in it."""
    w = transposed(w, weights, ENTER, at, c)
    Cs = warpgroup_mma(w, do, Cs, is_async=True)
    if c.is_global:
        cs = warpgroup_mma(w, next_full(pairs, j).permute((1, 0)), cs, is_async=True)
    Cs, cs = warpgroup_mma_wait(0, (Cs, cs))
    return Cs, cs


@gluon.jit
def free_pair(pairs, j, c: gl.constexpr):
    """Give turn j's h back."""
    if c.is_global:
        set_empty(pairs, j)


@gluon.jit
def _seen_gradient(v_c, do, h_in, b, t, hq, n, weights, at, c: gl.constexpr):
    """``<do_i, v_j> + h_i`` where i sees j, ``[j, i]``, as a left operand."""
    A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
    A = warpgroup_mma(v_c, do.permute((1, 0)), A, use_acc=False, is_async=True)
    if c.is_global:
        h_c = load_scalars(h_in, b, t, hq, n, gl.SliceLayout(0, product(c.C)), c)
    A = warpgroup_mma_wait(0, (A,))
    if c.is_global:
        A += h_c[None, :]
    return one_part(seen_by(A, weights, at, c), left(c.SB))


@gluon.jit
def _behind(v_c, turn, state, weights, at, c: gl.constexpr):
    """``dphi [C, SB]`` from the state behind the chunk, one block."""
    features: gl.constexpr = product(c.SB)
    await_full(state, turn)
    dphi = gl.zeros([c.C, c.SB], gl.float32, features)
    dphi = warpgroup_mma(v_c, state[2].index(0).permute((1, 0)), dphi, use_acc=False, is_async=True)
    dphi = warpgroup_mma(v_c, state[3].index(0).permute((1, 0)), dphi, is_async=True)
    dphi = warpgroup_mma_wait(0, (dphi,))
    if c.is_global:
        dphi += state[4].index(0).load(gl.SliceLayout(0, features))[None, :]
    if c.causal:
        set_empty(state, turn)
    return leave_rows(dphi, weights, at, features, c)


@gluon.jit
def _rows(dk_rows, v_s, do_s, keys, tanhs, queries, state, weights, place, planes_s, beta, h_in, row_in, dlog_decay, flow,
          dbeta, c: gl.constexpr):
    b, h, start, end, chunks = place
    sharp = gl.load(beta + h).to(gl.float32)
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], tile(c.C, c.BD))
    features: gl.constexpr = product(c.SB)
    db = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.LPB)))
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        at = await_weights(weights, i, c)
        v_c = next_full(v_s, i)
        if c.NSB == 1:
            dphi = _behind(v_c, i if c.causal else 0, state, weights, at, c)
            for g in gl.static_range(c.G if c.causal else 0):
                j = i * c.G + g
                A = _seen_gradient(v_c, next_full(do_s, j), h_in, b, t, h * c.G + g, end - t, weights, at, c)
                set_empty(do_s, j)
                dphi = warpgroup_mma_wait(0, (warpgroup_mma(A, next_full(queries, j), dphi, is_async=True),))
                set_empty(queries, j)
            set_empty(v_s, i)
            phi = next_full(keys, i).load(features).to(gl.float32)
            set_empty(keys, i)
            y = phi * dphi
            total = gl.sum(y, 1)
            y -= phi * (total / c.L)[:, None]
            corners = add_corners(no_corners(c), y, 0, planes_s, c)
        else:
            A = _seen_gradient(v_c, next_full(do_s, i), h_in, b, t, h, end - t, weights, at, c)
            set_empty(do_s, i)
            total = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, features))
            corners = no_corners(c)
            for n in range(c.NSB):
                turn = i * c.NSB + n
                dphi = _behind(v_c, turn, state, weights, at, c)
                dphi = warpgroup_mma_wait(0, (warpgroup_mma(A, next_full(queries, turn), dphi, is_async=True),))
                set_empty(queries, turn)
                y = next_full(keys, turn).load(features).to(gl.float32) * dphi
                set_empty(keys, turn)
                total += gl.sum(y, 1)
                corners = add_corners(corners, y, n, planes_s, c)
            set_empty(v_s, i)
        free_weights(weights, i, c)
        if c.decay:
            dG = -gl.convert_layout(total, LINE)
            if not c.is_global:
                dG += load_scalars(row_in, b, t, h, end - t, LINE, c)
            store_scalars(dlog_decay, reverse_sums(dG) + flow, b, t, h, end - t, LINE, c)
            flow += gl.sum(dG, 0)
        u = next_full(tanhs, i).load(product(c.LPB))
        set_empty(tanhs, i)
        dz, part = hash_gradient(corners, u, sharp)
        db += part
        send(dk_rows, t, staging, unproject(dz, planes_s[0], c))
    tma.store_wait(0)  # before the sum takes the room of what is being sent
    gl.store(dbeta, gl.sum(db, 0))
