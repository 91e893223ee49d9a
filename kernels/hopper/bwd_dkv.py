"""The backward pass over the keys (``race_recurrent_bwd_dkv_kernel``) as a pipeline of warp groups; see the package.

Chunks in reverse, with the state behind each:

    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import locate
from race_dist.kernels.hopper.soft_hash import (
    add_block,
    add_corners,
    add_table,
    hash_gradient,
    load_inverse_den,
    load_keep,
    no_corners,
    no_table,
    one_part,
    put_features,
    put_planes,
    take_signs,
    unproject,
)
from race_dist.kernels.hopper.layouts import by_rows, left, product, tile
from race_dist.kernels.hopper.pipeline import (
    await_empty,
    await_full,
    each_time,
    fetch,
    load_scalars,
    make_ring,
    next_full,
    numbers,
    open_heads,
    open_rows,
    operands,
    send,
    set_empty,
    set_full,
    store_scalars,
    store_share,
    vectors,
)
from race_dist.kernels.hopper.state import crossing, load_blocks, load_state, publish, put_pair
from race_dist.kernels.hopper.decay import (
    ENTER,
    LINE,
    await_weights,
    free_weights,
    leave_rows,
    make_weights,
    pass_block,
    pass_through,
    put_weights,
    reverse_sums,
    seen_by,
    transposed,
)


@gluon.jit
def race_hopper_bwd_dkv_kernel(
    q,
    k,
    v,
    dout,
    den,
    h_in,
    row_in,
    dk,
    dv,
    dlog_decay,
    planes,
    beta,
    log_decay,
    key_mask,
    states,
    final_values,
    final_mass,
    suffixes,
    dbeta,
    tiles,
    T,
    TILE,
    H,
    c: gl.constexpr,
):
    """Program (tile, head, block of value columns): writes dk, dv and dlog_decay ``[B, T, H]``; of several blocks of features,
    shares of dk and dlog_decay, whose heads are ``NVB`` times as many, block by block, as those of h and row_in."""
    part = gl.program_id(0) % c.NVB
    h = (gl.program_id(0) // c.NVB % H).to(gl.int64)
    number = gl.program_id(0) // (c.NVB * H)
    b, row, start, end, last = locate(tiles, number, T, TILE, c)
    index = number.to(gl.int64) * H + h
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32), part, H)
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, do_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(dout, b, h, end, c.Dv, c.BV, c)
    if not c.PARTIAL_GRADIENTS:
        dk_rows = open_rows(dk, b, h, end, c.D, c.BD, c)
    else:
        dk_rows = dk
    dv_rows = open_rows(dv, b, h, end, c.Dv, c.BV, c)
    deep: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the room
    k_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    v_s = make_ring(2, 1) + (operands(2, c.C, c.BV),)
    turns: gl.constexpr = deep if c.NSB == 1 else 4
    keys = make_ring(turns, 2) + (operands(turns, c.C, c.SB),)  # phi(k)
    tanhs = make_ring(deep, 1) + (numbers(deep, c.C, c.LPB),)  # of the projected keys
    q_s, do_s, queries, pairs = k_s, v_s, keys, keys  # unused, where not causal
    if c.causal:
        q_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
        do_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
        w_turns: gl.constexpr = 2 if c.NSB == 1 else 4
        queries = make_ring(w_turns, 2) + (operands(w_turns, c.C, c.SB),)  # w
        if c.is_global:
            pairs = make_ring(2, 1) + (operands(2, 16, c.C),)  # h
    ahead: gl.constexpr = 1 if c.NSB == 1 else 2  # published states: C in two parts, c
    state = make_ring(ahead, 2) + (operands(ahead, c.SB, c.BV), operands(ahead, c.SB, c.BV), vectors(ahead, c.SB))
    weights = make_weights(c)
    flow = 0.0
    if c.decay:
        flow = crossing(states, final_values, final_mass, suffixes, number, index, row, last, h, H, part, c)
    # of threads of the hash and of the state
    registers: gl.constexpr = (104, 208) if c.NSB == 1 else (104, 248)
    gl.warp_specialize(
        [
            (
                _rows,
                (
                    dk_rows,
                    v_s,
                    do_s,
                    keys,
                    tanhs,
                    queries,
                    state,
                    weights,
                    place,
                    planes_s,
                    beta,
                    h_in,
                    row_in,
                    dlog_decay,
                    flow,
                    dbeta + index * c.NVB + part,
                    c,
                ),
            ),
            (
                _features,
                (k_s, q_s, keys, tanhs, queries, pairs, weights, place, planes_s, beta, den, h_in, log_decay, key_mask, c),
            ),
            (
                _state,
                (dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index if c.causal else row * H + h, c),
            ),
            (_loader, (k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c)),
        ],
        [4, 4, 1],
        [registers[0], registers[1], 24],
    )


@gluon.jit
def _loader(k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c: gl.constexpr):
    _, _, start, _, chunks, part, _ = place
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        fetch(k_rows, t, k_s, i, c.BD, c)
        fetch(v_rows, t, v_s, i, c.BV, c, part * c.BV)
        for g in gl.static_range(c.G if c.causal else 0):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)
            fetch(do_rows[g], t, do_s, i * c.G + g, c.BV, c, part * c.BV)


@gluon.jit
def _features(
    k_s, q_s, keys, tanhs, queries, pairs, weights, place, planes_s, beta, den, h_in, log_decay, key_mask, c: gl.constexpr
):
    b, h, start, end, chunks, part, H = place
    sharp = gl.load(beta + h).to(gl.float32)
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        keep = load_keep(key_mask, b, t, end - t, c)
        u = take_signs(k_s, i, planes_s, c)
        tanhs[2].index(await_empty(tanhs, i)).store(u)
        set_full(tanhs, i)
        if c.decay:
            put_weights(weights, i, log_decay, b, t, h, end - t, 0.0, c)
        put_features(keys, i, u, keep, sharp, planes_s, c)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            if c.is_global:
                hq = h * c.G + g
                h_c = load_scalars(h_in, b, t, hq, end - t, gl.SliceLayout(0, by_rows(c.C)), c)
                for other in gl.static_range(1, c.NVB):
                    h_c += load_scalars(h_in, b, t, other * H + h, end - t, gl.SliceLayout(0, by_rows(c.C)), c)
                if c.NVB > 1:
                    h_c = gl.where(part == 0, h_c, 0.0)  # the first block of columns has the mass
                put_pair(pairs[2].index(await_empty(pairs, j)), h_c, c)
                set_full(pairs, j)
            scale = load_inverse_den(den, b, t, h * c.G + g, end - t, c)
            put_features(queries, j, take_signs(q_s, j, planes_s, c), scale, sharp, planes_s, c)


@gluon.jit
def _state(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, c: gl.constexpr):
    """The suffix state, and dv, which takes it whole."""
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], tile(c.C, c.BV))
    if c.NSB == 1:
        _one_block(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, staging, c)
    else:
        _blocks(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, staging, c)
    tma.store_wait(0)


@gluon.jit
def _one_block(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, staging, c: gl.constexpr):
    _, _, start, _, chunks, _, _ = place
    Cs, cs = load_state(suffixes, index, 0, c)
    if not c.causal:
        publish(Cs, cs, 0, state, 2, c, True)
    for i in range(chunks):
        at = await_weights(weights, i, c)
        if c.causal:
            publish(Cs, cs, i, state, 2, c, True)
        Fk = next_full(keys, i)
        dv = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
        dv = warpgroup_mma_wait(0, (warpgroup_mma(Fk, state[2].index(0), dv, use_acc=False, is_async=True),))
        dv = leave_rows(dv, weights, at, product(c.BV), c)
        if c.causal:
            set_empty(state, i)
        Cs, cs = pass_through(Cs, cs, weights, at, c)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            w = next_full(queries, j)
            P = gl.zeros([c.C, c.C], gl.float32, product(c.C))
            P = warpgroup_mma_wait(0, (warpgroup_mma(Fk, w.permute((1, 0)), P, use_acc=False, is_async=True),))
            P = one_part(seen_by(P, weights, at, c), left(c.BV))
            do = next_full(do_s, j)
            w = transposed(w, weights, ENTER, at, c)
            if c.is_global:
                pair = next_full(pairs, j).permute((1, 0))
            dv = warpgroup_mma(P, do, dv, is_async=True)
            Cs = warpgroup_mma(w, do, Cs, is_async=True)
            if c.is_global:
                cs = warpgroup_mma(w, pair, cs, is_async=True)
            dv, Cs, cs = warpgroup_mma_wait(0, (dv, Cs, cs))
            set_empty(queries, j)
            set_empty(do_s, j)
            free_pair(pairs, j, c)
        set_empty(keys, i)
        free_weights(weights, i, c)
        send(dv_rows, start + (chunks - 1 - i) * c.C, staging, dv)


@gluon.jit
def _blocks(dv_rows, do_s, keys, queries, pairs, state, weights, place, suffixes, index, staging, c: gl.constexpr):
    """Of several blocks of features, all in registers."""
    _, _, start, _, chunks, part, _ = place
    Cs, cs = load_blocks(suffixes, index, part * c.BV, c)
    if c.NVB > 1:
        cs = _where_first(cs, part, c)
    for i in range(chunks):
        at = await_weights(weights, i, c)
        do = next_full(do_s, i)
        dv = gl.zeros([c.C, c.BV], gl.float32, product(c.BV))
        P = gl.zeros([c.C, c.C], gl.float32, product(c.C))
        if c.is_global:
            pair = next_full(pairs, i).permute((1, 0))
        Cs_after, cs_after = (), ()
        for n in gl.static_range(c.NSB):
            turn = each_time(i * c.NSB + n)
            C_n, c_n = Cs[n], cs[n]
            behind = publish(C_n, c_n, turn, state, 2, c, True)
            Fk = next_full(keys, turn)
            w = next_full(queries, turn)
            dv = warpgroup_mma(Fk, state[2].index(behind), dv, is_async=True)
            P = warpgroup_mma(Fk, w.permute((1, 0)), P, is_async=True)
            C_n, c_n = pass_block(C_n, c_n, weights, at, c)
            w = transposed(w, weights, ENTER, at, c)
            C_n = warpgroup_mma(w, do, C_n, is_async=True)
            if c.is_global:
                mass = gl.zeros([c.SB, 16], gl.float32, product(16))
                mass = warpgroup_mma(w, pair, mass, use_acc=False, is_async=True)
                dv, P, C_n, mass = warpgroup_mma_wait(0, (dv, P, C_n, mass))
                c_n += gl.sum(mass, 1)
            else:
                dv, P, C_n = warpgroup_mma_wait(0, (dv, P, C_n))
            set_empty(state, turn)
            set_empty(keys, turn)
            set_empty(queries, turn)
            Cs_after, cs_after = Cs_after + (C_n,), cs_after + (c_n,)
        Cs, cs = Cs_after, cs_after
        free_pair(pairs, i, c)
        dv = leave_rows(dv, weights, at, product(c.BV), c)
        P = one_part(seen_by(P, weights, at, c), left(c.BV))
        dv = warpgroup_mma_wait(0, (warpgroup_mma(P, do, dv, is_async=True),))
        set_empty(do_s, i)
        free_weights(weights, i, c)
        send(dv_rows, start + (chunks - 1 - i) * c.C, staging, dv, part * c.BV)


@gluon.jit
def _where_first(ms, part, c: gl.constexpr):
    """The masses in the first block of columns, 0 in others."""
    first = ()
    for n in gl.static_range(c.NSB):
        first = first + (gl.where(part == 0, ms[n], 0.0),)
    return first


@gluon.jit
def free_pair(pairs, j, c: gl.constexpr):
    """Give turn j's h back."""
    if c.is_global:
        set_empty(pairs, j)


