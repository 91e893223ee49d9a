"""The forward pass (``recurrent_fwd.race_recurrent_fwd_kernel``) as a warp-specialized pipeline; see the package."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.decay import (
    DecayPipeline,
    causal_decay,
    decay_rows_from_start,
    decay_state,
    decay_vector_from_start,
    make_decay_pipeline,
    produce_decay,
    release_decay,
    transpose_to_end,
    wait_decay,
)
from race_dist.kernels.hopper.layouts import lhs_layout, round_to_bf16, shared_layout, to_lhs, wgmma_layout
from race_dist.kernels.hopper.pipeline import (
    Pipeline,
    make_group_descriptors,
    make_pipeline,
    make_row_descriptor,
    store_scalars,
    tma_load,
    tma_store,
)
from race_dist.kernels.hopper.program import Program, locate_program
from race_dist.kernels.hopper.soft_hash import (
    HashOperands,
    load_key_mask,
    make_hash_operands,
    produce_features,
    tanh_projection,
)
from race_dist.kernels.hopper.state import (
    StatePipeline,
    load_state,
    make_mass_operand,
    make_state_pipeline,
    prefix_state_blocks,
    publish_state,
)
from race_dist.kernels.state import inverse_den


@aggregate
class PartitionArgs:
    """What the partitions share. The fields of keys and values are None where not causal."""

    program: Program
    hash: HashOperands
    k_desc: tma.tensor_descriptor  # [T, D]
    v_desc: tma.tensor_descriptor  # [T, Dv]
    q_descs: gl.tuple  # G x [T, D]
    out_descs: gl.tuple  # G x [T, Dv]
    k_pipe: Pipeline  # [C, BD], load -> hash
    v_pipe: Pipeline  # [C, BV], load -> state, mma
    q_pipe: Pipeline  # [C, BD], load -> hash
    phi_k_pipe: Pipeline  # [C, SB], hash -> state, mma
    phi_q_pipe: Pipeline  # [C, SB], hash -> mma
    state_pipe: StatePipeline  # M [SB, BV], m [SB], state -> mma
    decay: DecayPipeline  # [C], hash -> state, mma


@gluon.jit
def race_hopper_fwd_kernel(x, out, den, states, tiling, c: gl.constexpr):
    """Program (tile, head, block of value columns) of :class:`Inputs` ``x``: writes ``out [B, T, Hq, Dv]`` and, for "global",
    ``den [B, T, Hq]``. ``states [tiles, H, S (Dv + 1)]``: the state before each tile (not causal: the totals)."""
    program, _ = locate_program(tiling, c)
    b, h, end = program.b, program.h, program.end
    hash = make_hash_operands(x, h, c)
    k_desc = make_row_descriptor(x.k, b, h, end, c.D, c.BD, c)
    v_desc = make_row_descriptor(x.v, b, h, end, c.Dv, c.BV, c)
    q_descs = make_group_descriptors(x.q, b, h, end, c.D, c.BD, c)
    out_descs = make_group_descriptors(out, b, h, end, c.Dv, c.BV, c)
    q_pipe = make_pipeline(2, 1, c.C, c.BD)
    feature_stages: gl.constexpr = 2 if c.NSB == 1 else 4
    phi_q_pipe = make_pipeline(feature_stages, 1, c.C, c.SB)
    k_pipe, v_pipe, phi_k_pipe = None, None, None
    if c.causal:
        k_pipe = make_pipeline(2, 1, c.C, c.BD)
        v_pipe = make_pipeline(2, 2, c.C, c.BV)
        phi_k_pipe = make_pipeline(feature_stages, 2, c.C, c.SB)
    state_pipe = make_state_pipeline(2, 1, 1, c)
    decay = None
    if c.decay:
        decay = make_decay_pipeline(c)
    args = PartitionArgs(
        program, hash, k_desc, v_desc, q_descs, out_descs, k_pipe, v_pipe, q_pipe, phi_k_pipe, phi_q_pipe, state_pipe, decay
    )
    registers: gl.constexpr = (128, 176) if c.NSB == 1 else (96, 208)  # per thread of the hash and of the state partition
    gl.warp_specialize(
        [
            (mma_partition, (args, den, c)),
            (hash_partition, (args, x.log_decay, x.key_mask, c)),
            (state_partition, (args, make_mass_operand(c), states, c)),
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
            tma_load(args.q_descs[g], t, args.q_pipe, i * c.G + g, c.BD, c)


@gluon.jit
def hash_partition(args, log_decay, key_mask, c: gl.constexpr):
    program, hash = args.program, args.hash
    beta = gl.load(hash.beta + program.h).to(gl.float32)
    ones = gl.full([c.C], 1.0, gl.float32, gl.SliceLayout(1, wgmma_layout(c.SB)))
    for i in range(program.num_chunks):
        t = program.start + i * c.C
        if c.causal:
            present = load_key_mask(key_mask, program.b, t, program.end - t, c)  # [C]
            u = tanh_projection(args.k_pipe, i, hash, c)  # [C, LPB]
            if c.decay:
                produce_decay(args.decay, i, log_decay, program.b, t, program.h, program.end - t, 0.0, c)
            produce_features(args.phi_k_pipe, i, u, present, beta, hash, c)
        for g in gl.static_range(c.G):
            j = i * c.G + g
            produce_features(args.phi_q_pipe, j, tanh_projection(args.q_pipe, j, hash, c), ones, beta, hash, c)


@gluon.jit
def state_partition(args, ones, states, c: gl.constexpr):
    """The prefix state. ``ones``: the right operand that sums features into a mass."""
    program = args.program
    if c.NSB > 1:
        prefix_state_blocks(args, ones, states, program.state_index, 1, c)
    else:
        decay = args.decay
        M, m = load_state(states, program.state_index, 0, c)  # [SB, BV], [SB, 16]
        if not c.causal:
            publish_state(args.state_pipe, 0, M, m, 1, c)
        else:
            for i in range(program.num_chunks):
                stage = wait_decay(decay, i, c)
                publish_state(args.state_pipe, i, M, m, 1, c)
                Fk = transpose_to_end(args.phi_k_pipe.consumer_buffer(i), decay, stage, c)  # [SB, C]
                M, m = decay_state(M, m, decay, stage, c)
                M = warpgroup_mma(Fk, args.v_pipe.consumer_buffer(i), M, is_async=True)
                if c.is_global:
                    m = warpgroup_mma(Fk, ones.permute((1, 0)), m, is_async=True)
                M, m = warpgroup_mma_wait(0, (M, m))
                args.phi_k_pipe.consumer_release(i)
                args.v_pipe.consumer_release(i)
                release_decay(decay, i, c)


@gluon.jit
def mma_partition(args, den, c: gl.constexpr):
    """``num = Fq M + tril(Fq Fk^T) V`` and ``den = Fq m + tril(Fq Fk^T) 1``."""
    program, decay, state_pipe = args.program, args.decay, args.state_pipe
    staging = gl.allocate_shared_memory(gl.bfloat16, [c.C, c.BV], shared_layout(c.C, c.BV))
    feature_rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.SB))
    value_rows: gl.constexpr = gl.SliceLayout(1, wgmma_layout(c.BV))
    for i in range(program.num_chunks):
        t = program.start + i * c.C
        stage = wait_decay(decay, i, c)
        for g in gl.static_range(c.G):
            A = gl.zeros([c.C, c.C], gl.float32, wgmma_layout(c.C))
            num = gl.zeros([c.C, c.BV], gl.float32, wgmma_layout(c.BV))
            total = gl.zeros([c.C], gl.float32, feature_rows)
            for block in range(c.NSB):
                state_turn = i * c.NSB + block if c.causal else block
                state_stage = state_pipe.consumer_wait(state_turn)
                j = (i * c.G + g) * c.NSB + block
                Fq = args.phi_q_pipe.consumer_buffer(j)  # [C, SB]
                if c.causal:
                    Fk = args.phi_k_pipe.consumer_buffer(i * c.NSB + block)  # [C, SB]
                    A = warpgroup_mma(Fq, Fk.permute((1, 0)), A, is_async=True)
                num = warpgroup_mma(Fq, state_pipe.values.index(state_stage), num, is_async=True)
                if c.is_global:
                    m = state_pipe.mass.index(state_stage).load(gl.SliceLayout(0, wgmma_layout(c.SB)))  # [SB]
                    total += gl.sum(Fq.load(wgmma_layout(c.SB)).to(gl.float32) * m[None, :], 1)
                A, num = warpgroup_mma_wait(0, (A, num))
                args.phi_q_pipe.consumer_release(j)
                if c.causal and g == c.G - 1:
                    state_pipe.consumer_release(state_turn)
                    args.phi_k_pipe.consumer_release(i * c.NSB + block)
            if c.causal:
                A = round_to_bf16(causal_decay(A, decay, stage, c))
                num = decay_rows_from_start(num, decay, stage, wgmma_layout(c.BV), c)
                num = warpgroup_mma(to_lhs(A, lhs_layout(c.BV)), args.v_pipe.consumer_buffer(i), num, is_async=True)
            if c.is_global:
                total = decay_vector_from_start(total, decay, stage, feature_rows, c)
                total = gl.convert_layout(total + gl.sum(A, 1), value_rows)
                stored = gl.where(program.value_block == 0, program.end - t, 0)  # by one of the programs
                store_scalars(den, total, program.b, t, program.h * c.G + g, stored, value_rows, c)
            num = warpgroup_mma_wait(0, (num,))
            if c.causal and g == c.G - 1:
                args.v_pipe.consumer_release(i)
                release_decay(decay, i, c)
            if c.is_global:
                num *= inverse_den(total)[:, None]
            tma_store(args.out_descs[g], t, staging, num, program.value_block * c.BV)
    tma.store_wait(0)
