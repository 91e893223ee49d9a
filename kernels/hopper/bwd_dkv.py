"""The backward pass over the keys (``recurrent_bwd.race_recurrent_bwd_dkv_kernel``) as a warp-specialized pipeline.

Chunks in reverse, with the suffix state behind each:

    dphi(k_j) = C(j) v_j + c(j)         dv_j = C(j)^T phi(k_j)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.decay import (
    DecayPipeline,
    causal_decay_transposed,
    decay_block,
    decay_rows_to_end,
    decay_state,
    make_decay_pipeline,
    produce_decay,
    release_decay,
    reverse_cumsum,
    transpose_from_start,
    wait_decay,
)
from race_dist.kernels.hopper.layouts import LINE_LAYOUT, blocked_layout, lhs_layout, shared_layout, to_lhs, wgmma_layout
from race_dist.kernels.hopper.pipeline import (
    Pipeline,
    load_scalars,
    make_float32_pipeline,
    make_group_descriptors,
    make_pipeline,
    make_row_descriptor,
    opaque,
    store_partial_gradient,
    store_scalars,
    tma_load,
    tma_store,
)
from race_dist.kernels.hopper.program import Program, locate_program
from race_dist.kernels.hopper.soft_hash import (
    HashOperands,
    add_block,
    add_plane_sums,
    add_table,
    load_inverse_den,
    load_key_mask,
    make_hash_operands,
    produce_features,
    soft_hash_backward,
    tanh_projection,
    unproject,
    zero_plane_sums,
    zero_table_sums,
)
from race_dist.kernels.hopper.state import (
    StatePipeline,
    load_blocks,
    load_state,
    make_state_pipeline,
    publish_state,
    store_pair,
    tile_end_decay_gradient,
)


@aggregate
class PartitionArgs:
    """What the partitions share. The fields of queries are None where not causal."""

    program: Program
    hash: HashOperands
    k_desc: tma.tensor_descriptor  # [T, D]
    v_desc: tma.tensor_descriptor  # [T, Dv]
    q_descs: gl.tuple  # G x [T, D]
    do_descs: gl.tuple  # G x [T, Dv]
    k_pipe: Pipeline  # [C, BD], load -> hash
    v_pipe: Pipeline  # [C, BV], load -> mma
    q_pipe: Pipeline  # [C, BD], load -> hash
    do_pipe: Pipeline  # [C, BV], load -> state, mma
    phi_k_pipe: Pipeline  # [C, SB], hash -> state, mma
    w_pipe: Pipeline  # [C, SB], hash -> state, mma
    tanh_pipe: Pipeline  # [C, LPB] float32, of the projected keys, hash -> mma
    h_pipe: Pipeline  # [16, C], h in two parts, hash -> state; None unless "global"
    state_pipe: StatePipeline  # C [SB, BV] in two parts, c [SB], state -> mma, and state itself
    decay: DecayPipeline  # [C], hash -> state, mma


@gluon.jit
def race_hopper_bwd_dkv_kernel(x, dout, saved, grad_h, dcumulative, suffixes, grads, tiling, c: gl.constexpr):
    """Program (tile, head, block of value columns) of :class:`Inputs` ``x``: writes the :class:`KeyGradients` ``grads``.

    ``dout [B, T, Hq, Dv]``; ``saved``: :class:`Residuals`; ``grad_h`` and ``dcumulative`` from the pass over the queries;
    ``suffixes [tiles, H, S (Dv + 1)]``: the suffix state behind each tile. With several blocks of features, dk and dlog_decay
    are partial sums, one block of heads per block of value columns, as grad_h and dcumulative are."""
    program, tile = locate_program(tiling, c)
    b, h, end = program.b, program.h, program.end
    hash = make_hash_operands(x, h, c)
    k_desc = make_row_descriptor(x.k, b, h, end, c.D, c.BD, c)
    v_desc = make_row_descriptor(x.v, b, h, end, c.Dv, c.BV, c)
    q_descs = make_group_descriptors(x.q, b, h, end, c.D, c.BD, c)
    do_descs = make_group_descriptors(dout, b, h, end, c.Dv, c.BV, c)
    if not c.PARTIAL_GRADIENTS:
        dk = make_row_descriptor(grads.dk, b, h, end, c.D, c.BD, c)
    else:
        dk = grads.dk
    dv_desc = make_row_descriptor(grads.dv, b, h, end, c.Dv, c.BV, c)
    tanh_stages: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the shared memory
    phi_k_stages: gl.constexpr = tanh_stages if c.NSB == 1 else 4
    w_stages: gl.constexpr = 2 if c.NSB == 1 else 4
    state_stages: gl.constexpr = 1 if c.NSB == 1 else 2
    k_pipe = make_pipeline(1, 1, c.C, c.BD)
    v_pipe = make_pipeline(2, 1, c.C, c.BV)
    phi_k_pipe = make_pipeline(phi_k_stages, 2, c.C, c.SB)
    tanh_pipe = make_float32_pipeline(tanh_stages, 1, c.C, c.LPB)
    q_pipe, do_pipe, w_pipe, h_pipe = None, None, None, None
    if c.causal:
        q_pipe = make_pipeline(1, 1, c.C, c.BD)
        do_pipe = make_pipeline(2, 2, c.C, c.BV)
        w_pipe = make_pipeline(w_stages, 2, c.C, c.SB)
        if c.is_global:
            h_pipe = make_pipeline(2, 1, 16, c.C)
    state_pipe = make_state_pipeline(state_stages, 2, 2, c)
    decay = None
    if c.decay:
        decay = make_decay_pipeline(c)
    dG_after = 0.0
    if c.decay:
        dG_after = tile_end_decay_gradient(saved.states, saved.final, suffixes, program, tile, c)
    args = PartitionArgs(
        program,
        hash,
        k_desc,
        v_desc,
        q_descs,
        do_descs,
        k_pipe,
        v_pipe,
        q_pipe,
        do_pipe,
        phi_k_pipe,
        w_pipe,
        tanh_pipe,
        h_pipe,
        state_pipe,
        decay,
    )
    dbeta = grads.dbeta + program.index * c.NVB + program.value_block
    registers: gl.constexpr = (104, 208) if c.NSB == 1 else (104, 248)  # per thread of the hash and of the state partition
    gl.warp_specialize(
        [
            (mma_partition, (args, dk, grad_h, dcumulative, grads.dlog_decay, dG_after, dbeta, c)),
            (hash_partition, (args, saved.den, grad_h, x.log_decay, x.key_mask, c)),
            (state_partition, (args, dv_desc, suffixes, c)),
            (load_partition, (args, c)),
        ],
        [4, 4, 1],
        [registers[0], registers[1], 24],
    )


@gluon.jit
def load_partition(args, c: gl.constexpr):
    program = args.program
    for i in range(program.num_chunks):
        t = program.start + (program.num_chunks - 1 - i) * c.C
        tma_load(args.k_desc, t, args.k_pipe, i, c.BD, c)
        tma_load(args.v_desc, t, args.v_pipe, i, c.BV, c, program.value_block * c.BV)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            tma_load(args.q_descs[g], t, args.q_pipe, j, c.BD, c)
            tma_load(args.do_descs[g], t, args.do_pipe, j, c.BV, c, program.value_block * c.BV)


@gluon.jit
def hash_partition(args, den, grad_h, log_decay, key_mask, c: gl.constexpr):
    program, hash = args.program, args.hash
    b, h, H = program.b, program.h, program.H
    beta = gl.load(hash.beta + program.h).to(gl.float32)
    line: gl.constexpr = gl.SliceLayout(0, blocked_layout(c.C))
    for i in range(program.num_chunks):
        t = program.start + (program.num_chunks - 1 - i) * c.C
        present = load_key_mask(key_mask, b, t, program.end - t, c)  # [C]
        u = tanh_projection(args.k_pipe, i, hash, c)  # [C, LPB]
        args.tanh_pipe.produce(i, u)
        if c.decay:
            produce_decay(args.decay, i, log_decay, b, t, h, program.end - t, 0.0, c)
        produce_features(args.phi_k_pipe, i, u, present, beta, hash, c)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            if c.is_global:
                h_c = load_scalars(grad_h, b, t, h * c.G + g, program.end - t, line, c)  # [C]
                for value_block in gl.static_range(1, c.NVB):
                    h_c += load_scalars(grad_h, b, t, value_block * H + h, program.end - t, line, c)
                if c.NVB > 1:
                    h_c = gl.where(program.value_block == 0, h_c, 0.0)  # the first block of columns has the mass
                store_pair(args.h_pipe.buffers.index(args.h_pipe.producer_acquire(j)), h_c, c)
                args.h_pipe.producer_commit(j)
            scale = load_inverse_den(den, b, t, h * c.G + g, program.end - t, c)  # [C]
            produce_features(args.w_pipe, j, tanh_projection(args.q_pipe, j, hash, c), scale, beta, hash, c)


@gluon.jit
def state_partition(args, dv_desc, suffixes, c: gl.constexpr):
    """The suffix state, and dv, which takes it whole."""
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], shared_layout(c.C, c.BV))
    if c.NSB == 1:
        _suffix_state_one_block(args, dv_desc, suffixes, staging, c)
    else:
        _suffix_state_blocks(args, dv_desc, suffixes, staging, c)
    tma.store_wait(0)


@gluon.jit
def _suffix_state_one_block(args, dv_desc, suffixes, staging, c: gl.constexpr):
    program, decay, state_pipe = args.program, args.decay, args.state_pipe
    Cs, cs = load_state(suffixes, program.state_index, 0, c)  # [SB, BV], [SB, 16]
    if not c.causal:
        publish_state(state_pipe, 0, Cs, cs, 2, c, True)
    for i in range(program.num_chunks):
        stage = wait_decay(decay, i, c)
        if c.causal:
            publish_state(state_pipe, i, Cs, cs, 2, c, True)
        Fk = args.phi_k_pipe.consumer_buffer(i)  # [C, SB]
        dv = gl.zeros([c.C, c.BV], gl.float32, wgmma_layout(c.BV))
        dv = warpgroup_mma(Fk, state_pipe.values.index(0), dv, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(0, (dv,))
        dv = decay_rows_to_end(dv, decay, stage, wgmma_layout(c.BV), c)
        if c.causal:
            state_pipe.consumer_release(i)
        Cs, cs = decay_state(Cs, cs, decay, stage, c)
        for g in gl.static_range(c.G if c.causal else 0):
            j = i * c.G + g
            w = args.w_pipe.consumer_buffer(j)  # [C, SB]
            P = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))  # keys, queries
            P = warpgroup_mma_wait(0, (warpgroup_mma(Fk, w.permute((1, 0)), P, use_acc=False, is_async=True),))
            P = to_lhs(causal_decay_transposed(P, decay, stage, c), lhs_layout(c.BV))
            do = args.do_pipe.consumer_buffer(j)  # [C, BV]
            w = transpose_from_start(w, decay, stage, c)  # [SB, C]
            if c.is_global:
                h_c = args.h_pipe.consumer_buffer(j).permute((1, 0))  # [C, 16]
            dv = warpgroup_mma(P, do, dv, is_async=True)
            Cs = warpgroup_mma(w, do, Cs, is_async=True)
            if c.is_global:
                cs = warpgroup_mma(w, h_c, cs, is_async=True)
            dv, Cs, cs = warpgroup_mma_wait(0, (dv, Cs, cs))
            args.w_pipe.consumer_release(j)
            args.do_pipe.consumer_release(j)
            if c.is_global:
                args.h_pipe.consumer_release(j)
        args.phi_k_pipe.consumer_release(i)
        release_decay(decay, i, c)
        tma_store(dv_desc, program.start + (program.num_chunks - 1 - i) * c.C, staging, dv)


@gluon.jit
def _suffix_state_blocks(args, dv_desc, suffixes, staging, c: gl.constexpr):
    """Several blocks of features, all in registers."""
    program, decay, state_pipe = args.program, args.decay, args.state_pipe
    Cs, cs = load_blocks(suffixes, program.state_index, program.value_block * c.BV, c)  # NSB x [SB, BV], NSB x [SB]
    if c.NVB > 1:
        cs = _zero_unless_first(cs, program.value_block, c)
    for i in range(program.num_chunks):
        stage = wait_decay(decay, i, c)
        do = args.do_pipe.consumer_buffer(i)  # [C, BV]
        dv = gl.zeros([c.C, c.BV], gl.float32, wgmma_layout(c.BV))
        P = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))  # keys, queries
        if c.is_global:
            h_c = args.h_pipe.consumer_buffer(i).permute((1, 0))  # [C, 16]
        new_Cs, new_cs = (), ()
        for n in gl.static_range(c.NSB):
            j = opaque(i * c.NSB + n)
            C_n, c_n = Cs[n], cs[n]
            state_stage = publish_state(state_pipe, j, C_n, c_n, 2, c, True)
            Fk = args.phi_k_pipe.consumer_buffer(j)  # [C, SB]
            w = args.w_pipe.consumer_buffer(j)  # [C, SB]
            dv = warpgroup_mma(Fk, state_pipe.values.index(state_stage), dv, is_async=True)
            P = warpgroup_mma(Fk, w.permute((1, 0)), P, is_async=True)
            C_n, c_n = decay_block(C_n, c_n, decay, stage, c)
            w = transpose_from_start(w, decay, stage, c)  # [SB, C]
            C_n = warpgroup_mma(w, do, C_n, is_async=True)
            if c.is_global:
                mass = gl.zeros([c.SB, 16], gl.float32, wgmma_layout(16))
                mass = warpgroup_mma(w, h_c, mass, use_acc=False, is_async=True)
                dv, P, C_n, mass = warpgroup_mma_wait(0, (dv, P, C_n, mass))
                c_n += gl.sum(mass, 1)
            else:
                dv, P, C_n = warpgroup_mma_wait(0, (dv, P, C_n))
            state_pipe.consumer_release(j)
            args.phi_k_pipe.consumer_release(j)
            args.w_pipe.consumer_release(j)
            new_Cs, new_cs = new_Cs + (C_n,), new_cs + (c_n,)
        Cs, cs = new_Cs, new_cs
        if c.is_global:
            args.h_pipe.consumer_release(i)
        dv = decay_rows_to_end(dv, decay, stage, wgmma_layout(c.BV), c)
        P = to_lhs(causal_decay_transposed(P, decay, stage, c), lhs_layout(c.BV))
        dv = warpgroup_mma_wait(0, (warpgroup_mma(P, do, dv, is_async=True),))
        args.do_pipe.consumer_release(i)
        release_decay(decay, i, c)
        t = program.start + (program.num_chunks - 1 - i) * c.C
        tma_store(dv_desc, t, staging, dv, program.value_block * c.BV)


@gluon.jit
def _zero_unless_first(ms, value_block, c: gl.constexpr):
    """The masses NSB x ``[SB]`` in the first block of value columns, 0 in others."""
    masses = ()
    for n in gl.static_range(c.NSB):
        masses = masses + (gl.where(value_block == 0, ms[n], 0.0),)
    return masses


@gluon.jit
def _start_value_products(v_c, do, c: gl.constexpr):
    """Start ``<do_i, v_j>``, ``[C, C]`` of keys j and queries i."""
    A = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))
    return warpgroup_mma(v_c, do.permute((1, 0)), A, use_acc=False, is_async=True)


@gluon.jit
def _value_products_operand(A, h_c, decay, stage, c: gl.constexpr):
    """``<do_i, v_j> + h_i`` where i sees j, ``[C, C]``, as a left operand."""
    if c.is_global:
        A += h_c[None, :]
    return to_lhs(causal_decay_transposed(A, decay, stage, c), lhs_layout(c.SB))


@gluon.jit
def _load_h(grad_h, b, t, hq, n, c: gl.constexpr):
    """h of a chunk's queries, ``[C]``; 0 unless "global"."""
    if c.is_global:
        return load_scalars(grad_h, b, t, hq, n, gl.SliceLayout(0, wgmma_layout(c.C)), c)
    else:
        return 0