@gluon.jit
def _begin_seen(v_c, do, c: gl.constexpr):
    """Begin ``<do_i, v_j>``, ``[j, i]``."""
    A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
    return warpgroup_mma(v_c, do.permute((1, 0)), A, use_acc=False, is_async=True)


@gluon.jit
def _seen_gradient(A, h_c, weights, at, c: gl.constexpr):
    """``<do_i, v_j> + h_i`` where i sees j, ``[j, i]``, as a left operand."""
    if c.is_global:
        A += h_c[None, :]
    return one_part(seen_by(A, weights, at, c), left(c.SB))


@gluon.jit
def _load_h(h_in, b, t, hq, n, c: gl.constexpr):
    """h of a chunk's queries; nothing (0) but for "global"."""
    if c.is_global:
        return load_scalars(h_in, b, t, hq, n, gl.SliceLayout(0, product(c.C)), c)
    else:
        return 0


@gluon.jit
def _begin_behind(v_c, behind, state, c: gl.constexpr):
    """Begin ``dphi [C, SB]`` from the state behind the chunk, one block, of its place ``behind``."""
    dphi = gl.zeros([c.C, c.SB], gl.float32, product(c.SB))
    if c.is_global:
        dphi += state[4].index(behind).load(gl.SliceLayout(0, product(c.SB)))[None, :]
    dphi = warpgroup_mma(v_c, state[2].index(behind).permute((1, 0)), dphi, is_async=True)
    return warpgroup_mma(v_c, state[3].index(behind).permute((1, 0)), dphi, is_async=True)


