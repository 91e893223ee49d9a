"""The backward pass over the queries (``recurrent_bwd.race_recurrent_bwd_dq_kernel``) as a warp-specialized pipeline.

With w = phi(q) / den ("global") or phi(q), rounded once, and the state before each chunk:

    e_i = M(i) do_i      h_i = -<w_i, e_i> / <w_i, m(i)>  ("global")      w dphi(q)_i = w_i (e_i + h_i m(i))

h is computed from the same rounded numbers that it is subtracted from, and e keeps two parts of every product, so what values
have in common cancels. One block of features: the tile's sums of the suffix state, ``C = sum w_i do_i^T`` and
``c = sum w_i h_i``, come out of the same pass.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.decay import (
    DecayPipeline,
    causal_decay,
    decay_rows_from_start,
    decay_state,
    decay_vector_from_tile,
    make_decay_pipeline,
    produce_decay,
    release_decay,
    transpose_from_tile,
    transpose_to_end,
    wait_decay,
)
from race_dist.kernels.hopper.layouts import blocked_layout, lhs_layout, shared_layout, split_lhs, to_lhs, wgmma_layout
from race_dist.kernels.hopper.pipeline import (
    Pipeline,
    allocate_operands,
    make_float32_pipeline,
    make_group_descriptors,
    make_pipeline,
    make_row_descriptor,
    store_partial_gradient,
    store_scalars,
    tma_load,
    tma_store,
)
from race_dist.kernels.hopper.program import Program, locate_program
from race_dist.kernels.hopper.soft_hash import (
    HashOperands,
    PlaneSums,
    add_block,
    add_table,
    load_inverse_den,
    load_key_mask,
    make_hash_operands,
    produce_features,
    soft_hash_backward,
    start_plane_sums,
    tanh_projection,
    unproject,
    zero_plane_sums,
    zero_table_sums,
)
from race_dist.kernels.hopper.state import (
    StatePipeline,
    load_state,
    make_mass_operand,
    make_state_pipeline,
    prefix_state_blocks,
    publish_state,
    store_mass,
    store_pair,
    store_parts,
    store_values,
)


@aggregate
class PartitionArgs:
    """What the partitions share. The fields of keys and values are None where not causal."""

    program: Program
    hash: HashOperands
    k_desc: tma.tensor_descriptor  # [T, D]
    v_desc: tma.tensor_descriptor  # [T, Dv]
    q_descs: gl.tuple  # G x [T, D]
    do_descs: gl.tuple  # G x [T, Dv]
    k_pipe: Pipeline  # [C, BD], load -> hash
    v_pipe: Pipeline  # [C, BV], load -> state, mma
    q_pipe: Pipeline  # [C, BD], load -> hash
    do_pipe: Pipeline  # [C, BV], load -> mma; one block of features: and state
    phi_k_pipe: Pipeline  # [C, SB], hash -> state, mma
    w_pipe: Pipeline  # [C, SB], hash -> mma; one block of features: and state
    tanh_pipe: Pipeline  # [C, LPB] float32, of the projected queries, hash -> mma
    state_pipe: StatePipeline  # M [SB, BV] in two parts, m [SB], state -> mma
    decay: DecayPipeline  # [C], hash -> state, mma


@gluon.jit
def race_hopper_bwd_dq_kernel(x, dout, saved, grads, tiling, c: gl.constexpr):
    """Program (tile, head, block of value columns) of :class:`Inputs` ``x``: writes the :class:`QueryGradients` ``grads``.

    ``dout [B, T, Hq, Dv]``, ``saved``: :class:`Residuals`. With several blocks of features, dq, h and dcumulative are partial
    sums, one block of heads per block of value columns, and ``race_tile_sums_bwd_kernel`` computes the suffix sums."""
    program, _ = locate_program(tiling, c)
    b, h, end = program.b, program.h, program.end
    hash = make_hash_operands(x, h, c)
    k_desc = make_row_descriptor(x.k, b, h, end, c.D, c.BD, c)
    v_desc = make_row_descriptor(x.v, b, h, end, c.Dv, c.BV, c)
    q_descs = make_group_descriptors(x.q, b, h, end, c.D, c.BD, c)
    do_descs = make_group_descriptors(dout, b, h, end, c.Dv, c.BV, c)
    if not c.PARTIAL_GRADIENTS:
        dq = make_group_descriptors(grads.dq, b, h, end, c.D, c.BD, c)
    else:
        dq = grads.dq
    tanh_stages: gl.constexpr = 2 if c.LPB == 16 else 1  # more planes take the shared memory
    w_consumers: gl.constexpr = 2 if c.NSB == 1 else 1
    state_stages: gl.constexpr = 1 if c.NSB == 1 else 2
    feature_stages: gl.constexpr = 2 if c.NSB == 1 else 4
    q_pipe = make_pipeline(1, 1, c.C, c.BD)
    do_pipe = make_pipeline(2, w_consumers, c.C, c.BV)
    w_pipe = make_pipeline(feature_stages, w_consumers, c.C, c.SB)
    k_pipe, v_pipe, phi_k_pipe = None, None, None
    if c.causal:
        k_pipe = make_pipeline(1, 1, c.C, c.BD)
        v_pipe = make_pipeline(2, 2, c.C, c.BV)
        phi_k_pipe = make_pipeline(feature_stages, 2, c.C, c.SB)
    tanh_pipe = make_float32_pipeline(tanh_stages, 1, c.C, c.LPB)
    state_pipe = make_state_pipeline(state_stages, 1, 2, c)
    decay = None
    if c.decay:
        decay = make_decay_pipeline(c)
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
        state_pipe,
        decay,
    )
    grad_h, dcumulative, suffix = grads.h, grads.dcumulative, grads.suffix
    registers: gl.constexpr = (96, 192) if c.NSB == 1 else (104, 208)  # per thread of the hash and of the state partition
    gl.warp_specialize(
        [
            (mma_partition, (args, _make_causal_ones(c), dq, grad_h, dcumulative, suffix, grads.dbeta, c)),
            (hash_partition, (args, saved.den, x.log_decay, x.key_mask, suffix, c)),
            (state_partition, (args, make_mass_operand(c), saved.states, suffix, c)),
            (load_partition, (args, c)),
        ],
        [4, 4, 1],
        [registers[0], registers[1], 24],
    )


@gluon.jit
def load_partition(args, c: gl.constexpr):
    program = args.program
    for i in range(program.num_chunks):
        t = program.start + i * c.C
        if c.causal:
            tma_load(args.k_desc, t, args.k_pipe, i, c.BD, c)
            tma_load(args.v_desc, t, args.v_pipe, i, c.BV, c, program.value_block * c.BV)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            tma_load(args.q_descs[g], t, args.q_pipe, j, c.BD, c)
            tma_load(args.do_descs[g], t, args.do_pipe, j, c.BV, c, program.value_block * c.BV)


@gluon.jit
def hash_partition(args, den, log_decay, key_mask, suffix, c: gl.constexpr):
    program, hash = args.program, args.hash
    b, h = program.b, program.h
    beta = gl.load(hash.beta + program.h).to(gl.float32)
    reach = (program.start * 0).to(gl.float64)
    for i in range(program.num_chunks):
        t = program.start + i * c.C
        if c.causal:
            present = load_key_mask(key_mask, b, t, program.end - t, c)  # [C]
            u = tanh_projection(args.k_pipe, i, hash, c)  # [C, LPB]
            if c.decay:
                reach = produce_decay(args.decay, i, log_decay, b, t, h, program.end - t, reach, c)
            produce_features(args.phi_k_pipe, i, u, present, beta, hash, c)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            scale = load_inverse_den(den, b, t, h * c.G + g, program.end - t, c)  # [C]
            u = tanh_projection(args.q_pipe, j, hash, c)  # [C, LPB]
            args.tanh_pipe.produce(j, u)
            produce_features(args.w_pipe, j, u, scale, beta, hash, c)
    if c.decay and c.NSB == 1:
        gl.store(suffix.decays + program.index, reach)


@gluon.jit
def state_partition(args, ones, states, suffix, c: gl.constexpr):
    """The prefix state and, of one block of features, the sum of the suffix state. ``ones``: the right operand that sums
    features into a mass."""
    program = args.program
    if c.NSB > 1:
        prefix_state_blocks(args, ones, states, program.state_index, 2, c)
    else:
        decay = args.decay
        M, m = load_state(states, program.state_index, 0, c)  # [SB, BV], [SB, 16]
        if not c.causal:
            publish_state(args.state_pipe, 0, M, m, 2, c)
        C_sum = gl.zeros([c.SB, c.BV], gl.float32, wgmma_layout(c.BV))
        for i in range(program.num_chunks):
            stage = wait_decay(decay, i, c)
            if c.causal:
                publish_state(args.state_pipe, i, M, m, 2, c)
                Fk = transpose_to_end(args.phi_k_pipe.consumer_buffer(i), decay, stage, c)  # [SB, C]
                M, m = decay_state(M, m, decay, stage, c)
                M = warpgroup_mma(Fk, args.v_pipe.consumer_buffer(i), M, is_async=True)
                if c.is_global:
                    m = warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True)
                M, m = warpgroup_mma_wait(0, (M, m))
                args.phi_k_pipe.consumer_release(i)
                args.v_pipe.consumer_release(i)
            for g in gl.static_range(c.G):
                j = i * c.G + g
                w = transpose_from_tile(args.w_pipe.consumer_buffer(j), decay, stage, c)  # [SB, C]
                do = args.do_pipe.consumer_buffer(j)  # [C, BV]
                C_sum = warpgroup_mma_wait(0, (warpgroup_mma(w, do, C_sum, is_async=True),))
                args.w_pipe.consumer_release(j)
                args.do_pipe.consumer_release(j)
            release_decay(decay, i, c)
        store_values(suffix.states, program.index, C_sum, c)


@gluon.jit
def _make_causal_ones(c: gl.constexpr):
    """Which keys each query sees, ``[C, C]`` of ones and zeros as a left operand in shared memory. Under decay it differs from
    chunk to chunk and is computed in registers."""
    if c.is_global and c.causal and not c.decay:
        layout: gl.constexpr = blocked_layout(c.C)
        i, j = gl.arange(0, c.C, gl.SliceLayout(1, layout)), gl.arange(0, c.C, gl.SliceLayout(0, layout))
        value = gl.where(i[:, None] >= j[None, :], 1.0, 0.0)
        ones = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.C], shared_layout(c.C, c.C), value.to(gl.bfloat16))
        fence_async_shared()
        return ones
    else:
        return 0


@gluon.jit
def _causal_ones_operand(causal_ones, decay, stage, c: gl.constexpr):
    """How much of each key a query sees, ``[C, C]``, as a left operand."""
    if c.decay:
        ones = gl.full([c.C, c.C], 1.0, gl.float32, wgmma_layout(c.C))
        return to_lhs(causal_decay(ones, decay, stage, c), lhs_layout(c.SB))
    else:
        return causal_ones


@gluon.jit
def _start_e(do, state_pipe, state_stage, c: gl.constexpr):
    """Start ``e [C, SB]`` from the state before the chunk, one block; ``do [C, BV]``."""
    e = gl.zeros([c.C, c.SB], gl.float32, wgmma_layout(c.SB))
    e = warpgroup_mma(do, state_pipe.values.index(state_stage).permute((1, 0)), e, use_acc=False, is_async=True)
    return warpgroup_mma(do, state_pipe.values_low.index(state_stage).permute((1, 0)), e, is_async=True)


@gluon.jit
def _start_masses(Fk, state_pipe, state_stage, causal_ones, decay, stage, c: gl.constexpr):
    """Start the masses ``[C, SB]`` that the queries see; zeros unless "global". ``Fk [C, SB]``."""
    m = gl.zeros([c.C, c.SB], gl.float32, wgmma_layout(c.SB))
    if c.is_global:
        m += state_pipe.mass.index(state_stage).load(gl.SliceLayout(0, wgmma_layout(c.SB)))[None, :]
        m = decay_rows_from_start(m, decay, stage, wgmma_layout(c.SB), c)
        if c.causal:
            m = warpgroup_mma(_causal_ones_operand(causal_ones, decay, stage, c), Fk, m, is_async=True)
    return m


@gluon.jit
def _read_block(args, do, A_parts, j, causal_ones, stage, c: gl.constexpr):
    """``w``, ``e`` and the masses that the queries see, ``[C, SB]`` each, of one of several blocks. ``A_parts`` 2 x ``[C, C]``:
    do v^T, causal, in two parts."""
    state_pipe, decay = args.state_pipe, args.decay
    state_stage = state_pipe.consumer_wait(j)
    Fk, Fq = args.phi_k_pipe.consumer_buffer(j), args.w_pipe.consumer_buffer(j)  # [C, SB]
    e = _start_e(do, state_pipe, state_stage, c)
    if c.decay:
        e = decay_rows_from_start(warpgroup_mma_wait(0, (e,)), decay, stage, wgmma_layout(c.SB), c)
    e = warpgroup_mma(A_parts.index(0), Fk, e, is_async=True)
    e = warpgroup_mma(A_parts.index(1), Fk, e, is_async=True)
    m = _start_masses(Fk, state_pipe, state_stage, causal_ones, decay, stage, c)
    e, m = warpgroup_mma_wait(0, (e, m))
    state_pipe.consumer_release(j)
    args.phi_k_pipe.consumer_release(j)
    w = Fq.load(wgmma_layout(c.SB)).to(gl.float32)
    args.w_pipe.consumer_release(j)
    return w, e, m


@gluon.jit
def _read_one_block(args, i, g, causal_ones, stage, c: gl.constexpr):
    """:func:`_read_block` of the only block of features, of query head g of the group; w's buffer is not released.

    No wait at an mbarrier while products run: the compiler would then run them one by one."""
    state_pipe, decay = args.state_pipe, args.decay
    j = i * c.G + g
    last: gl.constexpr = g == c.G - 1
    state_stage = state_pipe.consumer_wait(i if c.causal else 0)
    do, Fq = args.do_pipe.consumer_buffer(j), args.w_pipe.consumer_buffer(j)  # [C, BV], [C, SB]
    if c.causal:
        v_c, Fk = args.v_pipe.consumer_buffer(i), args.phi_k_pipe.consumer_buffer(i)  # [C, BV], [C, SB]
        A = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))
        A = warpgroup_mma(do, v_c.permute((1, 0)), A, use_acc=False, is_async=True)
        e = _start_e(do, state_pipe, state_stage, c)
        if c.decay:
            A, e = warpgroup_mma_wait(0, (A, e))
            e = decay_rows_from_start(e, decay, stage, wgmma_layout(c.SB), c)
        else:
            A = warpgroup_mma_wait(2, (A,))
        A, A_low = split_lhs(causal_decay(A, decay, stage, c), lhs_layout(c.SB))
        e = warpgroup_mma(A, Fk, e, is_async=True)
        e = warpgroup_mma(A_low, Fk, e, is_async=True)
    else:
        Fk = Fq
        e = _start_e(do, state_pipe, state_stage, c)
    m = _start_masses(Fk, state_pipe, state_stage, causal_ones, decay, stage, c)
    e, m = warpgroup_mma_wait(0, (e, m))
    w = Fq.load(wgmma_layout(c.SB)).to(gl.float32)
    args.do_pipe.consumer_release(j)
    if c.causal and last:
        args.v_pipe.consumer_release(i)
        state_pipe.consumer_release(i)
        args.phi_k_pipe.consumer_release(i)
    return w, e, m


@gluon.jit
def mma_partition(args, causal_ones, dq, grad_h, dcumulative, suffix, dbeta, c: gl.constexpr):
    """e, h, dq, the gradient of beta, and c of the suffix state. ``dq``: TMA descriptors, or :class:`Rows` of partial
    gradients."""
    program, decay, hash = args.program, args.decay, args.hash
    b, h, H, value_block = program.b, program.h, program.H, program.value_block
    beta = gl.load(hash.beta + program.h).to(gl.float32)
    if not c.PARTIAL_GRADIENTS:
        staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BD], shared_layout(c.C, c.BD))
    if c.NSB == 1:
        h_operand = gl.allocate_shared_memory(gl.bfloat16, [16, c.C], shared_layout(16, c.C))
    else:
        A_parts = allocate_operands(2, c.C, c.C)
    feature_rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.SB))
    dbeta_rows = gl.zeros([c.C], gl.float32, gl.SliceLayout(1, wgmma_layout(c.LPB)))
    c_sum = gl.zeros([c.SB, 16], gl.float32, wgmma_layout(16))
    for i in range(program.num_chunks):
        t = program.start + i * c.C
        stage = wait_decay(decay, i, c)
        dcumulative_c = gl.zeros([c.C], gl.float32, feature_rows)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            if c.NSB == 1:
                w, e, m = _read_one_block(args, i, g, causal_ones, stage, c)
                y = w * e  # [C, SB]
                total = gl.sum(y, 1)  # [C]
                if c.is_global:
                    mass = gl.sum(w * m, 1)
                    h_c = -total / gl.where(mass == 0.0, 1.0, mass)  # [C]
                    store_scalars(grad_h, h_c, b, t, h * c.G + g, program.end - t, feature_rows, c)
                    y += w * (h_c[:, None] * m)
                    store_pair(h_operand, decay_vector_from_tile(h_c, decay, stage, feature_rows, c), c)
                    fence_async_shared()
                    w_transposed = args.w_pipe.buffers.index(j % 2).permute((1, 0))  # [SB, C]
                    c_sum = warpgroup_mma(w_transposed, h_operand.permute((1, 0)), c_sum, is_async=True)
                else:
                    y -= w * (total / c.L)[:, None]
                    dcumulative_c += total
                y_set, y_clear = start_plane_sums(zero_plane_sums(c), y, 0, hash, c)
                c_sum, y_set, y_clear = warpgroup_mma_wait(0, (c_sum, y_set, y_clear))
                plane_sums = PlaneSums(y_set, y_clear)
                args.w_pipe.consumer_release(j)
            else:
                do, v_c = args.do_pipe.consumer_buffer(i), args.v_pipe.consumer_buffer(i)  # [C, BV]
                A = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))
                A = warpgroup_mma(do, v_c.permute((1, 0)), A, use_acc=False, is_async=True)
                A = warpgroup_mma_wait(0, (A,))
                args.v_pipe.consumer_release(i)
                store_parts(A_parts.index(0), A_parts.index(1), causal_decay(A, decay, stage, c))  # registers would spill
                fence_async_shared()
                plane_sums, mass_plane_sums = zero_plane_sums(c), zero_plane_sums(c)
                total = gl.zeros([c.C], gl.float32, feature_rows)
                mass = gl.zeros([c.C], gl.float32, feature_rows)
                for table in range(c.NSB // c.BLOCKS_PER_TABLE):
                    value_sums, mass_sums = zero_table_sums(c), zero_table_sums(c)
                    for block in range(c.BLOCKS_PER_TABLE):
                        turn = i * c.NSB + table * c.BLOCKS_PER_TABLE + block
                        w, e, m = _read_block(args, do, A_parts, turn, causal_ones, stage, c)
                        value_sums = add_block(value_sums, w * e, block, c)
                        if c.is_global:
                            mass_sums = add_block(mass_sums, w * m, block, c)
                    plane_sums = add_table(plane_sums, value_sums, table, hash, c)
                    total += value_sums.total
                    if c.is_global:
                        mass_plane_sums = add_table(mass_plane_sums, mass_sums, table, hash, c)
                        mass += mass_sums.total
                args.do_pipe.consumer_release(i)
                if c.is_global:
                    h_c = -total / gl.where(mass == 0.0, 1.0, mass)  # [C]
                    store_scalars(grad_h, h_c, b, t, value_block * H + h, program.end - t, feature_rows, c)
                    h_c = gl.convert_layout(h_c, gl.SliceLayout(1, wgmma_layout(c.LPB)))[:, None]
                    y_set = plane_sums.set + h_c * mass_plane_sums.set
                    plane_sums = PlaneSums(y_set, plane_sums.clear + h_c * mass_plane_sums.clear)
                else:
                    dcumulative_c += total
            u = args.tanh_pipe.consumer_buffer(j).load(wgmma_layout(c.LPB))  # [C, LPB]
            args.tanh_pipe.consumer_release(j)
            dz, dbeta_c = soft_hash_backward(plane_sums, u, beta)  # [C, LPB], [C]
            dbeta_rows += dbeta_c
            if c.PARTIAL_GRADIENTS:
                store_partial_gradient(dq, dz, b, t, (value_block * H + h) * c.G + g, program.end - t, c)
            else:
                tma_store(dq[g], t, staging, unproject(dz, hash, c))
        release_decay(decay, i, c)
        if c.decay and not c.is_global:
            store_scalars(dcumulative, dcumulative_c, b, t, value_block * H + h, program.end - t, feature_rows, c)
    if not c.PARTIAL_GRADIENTS:
        tma.store_wait(0)  # before the reduction reuses the shared memory of what is being stored
    gl.store(dbeta + program.index * c.NVB + value_block, gl.sum(dbeta_rows, 0))
    if c.NSB == 1:
        store_mass(suffix.states, program.index, c_sum, c)