@gluon.jit
def _start_dphi(v_c, state_pipe, state_stage, c: gl.constexpr):
    """Start ``dphi [C, SB]`` from the state behind the chunk, one block; ``v_c [C, BV]``."""
    dphi = gl.zeros([c.C, c.SB], gl.float32, wgmma_layout(c.SB))
    if c.is_global:
        dphi += state_pipe.mass.index(state_stage).load(gl.SliceLayout(0, wgmma_layout(c.SB)))[None, :]
    dphi = warpgroup_mma(v_c, state_pipe.values.index(state_stage).permute((1, 0)), dphi, is_async=True)
    return warpgroup_mma(v_c, state_pipe.values_low.index(state_stage).permute((1, 0)), dphi, is_async=True)


@gluon.jit
def _dphi_one_block(args, v_c, grad_h, t, i, stage, c: gl.constexpr):
    """``dphi [C, SB]`` of chunk i, of the only block of features. No wait at an mbarrier while products run: the compiler would
    then run them one by one."""
    program, decay, state_pipe = args.program, args.decay, args.state_pipe
    b, h = program.b, program.h
    state_stage = state_pipe.consumer_wait(i if c.causal else 0)
    if c.causal:
        h_c = _load_h(grad_h, b, t, h * c.G, program.end - t, c)
        do, w = args.do_pipe.consumer_buffer(i * c.G), args.w_pipe.consumer_buffer(i * c.G)  # [C, BV], [C, SB]
        A = _start_value_products(v_c, do, c)
        dphi = _start_dphi(v_c, state_pipe, state_stage, c)
        if c.decay:
            A, dphi = warpgroup_mma_wait(0, (A, dphi))
            dphi = decay_rows_to_end(dphi, decay, stage, wgmma_layout(c.SB), c)
        else:
            A = warpgroup_mma_wait(2, (A,))
        dphi = warpgroup_mma(_value_products_operand(A, h_c, decay, stage, c), w, dphi, is_async=True)
        dphi = warpgroup_mma_wait(0, (dphi,))
        state_pipe.consumer_release(i)
        args.do_pipe.consumer_release(i * c.G)
        args.w_pipe.consumer_release(i * c.G)
    else:
        dphi = warpgroup_mma_wait(0, (_start_dphi(v_c, state_pipe, state_stage, c),))
    for g in gl.static_range(1, c.G if c.causal else 1):
        j = i * c.G + g
        h_c = _load_h(grad_h, b, t, h * c.G + g, program.end - t, c)
        do, w = args.do_pipe.consumer_buffer(j), args.w_pipe.consumer_buffer(j)  # [C, BV], [C, SB]
        A = warpgroup_mma_wait(0, (_start_value_products(v_c, do, c),))
        dphi = warpgroup_mma(_value_products_operand(A, h_c, decay, stage, c), w, dphi, is_async=True)
        dphi = warpgroup_mma_wait(0, (dphi,))
        args.do_pipe.consumer_release(j)
        args.w_pipe.consumer_release(j)
    args.v_pipe.consumer_release(i)
    return dphi