@gluon.jit
def _dphi(v_c, v_s, do_s, queries, state, h_in, place, t, i, weights, at, c: gl.constexpr):
    """``dphi [C, SB]`` of chunk i, of one block of features. No wait at a ring while products run: the compiler would then run
    them one by one."""
    b, h, _, end, _, _, _ = place
    behind = await_full(state, i if c.causal else 0)
    if c.causal:
        h_c = _load_h(h_in, b, t, h * c.G, end - t, c)
        do, w = next_full(do_s, i * c.G), next_full(queries, i * c.G)
        A = _begin_seen(v_c, do, c)
        dphi = _begin_behind(v_c, behind, state, c)
        if c.decay:
            A, dphi = warpgroup_mma_wait(0, (A, dphi))
            dphi = leave_rows(dphi, weights, at, product(c.SB), c)
        else:
            A = warpgroup_mma_wait(2, (A,))
        dphi = warpgroup_mma(_seen_gradient(A, h_c, weights, at, c), w, dphi, is_async=True)
        dphi = warpgroup_mma_wait(0, (dphi,))
        set_empty(state, i)
        set_empty(do_s, i * c.G)
        set_empty(queries, i * c.G)
    else:
        dphi = warpgroup_mma_wait(0, (_begin_behind(v_c, behind, state, c),))
    for g in gl.static_range(1, c.G if c.causal else 1):
        j = i * c.G + g
        h_c = _load_h(h_in, b, t, h * c.G + g, end - t, c)
        do, w = next_full(do_s, j), next_full(queries, j)
        A = warpgroup_mma_wait(0, (_begin_seen(v_c, do, c),))
        dphi = warpgroup_mma(_seen_gradient(A, h_c, weights, at, c), w, dphi, is_async=True)
        dphi = warpgroup_mma_wait(0, (dphi,))
        set_empty(do_s, j)
        set_empty(queries, j)
    set_empty(v_s, i)
    return dphi


