"""The backward pass over the queries (``race_recurrent_bwd_dq_kernel``) as a pipeline of warp groups; see the package.

With w = phi(q) / den ("global") or phi(q), rounded once, and the state before each chunk:

    e_i = M(i) do_i      h_i = -<w_i, e_i> / <w_i, m(i)>  ("global")      w dphi(q)_i = w_i (e_i + h_i m(i))

h is made of the very numbers that it is taken from, and e keeps two parts of every product, so what values have in common
cancels. The tile's sums of the suffix state, ``C = sum w_i do_i^T`` and ``c = sum w_i h_i``, come out of the same pass.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.common import locate
from race_dist.kernels.hopper.blocks import walk_blocks
from race_dist.kernels.hopper.soft_hash import (
    add_block,
    add_table,
    begin_corners,
    hash_gradient,
    load_inverse_den,
    load_keep,
    no_corners,
    no_table,
    one_part,
    put_features,
    put_planes,
    take_signs,
    two_parts,
    unproject,
)
from race_dist.kernels.hopper.layouts import by_rows, left, product, tile
from race_dist.kernels.hopper.pipeline import (
    await_empty,
    await_full,
    fetch,
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
from race_dist.kernels.hopper.state import (
    load_state,
    publish,
    put_parts,
    put_ones,
    put_pair,
    store_mass,
    store_values,
)
from race_dist.kernels.hopper.decay import (
    LEAVE,
    SIGHT,
    await_weights,
    enter_rows,
    enter_sight,
    free_weights,
    make_weights,
    pass_through,
    put_weights,
    seen,
    transposed,
)


@gluon.jit
def race_hopper_bwd_dq_kernel(
    q,
    k,
    v,
    dout,
    den,
    dq,
    h_out,
    row_out,
    planes,
    beta,
    log_decay,
    key_mask,
    states,
    sums,
    decays,
    dbeta,
    tiles,
    T,
    TILE,
    H,
    c: gl.constexpr,
):
    """Program (tile, head, block of value columns): writes dq, ``h [B, T, Hq]`` ("global"), the queries' part of dG
    ``[B, T, H]`` (decay, "none"), and, of one block of features, its part of
    ``sums [tile, H, S (Dv + 1)]`` of the suffix state and the tile's log decay
    ``decays [tile, H]``; of more, ``race_tile_sums_bwd_kernel`` makes those, dq, h and the part of dG are
    partial results that add, and heads of h and of it are ``NVB`` times as many, block by block."""
    part = gl.program_id(0) % c.NVB
    h = (gl.program_id(0) // c.NVB % H).to(gl.int64)
    number = gl.program_id(0) // (c.NVB * H)
    b, row, start, end, _ = locate(tiles, number, T, TILE, c)
    index = number.to(gl.int64) * H + h
    place = (b, h, start, end, ((end - start + c.C - 1) // c.C).to(gl.int32), index, part)
    planes_s = put_planes(planes, h, c)
    k_rows, v_rows = open_rows(k, b, h, end, c.D, c.BD, c), open_rows(v, b, h, end, c.Dv, c.BV, c)
    q_rows, do_rows = open_heads(q, b, h, end, c.D, c.BD, c), open_heads(dout, b, h, end, c.Dv, c.BV, c)
    if not c.PARTIAL_GRADIENTS:
        dq_rows = open_heads(dq, b, h, end, c.D, c.BD, c)
    else:
        dq_rows = dq
    deep: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the room
    readers: gl.constexpr = 2 if c.NSB == 1 else 1
    ahead: gl.constexpr = 1 if c.NSB == 1 else 2  # published states: M in two parts, m
    q_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
    do_s = make_ring(2, readers) + (operands(2, c.C, c.BV),)
    turns: gl.constexpr = 2 if c.NSB == 1 else 4
    queries = make_ring(turns, readers) + (operands(turns, c.C, c.SB),)  # w
    k_s, v_s, keys = q_s, do_s, queries  # unused, where not causal
    if c.causal:
        k_s = make_ring(1, 1) + (operands(1, c.C, c.BD),)
        v_s = make_ring(2, 2) + (operands(2, c.C, c.BV),)
        keys = make_ring(turns, 2) + (operands(turns, c.C, c.SB),)  # phi(k)
    tanhs = make_ring(deep, 1) + (numbers(deep, c.C, c.LPB),)  # of the projected queries
    state = make_ring(ahead, 1) + (operands(ahead, c.SB, c.BV), operands(ahead, c.SB, c.BV), vectors(ahead, c.SB))
    weights = make_weights(c)
    # of threads of the hash and of the state
    registers: gl.constexpr = (96, 192) if c.NSB == 1 else (104, 208)
    gl.warp_specialize(
        [
            (
                _rows,
                (
                    dq_rows,
                    v_s,
                    do_s,
                    keys,
                    queries,
                    tanhs,
                    state,
                    weights,
                    place,
                    planes_s,
                    _put_seen(c),
                    beta,
                    h_out,
                    row_out,
                    sums,
                    dbeta,
                    H,
                    c,
                ),
            ),
            (_features, (k_s, q_s, keys, queries, tanhs, weights, place, planes_s, beta, den, log_decay, key_mask, decays, c)),
            (
                _state,
                (
                    v_s,
                    do_s,
                    keys,
                    queries,
                    state,
                    weights,
                    place,
                    put_ones(c),
                    states,
                    index if c.causal else row * H + h,
                    sums,
                    c,
                ),
            ),
            (_loader, (k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c)),
        ],
        [4, 4, 1],
        [registers[0], registers[1], 24],
    )


@gluon.jit
def _loader(k_rows, v_rows, q_rows, do_rows, k_s, v_s, q_s, do_s, place, c: gl.constexpr):
    start = place[2]
    for i in range(place[4]):
        t = start + i * c.C
        if c.causal:
            fetch(k_rows, t, k_s, i, c.BD, c)
            fetch(v_rows, t, v_s, i, c.BV, c, place[6] * c.BV)
        for g in gl.static_range(c.G):
            fetch(q_rows[g], t, q_s, i * c.G + g, c.BD, c)
            fetch(do_rows[g], t, do_s, i * c.G + g, c.BV, c, place[6] * c.BV)


@gluon.jit
def _features(
    k_s, q_s, keys, queries, tanhs, weights, place, planes_s, beta, den, log_decay, key_mask, decays, c: gl.constexpr
):
    b, h, start, end, chunks, index, _ = place
    sharp = gl.load(beta + h).to(gl.float32)
    reach = (start * 0).to(gl.float64)
    for i in range(chunks):
        t = start + i * c.C
        if c.causal:
            keep = load_keep(key_mask, b, t, end - t, c)
            u = take_signs(k_s, i, planes_s, c)
            if c.decay:
                reach = put_weights(weights, i, log_decay, b, t, h, end - t, reach, c)
            put_features(keys, i, u, keep, sharp, planes_s, c)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            scale = load_inverse_den(den, b, t, h * c.G + g, end - t, c)
            u = take_signs(q_s, j, planes_s, c)
            tanhs[2].index(await_empty(tanhs, j)).store(u)
            set_full(tanhs, j)
            put_features(queries, j, u, scale, sharp, planes_s, c)
    if c.decay and c.NSB == 1:
        gl.store(decays + index, reach)


@gluon.jit
def _state(v_s, do_s, keys, queries, state, weights, place, ones, states, number, sums, c: gl.constexpr):
    if c.NSB == 1:
        _one_block(v_s, do_s, keys, queries, state, weights, place, ones, states, number, sums, c)
    else:
        walk_blocks(v_s, keys, state, weights, place[4], ones, states, number, place[6] * c.BV, 2, c)


@gluon.jit
def _one_block(v_s, do_s, keys, queries, state, weights, place, ones, states, number, sums, c: gl.constexpr):
    chunks, index = place[4], place[5]
    M, m = load_state(states, number, 0, c)
    if not c.causal:
        publish(M, m, 0, state, 2, c)
    C_sum = gl.zeros([c.SB, c.BV], gl.float32, product(c.BV))
    for i in range(chunks):
        at = await_weights(weights, i, c)
        if c.causal:
            publish(M, m, i, state, 2, c)
            Fk = transposed(next_full(keys, i), weights, LEAVE, at, c)
            M, m = pass_through(M, m, weights, at, c)
            M = warpgroup_mma(Fk, next_full(v_s, i), M, is_async=True)
            if c.is_global:
                m = warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True)
            M, m = warpgroup_mma_wait(0, (M, m))
            set_empty(keys, i)
            set_empty(v_s, i)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            w = transposed(next_full(queries, j), weights, SIGHT, at, c)
            C_sum = warpgroup_mma_wait(0, (warpgroup_mma(w, next_full(do_s, j), C_sum, is_async=True),))
            set_empty(queries, j)
            set_empty(do_s, j)
        free_weights(weights, i, c)
    store_values(sums, index, C_sum, c)


@gluon.jit
def _put_seen(c: gl.constexpr):
    """How much of each key a query sees, as a left operand in shared memory; under decay it is another in each chunk."""
    if c.is_global and c.causal and not c.decay:
        layout: gl.constexpr = by_rows(c.C)
        i, j = gl.arange(0, c.C, gl.SliceLayout(1, layout)), gl.arange(0, c.C, gl.SliceLayout(0, layout))
        value = gl.where(i[:, None] >= j[None, :], 1.0, 0.0)
        every = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.C], tile(c.C, c.C), value.to(gl.bfloat16))
        fence_async_shared()
        return every
    else:
        return 0


@gluon.jit
def _all_seen(every, weights, at, c: gl.constexpr):
    """How much of each key a query sees, as a left operand."""
    if c.decay:
        return one_part(seen(gl.full([c.C, c.C], 1.0, gl.float32, product(c.C)), weights, at, c), left(c.SB))
    else:
        return every


@gluon.jit
def _begin_before(do, before, state, c: gl.constexpr):
    """Begin ``e [C, SB]`` from the state before the chunk, one block, of its place ``before``."""
    e = gl.zeros([c.C, c.SB], gl.float32, product(c.SB))
    e = warpgroup_mma(do, state[2].index(before).permute((1, 0)), e, use_acc=False, is_async=True)
    return warpgroup_mma(do, state[3].index(before).permute((1, 0)), e, is_async=True)


@gluon.jit
def _begin_masses(Fk, before, state, every, weights, at, c: gl.constexpr):
    """Begin the masses ``[C, SB]`` that the queries see; zeros but for "global"."""
    m = gl.zeros([c.C, c.SB], gl.float32, product(c.SB))
    if c.is_global:
        m += state[4].index(before).load(gl.SliceLayout(0, product(c.SB)))[None, :]
        m = enter_rows(m, weights, at, product(c.SB), c)
        if c.causal:
            m = warpgroup_mma(_all_seen(every, weights, at, c), Fk, m, is_async=True)
    return m


@gluon.jit
def _block(do, A_parts, turn, keys, queries, state, every, weights, at, c: gl.constexpr):
    """``w``, ``e`` and the masses that the queries see, ``[C, SB]`` each, of one of several blocks."""
    before = await_full(state, turn)
    Fk, Fq = next_full(keys, turn), next_full(queries, turn)
    e = _begin_before(do, before, state, c)
    if c.decay:
        e = enter_rows(warpgroup_mma_wait(0, (e,)), weights, at, product(c.SB), c)
    e = warpgroup_mma(A_parts.index(0), Fk, e, is_async=True)
    e = warpgroup_mma(A_parts.index(1), Fk, e, is_async=True)
    m = _begin_masses(Fk, before, state, every, weights, at, c)
    e, m = warpgroup_mma_wait(0, (e, m))
    set_empty(state, turn)
    set_empty(keys, turn)
    w = Fq.load(product(c.SB)).to(gl.float32)
    set_empty(queries, turn)
    return w, e, m


@gluon.jit
def _one_of_group(v_s, do_s, keys, queries, state, every, i, g, weights, at, c: gl.constexpr):
    """The same of the one block of query head g of a group; queries are not given back. No wait at a ring while products run:
    the compiler would then run them one by one."""
    j = i * c.G + g
    last: gl.constexpr = g == c.G - 1
    before = await_full(state, i if c.causal else 0)
    do, Fq = next_full(do_s, j), next_full(queries, j)
    if c.causal:
        v_c, Fk = next_full(v_s, i), next_full(keys, i)
        A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
        A = warpgroup_mma(do, v_c.permute((1, 0)), A, use_acc=False, is_async=True)
        e = _begin_before(do, before, state, c)
        if c.decay:
            A, e = warpgroup_mma_wait(0, (A, e))
            e = enter_rows(e, weights, at, product(c.SB), c)
        else:
            A = warpgroup_mma_wait(2, (A,))
        A, A_rest = two_parts(seen(A, weights, at, c), left(c.SB))
        e = warpgroup_mma(A, Fk, e, is_async=True)
        e = warpgroup_mma(A_rest, Fk, e, is_async=True)
    else:
        Fk = Fq
        e = _begin_before(do, before, state, c)
    m = _begin_masses(Fk, before, state, every, weights, at, c)
    e, m = warpgroup_mma_wait(0, (e, m))
    w = Fq.load(product(c.SB)).to(gl.float32)
    set_empty(do_s, j)
    if c.causal and last:
        set_empty(v_s, i)
        set_empty(state, i)
        set_empty(keys, i)
    return w, e, m


@gluon.jit
def _rows(
    dq_rows,
    v_s,
    do_s,
    keys,
    queries,
    tanhs,
    state,
    weights,
    place,
    planes_s,
    every,
    beta,
    h_out,
    row_out,
    sums,
    dbeta,
    H,
    c: gl.constexpr,
):
    b, h, start, end, chunks, index, part = place
    sharp = gl.load(beta + h).to(gl.float32)
    if not c.PARTIAL_GRADIENTS:
        staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], tile(c.C, c.BD))
    if c.NSB == 1:
        pair = gl.allocate_shared_memory(gl.bfloat16, [16, c.C], tile(16, c.C))
    else:
        A_parts = operands(2, c.C, c.C)
    of_tokens: gl.constexpr = gl.SliceLayout(1, product(c.SB))
    db = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, product(c.LPB)))
    c_sum = gl.zeros([c.SB, 16], gl.float32, product(16))
    for i in range(chunks):
        t = start + i * c.C
        at = await_weights(weights, i, c)
        row = gl.zeros([c.C], gl.float32, of_tokens)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            if c.NSB == 1:
                w, e, m = _one_of_group(v_s, do_s, keys, queries, state, every, i, g, weights, at, c)
                y = w * e
                total = gl.sum(y, 1)
                if c.is_global:
                    mass = gl.sum(w * m, 1)
                    h_c = -total / gl.where(mass == 0.0, 1.0, mass)
                    store_scalars(h_out, h_c, b, t, h * c.G + g, end - t, of_tokens, c)
                    y += w * (h_c[:, None] * m)
                    put_pair(pair, enter_sight(h_c, weights, at, of_tokens, c), c)
                    fence_async_shared()
                    Fq = queries[2].index(j % 2).permute((1, 0))
                    c_sum = warpgroup_mma(Fq, pair.permute((1, 0)), c_sum, is_async=True)
                else:
                    y -= w * (total / c.L)[:, None]
                    row += total
                on, off = begin_corners(no_corners(c), y, 0, planes_s, c)
                c_sum, on, off = warpgroup_mma_wait(0, (c_sum, on, off))
                corners = on, off
                set_empty(queries, j)
            else:
                do, v_c = next_full(do_s, i), next_full(v_s, i)
                A = gl.zeros([c.C, c.C], gl.float32, product(c.C))
                A = warpgroup_mma(do, v_c.permute((1, 0)), A, use_acc=False, is_async=True)
                A = warpgroup_mma_wait(0, (A,))
                set_empty(v_s, i)
                put_parts(A_parts.index(0), A_parts.index(1), seen(A, weights, at, c))  # in registers it would spill
                fence_async_shared()
                corners, of_mass = no_corners(c), no_corners(c)
                total = gl.zeros([c.C], gl.float32, of_tokens)
                mass = gl.zeros([c.C], gl.float32, of_tokens)
                for table in range(c.NSB // c.BLOCKS_PER_TABLE):
                    of_values, of_masses = no_table(c), no_table(c)
                    for n in range(c.BLOCKS_PER_TABLE):
                        w, e, m = _block(
                            do, A_parts, i * c.NSB + table * c.BLOCKS_PER_TABLE + n, keys, queries, state, every, weights, at, c
                        )
                        of_values = add_block(of_values, w * e, n, c)
                        if c.is_global:
                            of_masses = add_block(of_masses, w * m, n, c)
                    corners = add_table(corners, of_values, table, planes_s, c)
                    total += of_values[1]
                    if c.is_global:
                        of_mass = add_table(of_mass, of_masses, table, planes_s, c)
                        mass += of_masses[1]
                set_empty(do_s, i)
                if c.is_global:
                    h_c = -total / gl.where(mass == 0.0, 1.0, mass)
                    store_scalars(h_out, h_c, b, t, part * H + h, end - t, of_tokens, c)
                    h_c = gl.convert_layout(h_c, gl.SliceLayout(1, product(c.LPB)))[:, None]
                    corners = corners[0] + h_c * of_mass[0], corners[1] + h_c * of_mass[1]
                else:
                    row += total
            u = next_full(tanhs, j).load(product(c.LPB))
            set_empty(tanhs, j)
            dz, db_c = hash_gradient(corners, u, sharp)
            db += db_c
            if c.PARTIAL_GRADIENTS:
                store_share(dq_rows, dz, b, t, (part * H + h) * c.G + g, end - t, c)
            else:
                send(dq_rows[g], t, staging, unproject(dz, planes_s[0], c))
        free_weights(weights, i, c)
        if c.decay and not c.is_global:
            store_scalars(row_out, row, b, t, part * H + h, end - t, of_tokens, c)
    if not c.PARTIAL_GRADIENTS:
        tma.store_wait(0)  # before the sum takes the room of what is being sent
    gl.store(dbeta + index * c.NVB + part, gl.sum(db, 0))
    if c.NSB == 1:
        store_mass(sums, index, c_sum, c)