@gluon.jit
def _feature_gradient_block(args, A, v_c, j, stage, c: gl.constexpr):
    """``phi * dphi [C, SB]`` of one of several blocks, turn j; ``A [C, C]`` from :func:`_value_products_operand`."""
    state_pipe, decay = args.state_pipe, args.decay
    state_stage = state_pipe.consumer_wait(j)
    w = args.w_pipe.consumer_buffer(j)  # [C, SB]
    dphi = _start_dphi(v_c, state_pipe, state_stage, c)
    if c.decay:
        dphi = decay_rows_to_end(warpgroup_mma_wait(0, (dphi,)), decay, stage, wgmma_layout(c.SB), c)
    dphi = warpgroup_mma_wait(0, (warpgroup_mma(A, w, dphi, is_async=True),))
    state_pipe.consumer_release(j)
    args.w_pipe.consumer_release(j)
    y = args.phi_k_pipe.consumer_buffer(j).load(wgmma_layout(c.SB)).to(gl.float32) * dphi
    args.phi_k_pipe.consumer_release(j)
    return y


@gluon.jit
def mma_partition(args, dk, grad_h, dcumulative, dlog_decay, dG_after, dbeta, c: gl.constexpr):
    """dphi, dk, and the gradients of the log decays and of beta. ``dk``: a TMA descriptor, or :class:`Rows` of partial
    gradients; ``dG_after``: what every log decay gets from the tokens after the chunk; ``dbeta``: pointer to the program's."""
    program, decay, hash = args.program, args.decay, args.hash
    b, h, H, value_block = program.b, program.h, program.H, program.value_block
    beta = gl.load(hash.beta + program.h).to(gl.float32)
    if not c.PARTIAL_GRADIENTS:
        staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], shared_layout(c.C, c.BD))
    feature_layout: gl.constexpr = wgmma_layout(c.SB)
    dbeta_rows = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, wgmma_layout(c.LPB)))
    for i in range(program.num_chunks):
        t = program.start + (program.num_chunks - 1 - i) * c.C
        stage = wait_decay(decay, i, c)
        v_c = args.v_pipe.consumer_buffer(i)  # [C, BV]
        if c.NSB == 1:
            dphi = _dphi_one_block(args, v_c, grad_h, t, i, stage, c)  # [C, SB]
            phi = args.phi_k_pipe.consumer_buffer(i).load(feature_layout).to(gl.float32)  # [C, SB]
            args.phi_k_pipe.consumer_release(i)
            y = phi * dphi
            total = gl.sum(y, 1)  # [C]
            y -= phi * (total / c.L)[:, None]
            plane_sums = add_plane_sums(zero_plane_sums(c), y, 0, hash, c)
        else:
            h_c = _load_h(grad_h, b, t, value_block * H + h, program.end - t, c)
            A = warpgroup_mma_wait(0, (_start_value_products(v_c, args.do_pipe.consumer_buffer(i), c),))
            A = _value_products_operand(A, h_c, decay, stage, c)  # [C, C]
            args.do_pipe.consumer_release(i)
            total = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, feature_layout))
            plane_sums = zero_plane_sums(c)
            for table in range(c.NSB // c.BLOCKS_PER_TABLE):
                table_sums = zero_table_sums(c)
                for block in range(c.BLOCKS_PER_TABLE):
                    j = i * c.NSB + table * c.BLOCKS_PER_TABLE + block
                    y = _feature_gradient_block(args, A, v_c, j, stage, c)
                    table_sums = add_block(table_sums, y, block, c)
                plane_sums = add_table(plane_sums, table_sums, table, hash, c)
                total += table_sums.total
            args.v_pipe.consumer_release(i)
        release_decay(decay, i, c)
        if c.decay:
            dG = -gl.convert_layout(total, LINE_LAYOUT)  # [C]
            if not c.is_global:
                dG += load_scalars(dcumulative, b, t, value_block * H + h, program.end - t, LINE_LAYOUT, c)
            store_scalars(dlog_decay, reverse_cumsum(dG) + dG_after, b, t, value_block * H + h, program.end - t, LINE_LAYOUT, c)
            dG_after += gl.sum(dG, 0)
        u = args.tanh_pipe.consumer_buffer(i).load(wgmma_layout(c.LPB))  # [C, LPB]
        args.tanh_pipe.consumer_release(i)
        dz, dbeta_c = soft_hash_backward(plane_sums, u, beta)  # [C, LPB], [C]
        dbeta_rows += dbeta_c
        if c.PARTIAL_GRADIENTS:
            store_partial_gradient(dk, dz, b, t, value_block * H + h, program.end - t, c)
        else:
            tma_store(dk, t, staging, unproject(dz, hash, c))
    if not c.PARTIAL_GRADIENTS:
        tma.store_wait(0)  # before the reduction reuses the shared memory of what is being stored
    gl.store(dbeta, gl.sum(dbeta_rows, 0))