@gluon.jit
def _block(A, v_c, turn, keys, queries, state, weights, at, c: gl.constexpr):
    """``phi * dphi [C, SB]`` of one of several blocks."""
    behind = await_full(state, turn)
    w = next_full(queries, turn)
    dphi = _begin_behind(v_c, behind, state, c)
    if c.decay:
        dphi = leave_rows(warpgroup_mma_wait(0, (dphi,)), weights, at, product(c.SB), c)
    dphi = warpgroup_mma_wait(0, (warpgroup_mma(A, w, dphi, is_async=True),))
    set_empty(state, turn)
    set_empty(queries, turn)
    y = next_full(keys, turn).load(product(c.SB)).to(gl.float32) * dphi
    set_empty(keys, turn)
    return y


@gluon.jit
def _rows(
    dk_rows,
    v_s,
    do_s,
    keys,
    tanhs,
    queries,
    state,
    weights,
    place,
    planes_s,
    beta,
    h_in,
    row_in,
    dlog_decay,
    flow,
    dbeta,
    c: gl.constexpr,
):
    b, h, start, end, chunks, part, H = place
    sharp = gl.load(beta + h).to(gl.float32)
    if not c.PARTIAL_GRADIENTS:
        staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], tile(c.C, c.BD))
    features: gl.constexpr = product(c.SB)
    db = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.LPB)))
    for i in range(chunks):
        t = start + (chunks - 1 - i) * c.C
        at = await_weights(weights, i, c)
        v_c = next_full(v_s, i)
        if c.NSB == 1:
            dphi = _dphi(v_c, v_s, do_s, queries, state, h_in, place, t, i, weights, at, c)
            phi = next_full(keys, i).load(features).to(gl.float32)
            set_empty(keys, i)
            y = phi * dphi
            total = gl.sum(y, 1)
            y -= phi * (total / c.L)[:, None]
            corners = add_corners(no_corners(c), y, 0, planes_s, c)
        else:
            h_c = _load_h(h_in, b, t, part * H + h, end - t, c)
            A = warpgroup_mma_wait(0, (_begin_seen(v_c, next_full(do_s, i), c),))
            A = _seen_gradient(A, h_c, weights, at, c)
            set_empty(do_s, i)
            total = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, features))
            corners = no_corners(c)
            for table in range(c.NSB // c.BLOCKS_PER_TABLE):
                sums = no_table(c)
                for n in range(c.BLOCKS_PER_TABLE):
                    y = _block(A, v_c, i * c.NSB + table * c.BLOCKS_PER_TABLE + n, keys, queries, state, weights, at, c)
                    sums = add_block(sums, y, n, c)
                corners = add_table(corners, sums, table, planes_s, c)
                total += sums[1]
            set_empty(v_s, i)
        free_weights(weights, i, c)
        if c.decay:
            dG = -gl.convert_layout(total, LINE)
            if not c.is_global:
                dG += load_scalars(row_in, b, t, part * H + h, end - t, LINE, c)
            store_scalars(dlog_decay, reverse_sums(dG) + flow, b, t, part * H + h, end - t, LINE, c)
            flow += gl.sum(dG, 0)
        u = next_full(tanhs, i).load(product(c.LPB))
        set_empty(tanhs, i)
        dz, db_c = hash_gradient(corners, u, sharp)
        db += db_c
        if c.PARTIAL_GRADIENTS:
            store_share(dk_rows, dz, b, t, part * H + h, end - t, c)
        else:
            send(dk_rows, t, staging, unproject(dz, planes_s[0], c))
    if not c.PARTIAL_GRADIENTS:
        tma.store_wait(0)  # before the sum takes the room of what is being sent
    gl.store(dbeta, gl.sum(db, 0))
