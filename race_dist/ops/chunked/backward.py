"""The backward pass: a reverse scan over the tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.hashing import bucket_signs
from race_dist.ops.chunked.forward import read_features, read_out, weigh_pairs
from race_dist.ops.chunked.loading import HashedRows, LoadedTile, load_tile, put_queries, repeat_per_query_head, take_queries
from race_dist.ops.chunked.states import add_per_chunk, chunk_states, select_per_chunk, to_augmented, to_sketch
from race_dist.ops.chunked.tiling import Tiling
from race_dist.ops.inputs import (
    BUCKET_EPS,
    AttentionInputs,
    ForwardResult,
    GradBuffers,
    Gradients,
    Started,
    den_floor,
    document_ids,
)
from race_dist.sketch import SketchState


class _Partial(NamedTuple):
    """Arguments of :func:`start_backward`, from which :func:`finish_backward` computes everything again."""

    inputs: AttentionInputs
    saved: ForwardResult
    dout: Tensor
    need_planes: bool
    grad_buffers: GradBuffers


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
    sums = _GradientSums(inputs, need_planes, need_beta, GradBuffers.empty_like(inputs))
    return _backward(inputs, saved, dout, dfinal, sums)


def start_backward(
    inputs: AttentionInputs,
    saved: ForwardResult,
    dout: Tensor,
    *,
    need_planes: bool,
    grad_buffers: GradBuffers | None = None,
) -> Started:
    """The gradient of the initial state for a gradient of 0 of the final state, alone."""
    partial = _Partial(inputs, saved, dout, need_planes, grad_buffers or GradBuffers.empty_like(inputs))
    running = to_augmented(inputs, None)
    if not inputs.causal:
        for tile in Tiling(inputs):
            queries = _query_gradient(inputs, load_tile(inputs, tile), select_per_chunk(saved.states, tile), saved, dout)
            add_per_chunk(running, queries.dstate, tile)
        return Started(to_sketch(inputs, running), partial)
    dinitial = torch.zeros_like(running) if inputs.cu_seqlens is not None else None
    running, dfinal = running[:1] if dinitial is not None else running, torch.zeros_like(running)
    for tile in reversed(Tiling(inputs)):
        loaded = load_tile(inputs, tile)
        state = chunk_states(inputs, loaded, saved.states[tile.index])
        dstate = _query_gradient(inputs, loaded, state.before, saved, dout).dstate
        running, _ = _reverse_step(loaded, dstate, running, dfinal, dinitial)
    return Started(to_sketch(inputs, running if dinitial is None else dinitial), partial)


def finish_backward(started: Started, dfinal: SketchState) -> Gradients:
    """Gradients of every input, with the gradient of the final state."""
    partial: _Partial = started.partial
    sums = _GradientSums(partial.inputs, partial.need_planes, True, partial.grad_buffers)
    return _backward(partial.inputs, partial.saved, partial.dout, dfinal, sums)


def _backward(
    inputs: AttentionInputs, saved: ForwardResult, dout: Tensor, dfinal_sketch: SketchState | None, sums: _GradientSums
) -> Gradients:
    dfinal = to_augmented(inputs, dfinal_sketch)  # [rows, H, S, E] float64
    if not inputs.causal:
        for tile in Tiling(inputs):
            loaded = load_tile(inputs, tile)
            queries = _query_gradient(inputs, loaded, select_per_chunk(saved.states, tile), saved, dout)
            sums.add_queries(loaded, queries)
            add_per_chunk(dfinal, queries.dstate, tile)
        for tile in Tiling(inputs):
            loaded = load_tile(inputs, tile, queries=False)
            suffix = select_per_chunk(dfinal.to(inputs.compute_dtype), tile)
            sums.add_keys(loaded, *_inter_chunk_gradient(loaded, suffix))
        return sums.gradients(dfinal, None)

    dinitial = torch.zeros_like(dfinal) if inputs.cu_seqlens is not None else None
    running = dfinal if dinitial is None else torch.zeros_like(dfinal[:1])
    for tile in reversed(Tiling(inputs)):
        loaded = load_tile(inputs, tile)
        state = chunk_states(inputs, loaded, saved.states[tile.index])
        queries = _query_gradient(inputs, loaded, state.before, saved, dout)
        running, suffix = _reverse_step(loaded, queries.dstate, running, dfinal, dinitial)
        sums.add_queries(loaded, queries)
        sums.add_keys(loaded, *_key_gradient(loaded, queries, suffix), queries.dcumulative)
    if dinitial is None:
        dinitial = running
    else:
        # the final state of an empty document is its initial state
        dinitial += dfinal * (inputs.cu_seqlens.diff() == 0)[:, None, None, None]  # type: ignore[union-attr]
    last = (to_augmented(inputs, saved.final) * dfinal).sum((2, 3)) if inputs.log_decay is not None else None
    return sums.gradients(dinitial, last)


@dataclass
class _QueryGradient:
    """Gradients on the query side of a tile.

    Attributes:
        g: ``[B, H, n, Q, E]`` of (num, den).
        reads: ``[B, H, n, Q, S]`` weights with which queries read the state (:func:`read_features`).
        dphi: ``[B, H, n, Q, S]`` of the query features.
        dmass: ``[B, H, n, C, S]`` of the running mass ("bucket" only).
        dstate: ``[B, H, n, S, E]`` of the state before each chunk, from its own tokens.
        dcumulative: ``[B, H, n, C]`` of the cumulative log decay G_i, through the reads of token i.
    """

    g: Tensor
    reads: Tensor
    dphi: Tensor
    dmass: Tensor | None
    dstate: Tensor
    dcumulative: Tensor | None


def _query_gradient(
    inputs: AttentionInputs, loaded: LoadedTile, before: Tensor, saved: ForwardResult, dout: Tensor
) -> _QueryGradient:
    """Backward through the output of one tile, as far as its queries and the states before its chunks."""
    reads, mass = read_features(inputs, loaded, before)
    g = _numerator_gradient(inputs, loaded, before, saved, dout)
    dreads = g @ before.mT
    from_start = None if loaded.weights is None else loaded.weights.from_start
    decay = None if from_start is None else repeat_per_query_head(from_start, g)
    if decay is not None:
        dreads *= decay
    if loaded.weights is not None:
        dreads += weigh_pairs(loaded, g @ loaded.vx.mT) @ loaded.k.phi
    dstate = (reads if decay is None else reads * decay).mT @ g
    if mass is None:
        dcumulative = (reads * dreads).sum(-1) if inputs.log_decay is not None and inputs.normalization == "none" else None
        return _QueryGradient(g, reads, dreads, None, dstate, _sum_query_heads(loaded, dcumulative))
    dmass_q = -reads * dreads / mass  # each query head's share
    dcumulative = -(dmass_q * BUCKET_EPS).sum(-1) if inputs.log_decay is not None else None
    dmass = dmass_q.unflatten(3, (-1, loaded.tile.shape[1])).sum(3)
    dstate[..., -1] += (dmass if from_start is None else dmass * from_start).sum(-2)
    return _QueryGradient(g, reads, dreads / mass, dmass, dstate, _sum_query_heads(loaded, dcumulative))


def _sum_query_heads(loaded: LoadedTile, dcumulative: Tensor | None) -> Tensor | None:
    return None if dcumulative is None else dcumulative.unflatten(3, (-1, loaded.tile.shape[1])).sum(3)


def _numerator_gradient(
    inputs: AttentionInputs, loaded: LoadedTile, before: Tensor, saved: ForwardResult, dout: Tensor
) -> Tensor:
    """``[g | h]``, the gradients of num and den: ``g = do / den``, ``h = -(do . o) / den``.

    h is computed from the saved output where that has the compute dtype. A 16-bit output has lost the digits that h needs, so
    that num is computed again.
    """
    do = take_queries(inputs, loaded.tile, dout)
    if loaded.tile.valid is not None:
        do *= repeat_per_query_head(loaded.tile.valid[..., None].to(do.dtype), do)
    if inputs.normalization != "global":
        return F.pad(do, (0, 1))
    den = take_queries(inputs, loaded.tile, saved.den[..., None])
    empty = den < den_floor(den.dtype)
    inverse = den.masked_fill(empty, torch.inf).reciprocal_()
    g = do * inverse
    if saved.out.dtype == do.dtype:
        o = take_queries(inputs, loaded.tile, saved.out)
    else:
        o = read_out(inputs, loaded, before)[..., :-1] * inverse
    return torch.cat([g, -(g * o).sum(-1, keepdim=True)], -1)


def _reverse_step(
    loaded: LoadedTile, dstate: Tensor, running: Tensor, dfinal: Tensor, dinitial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One tile of the reverse scan.

    Args:
        dstate: ``[B, H, n, S, E]`` gradient of the states before the chunks, from the chunks' own tokens.
        running: ``[B, H, S, E]`` float64 gradient of the state after the tile.
        dfinal: ``[rows, H, S, E]`` gradient of the final states (packed: each is added where its document ends).
        dinitial: ``[N, H, S, E]`` gradient of the documents' initial states, added to here; None when nothing is packed.

    Returns:
        The gradient of the state before the tile, and ``[B, H, n, S, E]`` that of the chunks' sums.
    """
    weights = loaded.weights
    assert weights is not None
    ending = None
    if loaded.tile.ends is not None:
        ending = select_per_chunk(dfinal.to(dstate.dtype), loaded.tile) * loaded.tile.ends[:, None, None]
        dstate = dstate + (ending if weights.chunk_decay is None else ending * weights.chunk_decay)
    later = torch.cat([dstate, running[:, :, None].to(dstate.dtype)], 2)  # [B, H, n + 1, S, E]
    suffix = (weights.inter[..., 1:].mT @ later.flatten(3)).view_as(dstate)
    if ending is not None:
        suffix = suffix + ending
    if weights.from_initial is not None and dinitial is not None:
        add_per_chunk(dinitial, (weights.from_initial.mT @ later.flatten(3)).view_as(dstate), loaded.tile)
    local = (weights.inter[..., :-1, :1].mT @ dstate.flatten(3)).view_as(running).double()
    return weights.tile_decay * running.view_as(local) + local, suffix


