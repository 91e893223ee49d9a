"""The backward pass: a pass over the queries, the reverse scan over the tiles, a pass over the keys."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from race_dist.kernels import partial_gradients, tile_sums
from race_dist.kernels.arguments import KeyGradients, QueryGradients, Residuals, Sketch, TileStates, rows, scalars
from race_dist.ops import device
from race_dist.ops.inputs import AttentionInputs, ForwardResult, GradBuffers, Gradients, Started
from race_dist.ops.triton.launch import KernelCall
from race_dist.ops.triton.plan import PIPELINE_BLOCK, is_decoding, plan_call
from race_dist.sketch import SketchState


def backward(
    inputs: AttentionInputs,
    saved: ForwardResult,
    dout: Tensor,
    dfinal: SketchState | None,
    *,
    need_planes: bool,
    need_beta: bool = True,
) -> Gradients:
    """Gradients of every input, from those of the output and of the final state."""
    return _key_pass(_query_pass(inputs, saved, dout, need_planes, GradBuffers.empty_like(inputs)), dfinal, need_beta)


def start_backward(
    inputs: AttentionInputs,
    saved: ForwardResult,
    dout: Tensor,
    *,
    need_planes: bool,
    grad_buffers: GradBuffers | None = None,
) -> Started:
    """The gradient of the initial state for a gradient of 0 of the final state, and the pass over the queries."""
    queries = _query_pass(inputs, saved, dout, need_planes, grad_buffers or GradBuffers.empty_like(inputs))
    return Started(queries.call.total(queries.sums, None, reverse=True), queries)


def finish_backward(started: Started, dfinal: SketchState) -> Gradients:
    """Gradients of every input, with the gradient of the final state."""
    return _key_pass(started.partial, dfinal, need_beta=True)


class _QueryPass(NamedTuple):
    """Results of the pass over the queries, which has written dq.

    Attributes:
        h: ``[B, T, Hq]`` gradient of the denominators, or None.
        dcumulative: ``[B, T, H]`` the queries' part of the gradient of the cumulative log decay, or None.
        sums: ``[tiles, H, S (Dv + 1)]`` each tile's part of the suffix state.
    """

    call: BackwardCall
    saved: ForwardResult
    dout: Tensor
    grad_buffers: GradBuffers
    h: Tensor | None
    dcumulative: Tensor | None
    sums: Tensor


def _query_pass(
    inputs: AttentionInputs, saved: ForwardResult, dout: Tensor, need_planes: bool, grad_buffers: GradBuffers
) -> _QueryPass:
    read = (saved.den, saved.states, saved.final.values, saved.final.mass)
    call = BackwardCall(inputs, need_planes, (dout, *grad_buffers), read)
    saved = call.with_states(saved)
    blocks = call.plan["bwd_dq"].spec.NVB
    h = None
    if inputs.normalization == "global":  # tokens adjacent: the pass over the keys reads h along a row of pairs
        h = inputs.q.new_empty(inputs.q.shape[0], inputs.q.shape[2] * blocks, inputs.q.shape[1], dtype=torch.float32)
        h = h.transpose(1, 2)
    dcumulative = None
    if inputs.log_decay is not None and inputs.normalization != "global":
        dcumulative = inputs.q.new_empty(*inputs.q.shape[:2], call.heads * blocks, dtype=torch.float32)
    sums = call.new_states(call.num_tiles)
    target = call.gradient_target(grad_buffers.q)
    suffix = TileStates(sums, call.decays)
    call.launch(
        "bwd_dq",
        call.kernel("bwd_dq"),
        call.kernel_inputs,
        rows(dout),
        _residuals(saved),
        QueryGradients(
            rows(target), scalars(h), scalars(dcumulative), suffix, call.dbeta[QUERIES], call.kernel_dplanes(QUERIES)
        ),
        programs=blocks,
    )
    call.finish_gradient(target, grad_buffers.q, inputs.q, QUERIES)
    blocks = call.plan["tile_sums_bwd"].spec.NSB
    if call.plan.recurrent and (blocks > 1 or not call.plan.pipelined):
        call.launch(
            "tile_sums_bwd",
            tile_sums.race_tile_sums_bwd_kernel,
            call.kernel_inputs,
            rows(dout),
            scalars(saved.den),
            scalars(call.sum_value_blocks(h)),
            suffix,
            programs=blocks,
        )
    return _QueryPass(call, saved, dout, grad_buffers, h, dcumulative, sums)


def _key_pass(queries: _QueryPass, dfinal: SketchState | None, need_beta: bool) -> Gradients:
    """The reverse scan, and the pass over the keys that writes dk and dv."""
    call, saved, dout, grad_buffers, h, dcumulative, sums = queries
    inputs = call.inputs
    suffixes, dinitial = call.scan(sums, dfinal, inputs.initial is not None, reverse=True)
    blocks = call.plan["bwd_dkv"].spec.NVB
    dlog_decay = None
    if inputs.log_decay is not None:
        dlog_decay = inputs.q.new_empty(*inputs.k.shape[:2], blocks * call.heads, dtype=torch.float32)
    target = call.gradient_target(grad_buffers.k)
    call.launch(
        "bwd_dkv",
        call.kernel("bwd_dkv"),
        call.kernel_inputs,
        rows(dout),
        _residuals(saved),
        scalars(h),
        scalars(dcumulative),
        suffixes,
        KeyGradients(rows(target), rows(grad_buffers.v), scalars(dlog_decay), call.dbeta[KEYS], call.kernel_dplanes(KEYS)),
        programs=blocks,
    )
    call.finish_gradient(target, grad_buffers.k, inputs.k, KEYS)
    dlog_decay = call.sum_value_blocks(dlog_decay)
    if dlog_decay is not None and inputs.log_decay is not None:
        dlog_decay = dlog_decay.to(inputs.log_decay.dtype)
    dplanes = call.planes_gradient() if call.need_planes else None
    dbeta = call.dbeta.sum((0, 1, 3)) if need_beta else None
    return Gradients(*grad_buffers, dplanes, dbeta, dlog_decay, dinitial)


def _residuals(saved: ForwardResult) -> Residuals:
    """The results of the forward pass as kernels take them."""
    return Residuals(scalars(saved.den), saved.states, Sketch(saved.final.values, saved.final.mass))


QUERIES, KEYS = 0, 1  # index of a pass in the partial gradients of beta and the planes


class BackwardCall(KernelCall):
    """A backward pass, with the partial gradients of beta and the planes that its programs write."""

    def __init__(self, inputs: AttentionInputs, need_planes: bool, moved: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> None:
        super().__init__(inputs, need_planes, moved, read)
        self.need_planes = need_planes
        self.dplanes: list[Tensor | None] = [None, None]  # [tiles, H, blocks, LPB, BD] of each pass
        if need_planes:
            spec = self.plan["bwd_dkv"].spec
            for index, blocks in enumerate((spec.G, 1) if spec.pipelined else (spec.NSB, spec.NSB)):
                shape = (self.num_tiles, self.heads, blocks, spec.LPB, spec.BD)
                self.dplanes[index] = inputs.q.new_empty(shape, dtype=torch.float32)

    @cached_property
    def dbeta(self) -> Tensor:
        """``[2, tiles, H, NVB]``: each program's part of the gradient of beta, of the two passes."""
        blocks = self.plan["bwd_dkv"].spec.NVB
        return self.inputs.q.new_empty(2, self.num_tiles, self.heads, blocks, dtype=torch.float32)

    def with_states(self, saved: ForwardResult) -> ForwardResult:
        """With the states before this call's tiles, computed again where the forward pass had other tiles (or none)."""
        inputs = self.inputs
        if is_decoding(inputs):
            return saved._replace(states=self.prefix_states()[0])
        if not inputs.causal or inputs.features <= PIPELINE_BLOCK:  # every kernel family has the same tiles
            return saved
        tma = device.supports_tma(inputs.q, inputs.k, inputs.v, saved.out)
        used, announced = (plan_call(inputs, False, tma=t).tile for t in (tma, True))
        return saved if self.plan.tile == used == announced else saved._replace(states=self.prefix_states()[0])

    def gradient_target(self, dx: Tensor) -> Tensor:
        """Where a kernel writes the gradient of its rows: ``dx``, or the gradient of the projections
        ``[B, T, NVB * heads, LPB]``, from which :meth:`finish_gradient` computes dx."""
        spec = self.plan["bwd_dkv"].spec
        if not spec.PARTIAL_GRADIENTS:
            return dx
        return dx.new_empty(*dx.shape[:2], spec.NVB * dx.shape[2], spec.LPB, dtype=torch.float32)

    def finish_gradient(self, target: Tensor, dx: Tensor, x: Tensor, index: int) -> None:
        """Write the gradient dx of the rows x, where it is not written yet, and with it the planes' of this pass."""
        if target is dx:
            return
        group = x.shape[2] // self.heads
        self.launch(
            "bwd_dkv",
            partial_gradients.race_unproject_kernel,
            rows(target),
            rows(dx),
            rows(x),
            self.kernel_inputs.planes,
            self.dplanes[index],
            group,
            programs=group,
            of="qk"[index],
        )

    def sum_value_blocks(self, x: Tensor | None) -> Tensor | None:
        """``[B, T, H]`` from the parts ``[B, T, NVB H]`` of blocks of value columns."""
        blocks = self.plan["bwd_dkv"].spec.NVB
        return x if x is None or blocks == 1 else x.unflatten(2, (blocks, -1)).sum(2)

    def kernel_dplanes(self, index: int) -> Tensor | None:
        """The partial gradients of the planes that a kernel writes; None for a pipeline, which writes none."""
        return None if self.plan.pipelined else self.dplanes[index]

    def planes_gradient(self) -> Tensor:
        """``[Hkv, L, P, D]`` from the programs' parts."""
        inputs, spec = self.inputs, self.plan["bwd_dkv"].spec
        _, tables, planes, dim = inputs.planes.shape
        passes = [part.sum(0, dtype=torch.float64) for part in self.dplanes if part is not None]
        if spec.pipelined:  # all planes in one block; one block per query head of the group
            both = passes[QUERIES].sum(1) + passes[KEYS].sum(1)
            return both[:, : tables * planes, :dim].unflatten(1, (tables, planes)).to(inputs.planes.dtype)
        parts = torch.stack(passes).sum(0)
        # [H, block, LPB, BD] -> [H, block, tables of a block, P, D]
        parts = parts[:, :, : min(spec.TABLES_PER_BLOCK, tables) * planes, :dim].unflatten(2, (-1, planes))
        if spec.R > spec.SB:  # several blocks share a table
            parts = parts.unflatten(1, (tables, -1)).sum(2)
        return parts.flatten(1, 2)[:, :tables].to(inputs.planes.dtype)