def _key_gradient(loaded: LoadedTile, queries: _QueryGradient, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """``dphi(k) [B, H, n, C, S]`` and ``d[v | 1] [B, H, n, C, E]`` of a causal tile."""
    weights = loaded.weights
    assert weights is not None
    dphi, dvx = _inter_chunk_gradient(loaded, suffix)
    dphi += weigh_pairs(loaded, queries.g @ loaded.vx.mT).mT @ queries.reads
    dvx += weigh_pairs(loaded, queries.reads @ loaded.k.phi.mT).mT @ queries.g
    if queries.dmass is not None:
        dphi += weights.intra.mT @ queries.dmass
    return dphi, dvx


def _inter_chunk_gradient(loaded: LoadedTile, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values from the tokens after their chunk (not causal: from all tokens)."""
    dphi, dvx = loaded.vx @ suffix.mT, loaded.k.phi @ suffix
    if loaded.weights is not None and loaded.weights.to_end is not None:
        dphi *= loaded.weights.to_end
        dvx *= loaded.weights.to_end
    return dphi, dvx


class _GradientSums:
    """The gradients of a backward pass, accumulated tile by tile."""

    def __init__(self, inputs: AttentionInputs, need_planes: bool, need_beta: bool, grad_buffers: GradBuffers) -> None:
        self.inputs = inputs
        self.q, self.k, self.v = grad_buffers
        self.beta = torch.zeros(inputs.beta.shape, dtype=torch.float64, device=inputs.q.device) if need_beta else None
        self.planes = torch.zeros(inputs.planes.shape, dtype=torch.float64, device=inputs.q.device) if need_planes else None
        # gradient of the cumulative log decay G_i
        self.dcumulative = None if inputs.log_decay is None else inputs.q.new_zeros(inputs.log_decay.shape, dtype=torch.float64)
        self.signs = bucket_signs(inputs.planes.shape[2], dtype=inputs.compute_dtype, device=inputs.q.device)

    def add_queries(self, loaded: LoadedTile, queries: _QueryGradient) -> None:
        assert loaded.q is not None
        dx = self._hash_backward(loaded.q, queries.dphi)
        put_queries(loaded.tile, self.q, dx.unflatten(2, queries.dphi.shape[2:4]))

    def add_keys(self, loaded: LoadedTile, dphi: Tensor, dvx: Tensor, dcumulative: Tensor | None = None) -> None:
        dx = self._hash_backward(loaded.k, dphi)
        loaded.tile.put(self.k, dx.unflatten(2, dphi.shape[2:4]))
        loaded.tile.put(self.v, dvx[..., :-1])
        if self.dcumulative is not None:
            column = -(loaded.k.phi * dphi).sum(-1)
            loaded.tile.put(self.dcumulative, column if dcumulative is None else column + dcumulative)

    def _hash_backward(self, rows: HashedRows, dphi: Tensor) -> Tensor:
        """Backward through the soft hash: the gradient of rows ``[B, H, n * N, D]`` from that of features ``[B, H, n, N, S]``.

        Adds to the gradients of beta and the planes.
        """
        inputs, dtype = self.inputs, rows.x.dtype
        _, tables, number, dim = inputs.planes.shape
        weighted = (rows.phi * dphi).flatten(2, 3).unflatten(-1, (tables, -1))  # [B, H, N, L, R]
        phi = rows.phi.flatten(2, 3).unflatten(-1, (tables, -1))
        dlogit = weighted - phi * weighted.sum(-1, keepdim=True)
        du = dlogit @ self.signs  # [B, H, N, L, P], before beta
        if self.beta is not None:
            self.beta += (rows.u * du).sum((0, 2, 3, 4), dtype=torch.float64)
        du *= inputs.beta.to(dtype)[:, None, None, None] * (1 - rows.u * rows.u)
        du = du.flatten(3)  # [B, H, N, L P]
        if self.planes is not None:
            self.planes += (du.mT @ rows.x).sum(0, dtype=torch.float64).view(-1, tables, number, dim)
        return du @ inputs.planes.to(dtype).flatten(1, 2)

    def gradients(self, dinitial: Tensor, last: Tensor | None) -> Gradients:
        """All gradients; ``last [rows, H]`` is the gradient of G at each row's last token through the final state."""
        inputs = self.inputs
        log_decay = None
        if self.dcumulative is not None and last is not None and inputs.log_decay is not None:
            log_decay = _decay_gradient(inputs, self.dcumulative, last).to(inputs.log_decay.dtype)
        initial = None if inputs.initial is None else to_sketch(inputs, dinitial)
        return Gradients(
            self.q,
            self.k,
            self.v,
            None if self.planes is None else self.planes.to(inputs.planes.dtype),
            None if self.beta is None else self.beta.to(inputs.beta.dtype),
            log_decay,
            initial,
        )


def _decay_gradient(inputs: AttentionInputs, dcumulative: Tensor, last: Tensor) -> Tensor:
    """``dlog_decay_t = sum over i >= t of dG_i`` inside each document, float64."""
    suffix = dcumulative.flip(1).cumsum(1).flip(1)
    if inputs.cu_seqlens is None:
        return suffix + last[:, None]
    document = document_ids(inputs.cu_seqlens, dcumulative.shape[1])
    beyond = F.pad(suffix, (0, 0, 0, 1))[:, inputs.cu_seqlens[1:]]  # the sums of later documents
    return suffix - beyond[:, document] + last[document]
