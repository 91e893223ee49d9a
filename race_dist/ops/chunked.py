"""The attention in chunks, in plain PyTorch: exact, linear in T, on any device.

A chunk's tokens meet each other in a ``[C, C]`` product and everything before them through the state, so nothing of
shape ``[T, S]`` or ``[T, T]`` ever exists; features are recomputed wherever they are needed. States are kept in
augmented form, ``[S, E]`` with ``E = Dv + 1``: the sketch's values, and its mass as one more column, read and written by
the value rows ``[v | 1]``. The state that runs along the tiles is float64: its sums lose no digits at any length.
Shapes inside: B batch, H key/value heads, n chunks, C tokens a chunk, Q = Hq / Hkv * C query rows a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.hashing import bucket_probabilities, bucket_signs, project
from race_dist.ops.inputs import (
    BUCKET_EPS,
    AttentionInputs,
    ForwardResult,
    Gradients,
    Into,
    Started,
    den_floor,
    document_ids,
    total_log_decay,
)
from race_dist.ops.tiling import Links, Tile, Tiling, links
from race_dist.sketch import SketchState


def forward(p: AttentionInputs, out: Tensor | None = None, begun: Started | None = None) -> ForwardResult:
    """Output (in ``out`` if given), denominators, the states before each tile (causal) or the totals, the final state."""
    if out is None:
        out = p.q.new_empty(*p.q.shape[:3], p.v.shape[3])
    den = p.q.new_empty(p.q.shape[:3] if p.normalization == "global" else 0, dtype=p.compute_dtype)
    tiling = Tiling(p)
    if p.causal:
        states, final = _walk(p, tiling, out, den)
    else:
        _, final = _walk(p, tiling)
        states = final.to(p.compute_dtype)
        for tile in tiling:
            work = _load(p, tile)
            _emit(p, work, _read_out(p, work, _of_chunks(states, tile)), out, den)
    return ForwardResult(out, den, states, _sketch(p, final))


def start_forward(p: AttentionInputs, out: Tensor | None = None) -> Started:
    """The final state alone."""
    return Started(_sketch(p, _walk(p, Tiling(p))[1]), None)


def backward(
    p: AttentionInputs,
    saved: ForwardResult,
    dout: Tensor,
    dfinal: SketchState | None,
    *,
    need_planes: bool,
    need_beta: bool = True,
    into: Into | None = None,
    begun: Started | None = None,
) -> Gradients:
    """Gradients of every input (those of q, k, v ``into`` tensors if given), from those of the output and final state."""
    arriving = _augmented(p, dfinal)  # [rows, H, S, E] float64
    totals = _Totals(p, need_planes, need_beta, into or Into(*(torch.empty_like(x) for x in (p.q, p.k, p.v))))
    if not p.causal:
        for tile in Tiling(p):
            work = _load(p, tile)
            rows = _query_gradient(p, work, _of_chunks(saved.states, tile), saved, dout)
            totals.query_side(work, rows)
            _add_to_rows(arriving, rows.dstate, tile)
        for tile in Tiling(p):
            work = _load(p, tile, queries=False)
            totals.key_side(work, *_from_suffix(work, _of_chunks(arriving.to(p.compute_dtype), tile)))
        return totals.gradients(arriving, None)

    tiling = Tiling(p)
    dinitial = torch.zeros_like(arriving) if p.cu_seqlens is not None else None
    running = arriving if dinitial is None else torch.zeros_like(arriving[:1])
    for tile in reversed(tiling):
        work = _load(p, tile)
        state = _states(p, work, saved.states[tile.index])
        rows = _query_gradient(p, work, state.before, saved, dout)
        running, suffix = _pull(p, work, state, rows.dstate, running, arriving, dinitial)
        totals.query_side(work, rows)
        totals.key_side(work, *_key_gradient(p, work, rows, suffix), rows.row)
    if dinitial is None:
        dinitial = running
    else:
        # a document without tokens hands its state through
        dinitial += arriving * (p.cu_seqlens.diff() == 0)[:, None, None, None]  # type: ignore[union-attr]
    last = (_augmented(p, saved.final) * arriving).sum((2, 3)) if p.log_decay is not None else None
    return totals.gradients(dinitial, last)


def start_backward(
    p: AttentionInputs, saved: ForwardResult, dout: Tensor, *, need_planes: bool, into: Into | None = None
) -> Started:
    """The gradient of the initial state when that of the final state is 0, alone."""
    running = torch.zeros(p.num_states, p.k.shape[2], p.features, p.v.shape[3] + 1, dtype=torch.float64, device=p.q.device)
    if not p.causal:
        for tile in Tiling(p):
            rows = _query_gradient(p, _load(p, tile), _of_chunks(saved.states, tile), saved, dout)
            _add_to_rows(running, rows.dstate, tile)
        return Started(_sketch(p, running), None)
    dinitial = torch.zeros_like(running) if p.cu_seqlens is not None else None
    running, nothing = running[:1] if dinitial is not None else running, torch.zeros_like(running)
    for tile in reversed(Tiling(p)):
        work = _load(p, tile)
        state = _states(p, work, saved.states[tile.index])
        dstate = _query_gradient(p, work, state.before, saved, dout).dstate
        running, _ = _pull(p, work, state, dstate, running, nothing, dinitial)
    return Started(_sketch(p, running if dinitial is None else dinitial), None)


def states_shape(p: AttentionInputs) -> tuple[int, ...]:
    """Of ``Forward.states``: the state before each tile, or the totals."""
    shape = (p.k.shape[2], p.features, p.v.shape[3] + 1)
    return (Tiling(p).num_tiles, p.q.shape[0], *shape) if p.causal else (p.num_states, *shape)


def unsupported(p: AttentionInputs) -> str | None:
    """Always None: this backend computes every problem, on any device."""
    return None


# --- one tile's inputs -------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Rows of one tile and their features. x ``[B, H, N, D]``, u ``[B, H, N, L, P]``, phi ``[B, H, n, N / n, S]``."""

    x: Tensor
    u: Tensor
    phi: Tensor


@dataclass
class _Work:
    """One tile, loaded: features of queries (None where not asked) and keys, value rows ``vx [B, H, n, C, E]``."""

    tile: Tile
    link: Links | None
    q: _Rows | None
    k: _Rows
    vx: Tensor

    @property
    def phi_q(self) -> Tensor:
        assert self.q is not None
        return self.q.phi


def _load(p: AttentionInputs, tile: Tile, *, queries: bool = True) -> _Work:
    dtype = p.compute_dtype
    k = _hash(p, tile.take(p.k, dtype))
    keep = tile.valid
    if p.key_mask is not None:
        mask = tile.take(p.key_mask[..., None], torch.bool)  # [B, 1, n, C]
        keep = mask if keep is None else mask & keep
    if keep is not None:
        k.phi *= keep[..., None]
    vx = F.pad(tile.take(p.v, dtype), (0, 1), value=1.0)
    return _Work(tile, links(p, tile) if p.causal else None, _hash(p, _take_queries(p, tile, p.q)) if queries else None, k, vx)


def _hash(p: AttentionInputs, x: Tensor) -> _Rows:
    rows = x.flatten(2, 3)
    u = project(rows, p.planes.to(rows.dtype)).tanh_()
    phi = bucket_probabilities(2 * p.beta.to(rows.dtype)[:, None, None, None] * u).flatten(-2)
    return _Rows(rows, u, phi.unflatten(2, x.shape[2:4]))


def _take_queries(p: AttentionInputs, tile: Tile, x: Tensor) -> Tensor:
    """``x [B, T, Hq, ...]`` as ``[B, Hkv, n, Q, ...]``: the query heads of a key/value head, one after the other."""
    part = tile.take(x, p.compute_dtype).unflatten(1, (p.k.shape[2], -1))
    return part.movedim(2, 3).flatten(3, 4)


def _put_queries(tile: Tile, target: Tensor, part: Tensor) -> None:
    """The inverse of :func:`_take_queries`."""
    part = part.unflatten(3, (-1, tile.shape[1])).movedim(3, 2)
    tile.put(target, part.flatten(1, 2))


def _by_query(weight: Tensor, like: Tensor) -> Tensor:
    """Weights of a chunk's tokens ``[..., C, x]``, repeated for the query heads: ``[..., Q, x]``."""
    repeats = like.shape[-2] // weight.shape[-2]
    return weight if repeats == 1 else weight.repeat(*(1,) * (weight.dim() - 2), repeats, 1)


# --- states ------------------------------------------------------------------------------------------------------------


@dataclass
class _States:
    """``sums [B, H, n, S, E]`` of each chunk, ``before [B, H, n, S, E]`` the state before it."""

    sums: Tensor
    before: Tensor


def _sketch(p: AttentionInputs, state: Tensor) -> SketchState:
    state = state.to(p.state_dtype)
    mass, values = (part.clone(memory_format=torch.contiguous_format) for part in (state[..., -1], state[..., :-1]))
    return SketchState.unchecked(mass, values, total_log_decay(p))


def _augmented(p: AttentionInputs, state: SketchState | None) -> Tensor:
    """``[values | mass]`` as float64; zeros for None."""
    if state is None:
        return torch.zeros(p.num_states, p.k.shape[2], p.features, p.v.shape[3] + 1, dtype=torch.float64, device=p.q.device)
    return torch.cat([state.values, state.mass[..., None]], -1).double()


def _of_chunks(state: Tensor, tile: Tile) -> Tensor:
    """The state of each chunk's row or document, ``[B, H, n or 1, S, E]``."""
    return state[:, :, None] if tile.document is None else state[tile.document].transpose(0, 1)[None]


def _add_to_rows(target: Tensor, chunks: Tensor, tile: Tile) -> None:
    """Add ``[B, H, n, S, E]``, one a chunk, to its row or document of ``target``."""
    if tile.document is None:
        target += chunks.sum(2)
    else:
        target.index_add_(0, tile.document, chunks[0].transpose(0, 1).to(target.dtype))


def _states(p: AttentionInputs, work: _Work, entering: Tensor) -> _States:
    """The chunks' sums and the states before them, from the state that enters the tile ``[B, H, S, E]``."""
    link = work.link
    assert link is not None
    sums = (work.k.phi if link.exit is None else work.k.phi * link.exit).mT @ work.vx
    sources = torch.cat([entering[:, :, None].to(sums.dtype), sums[:, :, :-1]], 2)
    before = (link.sources[..., :-1, :-1] @ sources.flatten(3)).view_as(sums)
    if link.begin is not None and p.initial is not None:
        injected = _of_chunks(_augmented(p, p.initial).to(sums.dtype), work.tile)
        before += (link.begin[..., :-1, :] @ injected.flatten(3)).view_as(sums)
    return _States(sums, before)


def _leave(p: AttentionInputs, work: _Work, state: _States, entering: Tensor) -> Tensor:
    """The float64 state after the tile, ``[B, H, S, E]``."""
    link = work.link
    assert link is not None
    local = (link.sources[..., -1:, 1:] @ state.sums.flatten(3)).view_as(entering).double()
    if link.begin is not None and p.initial is not None:
        injected = _of_chunks(_augmented(p, p.initial), work.tile)
        local += (link.begin[..., -1:, :].double() @ injected.flatten(3)).view_as(entering)
    return link.across * entering.view_as(local) + local


def _walk(p: AttentionInputs, tiling: Tiling, out: Tensor | None = None, den: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Along the tiles, carrying the state; writes outputs where asked.

    Returns:
        The states before each tile ``[tiles, B, H, S, E]`` (with outputs) and the final state ``[rows, H, S, E]``.
    """
    final = _augmented(p, p.initial)
    running = final if p.cu_seqlens is None else torch.zeros_like(final[:1])
    entries = []
    for tile in tiling:
        work = _load(p, tile, queries=out is not None)
        if not p.causal:
            _add_to_rows(final, work.k.phi.mT @ work.vx, tile)
            continue
        entries.append(running.to(p.compute_dtype))
        state = _states(p, work, entries[-1])
        if out is not None and den is not None:
            _emit(p, work, _read_out(p, work, state.before), out, den)
        running = _leave(p, work, state, running)
        if tile.ends is not None:
            final[tile.document[tile.ends]] = _after(work, state)[0].transpose(0, 1)[tile.ends].double()  # type: ignore[index]
    none = running.new_empty(0, *running.shape, dtype=p.compute_dtype)
    states = torch.stack(entries) if entries and out is not None else none
    return states, running if p.causal and p.cu_seqlens is None else final


def _after(work: _Work, state: _States) -> Tensor:
    """The state after each chunk."""
    assert work.link is not None
    through = work.link.through
    return state.sums + (state.before if through is None else through * state.before)


# --- the forward formula -------------------------------------------------------------------------------------------------


def _read_features(p: AttentionInputs, work: _Work, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a query reads buckets with: its features, or for "bucket" its features over (mass + eps); and that sum."""
    if p.normalization != "bucket":
        return work.phi_q, None
    mass = before[..., None, :, -1]  # [B, H, n, 1, S]
    if work.link is not None:
        mass = work.link.pair @ work.k.phi + (mass if work.link.entry is None else work.link.entry * mass)
    mass = _by_query(mass, work.phi_q) + BUCKET_EPS if work.link is not None else mass + BUCKET_EPS
    return work.phi_q / mass, mass


def _read_out(p: AttentionInputs, work: _Work, before: Tensor) -> Tensor:
    """The read-out before it is divided, ``[B, H, n, Q, E]``; its last column is the denominator."""
    reads, _ = _read_features(p, work, before)
    num = reads @ before
    if work.link is not None:
        if work.link.entry is not None:
            num *= _by_query(work.link.entry, num)
        num += _paired(work, reads @ work.k.phi.mT) @ work.vx
    return num


def _paired(work: _Work, products: Tensor) -> Tensor:
    """Products of a chunk's queries and keys ``[B, H, n, Q, C]``, weighted by what sees what; in place."""
    assert work.link is not None
    products.unflatten(3, (-1, products.shape[-1])).mul_(work.link.pair[..., None, :, :])
    return products


def _emit(p: AttentionInputs, work: _Work, num: Tensor, out: Tensor, den: Tensor) -> None:
    """Divide and write."""
    result = num[..., :-1]
    if p.normalization == "global":
        weight = num[..., -1:]
        empty = weight < den_floor(weight.dtype)
        result = (result / weight.masked_fill(empty, 1.0)).masked_fill_(empty, 0.0)
        _put_queries(work.tile, den, weight[..., 0])
    _put_queries(work.tile, out, result)


# --- the backward formula ------------------------------------------------------------------------------------------------


@dataclass
class _QueryGradient:
    """Gradients on the query side of a tile.

    ``g [B, H, n, Q, E]``: of (num, den). ``reads``: see :func:`_read_features`. ``dphi [B, H, n, Q, S]``: of the query
    features. ``dmass [B, H, n, C, S]``: of the running mass ("bucket" only). ``dstate [B, H, n, S, E]``: of the state
    before each chunk, from its own tokens. ``row [B, H, n, C]``: of G_i through what token i reads.
    """

    g: Tensor
    reads: Tensor
    dphi: Tensor
    dmass: Tensor | None
    dstate: Tensor
    row: Tensor | None


def _query_gradient(p: AttentionInputs, work: _Work, before: Tensor, saved: ForwardResult, dout: Tensor) -> _QueryGradient:
    reads, mass = _read_features(p, work, before)
    g = _numerator_gradient(p, work, before, saved, dout)
    dreads = g @ before.mT
    entry = None if work.link is None or work.link.entry is None else _by_query(work.link.entry, g)
    if entry is not None:
        dreads *= entry
    if work.link is not None:
        dreads += _paired(work, g @ work.vx.mT) @ work.k.phi
    dstate = (reads if entry is None else reads * entry).mT @ g
    if mass is None:
        row = (reads * dreads).sum(-1) if p.log_decay is not None and p.normalization == "none" else None
        return _QueryGradient(g, reads, dreads, None, dstate, _over_heads(work, row))
    dmass_q = -reads * dreads / mass  # each query head's share
    row = -(dmass_q * BUCKET_EPS).sum(-1) if p.log_decay is not None else None
    dmass = dmass_q.unflatten(3, (-1, work.tile.shape[1])).sum(3)
    entered = dmass if work.link is None or work.link.entry is None else dmass * work.link.entry
    dstate[..., -1] += entered.sum(-2)
    return _QueryGradient(g, reads, dreads / mass, dmass, dstate, _over_heads(work, row))


def _over_heads(work: _Work, row: Tensor | None) -> Tensor | None:
    return None if row is None else row.unflatten(3, (-1, work.tile.shape[1])).sum(3)


def _numerator_gradient(p: AttentionInputs, work: _Work, before: Tensor, saved: ForwardResult, dout: Tensor) -> Tensor:
    """``[g | h]``, the gradients of num and den: ``g = do / den``, ``h = -(do . o) / den``.

    h is taken from the saved output where that has the working precision; a 16-bit output has lost the digits that h
    needs, and num is computed again.
    """
    do = _take_queries(p, work.tile, dout)
    if work.tile.valid is not None:
        do *= _by_query(work.tile.valid[..., None].to(do.dtype), do)
    if p.normalization != "global":
        return F.pad(do, (0, 1))
    den = _take_queries(p, work.tile, saved.den[..., None])
    empty = den < den_floor(den.dtype)
    inverse = den.masked_fill(empty, torch.inf).reciprocal_()
    g = do * inverse
    if saved.out.dtype == do.dtype:
        o = _take_queries(p, work.tile, saved.out)
    else:
        o = _read_out(p, work, before)[..., :-1] * inverse
    return torch.cat([g, -(g * o).sum(-1, keepdim=True)], -1)


def _pull(
    p: AttentionInputs, work: _Work, state: _States, dstate: Tensor, running: Tensor, arriving: Tensor, dinitial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One tile of the suffix walk.

    Args:
        dstate: ``[B, H, n, S, E]`` gradient of the states before the chunks, from the chunks' own tokens.
        running: ``[B, H, S, E]`` float64 gradient of the state after the tile.
        arriving: ``[rows, H, S, E]`` gradient of the final states (documents: enters where each ends).
        dinitial: ``[N, H, S, E]`` gradient of the documents' initial states, added to here; None when nothing is packed.

    Returns:
        The gradient of the state before the tile, and ``[B, H, n, S, E]`` that of the chunks' sums.
    """
    link = work.link
    assert link is not None
    ending = None
    if work.tile.ends is not None:
        ending = _of_chunks(arriving.to(dstate.dtype), work.tile) * work.tile.ends[:, None, None]
        dstate = dstate + (ending if link.through is None else ending * link.through)
    every = torch.cat([dstate, running[:, :, None].to(dstate.dtype)], 2)  # [B, H, n + 1, S, E]
    suffix = (link.sources[..., 1:].mT @ every.flatten(3)).view_as(dstate)
    if ending is not None:
        suffix = suffix + ending
    if link.begin is not None and dinitial is not None:
        _add_to_rows(dinitial, (link.begin.mT @ every.flatten(3)).view_as(dstate), work.tile)
    local = (link.sources[..., :-1, :1].mT @ dstate.flatten(3)).view_as(running).double()
    return link.across * running.view_as(local) + local, suffix


def _key_gradient(p: AttentionInputs, work: _Work, rows: _QueryGradient, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """``dphi(k) [B, H, n, C, S]`` and ``d[v | 1] [B, H, n, C, E]`` of a causal tile."""
    link = work.link
    assert link is not None
    dphi, dvx = _from_suffix(work, suffix)
    dphi += _paired(work, rows.g @ work.vx.mT).mT @ rows.reads
    dvx += _paired(work, rows.reads @ work.k.phi.mT).mT @ rows.g
    if rows.dmass is not None:
        dphi += link.pair.mT @ rows.dmass
    return dphi, dvx


def _from_suffix(work: _Work, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """What keys and values get from the tokens after their chunk (or, not causal, from all)."""
    dphi, dvx = work.vx @ suffix.mT, work.k.phi @ suffix
    if work.link is not None and work.link.exit is not None:
        dphi *= work.link.exit
        dvx *= work.link.exit
    return dphi, dvx


class _Totals:
    """The gradients of a backward pass as they come together, tile by tile."""

    def __init__(self, p: AttentionInputs, need_planes: bool, need_beta: bool, into: Into) -> None:
        self.p = p
        self.q, self.k, self.v = into
        self.beta = torch.zeros(p.beta.shape, dtype=torch.float64, device=p.q.device) if need_beta else None
        self.planes = torch.zeros(p.planes.shape, dtype=torch.float64, device=p.q.device) if need_planes else None
        # of G_i
        self.decay = None if p.log_decay is None else p.q.new_zeros(p.log_decay.shape, dtype=torch.float64)
        self.signs = bucket_signs(p.planes.shape[2], dtype=p.compute_dtype, device=p.q.device)

    def query_side(self, work: _Work, rows: _QueryGradient) -> None:
        assert work.q is not None
        dx = self._through_hash(work.q, rows.dphi)
        _put_queries(work.tile, self.q, dx.unflatten(2, rows.dphi.shape[2:4]))

    def key_side(self, work: _Work, dphi: Tensor, dvx: Tensor, row: Tensor | None = None) -> None:
        dx = self._through_hash(work.k, dphi)
        work.tile.put(self.k, dx.unflatten(2, dphi.shape[2:4]))
        work.tile.put(self.v, dvx[..., :-1])
        if self.decay is not None:
            column = -(work.k.phi * dphi).sum(-1)
            work.tile.put(self.decay, column if row is None else column + row)

    def _through_hash(self, rows: _Rows, dphi: Tensor) -> Tensor:
        """From the gradient of features ``[B, H, n, N, S]`` to that of rows ``[B, H, n * N, D]``; beta's and planes' on
        the way."""
        p, dtype = self.p, rows.x.dtype
        _, tables, number, dim = p.planes.shape
        weighted = (rows.phi * dphi).flatten(2, 3).unflatten(-1, (tables, -1))  # [B, H, N, L, R]
        phi = rows.phi.flatten(2, 3).unflatten(-1, (tables, -1))
        dlogit = weighted - phi * weighted.sum(-1, keepdim=True)
        du = dlogit @ self.signs  # [B, H, N, L, P], before beta
        if self.beta is not None:
            self.beta += (rows.u * du).sum((0, 2, 3, 4), dtype=torch.float64)
        du *= p.beta.to(dtype)[:, None, None, None] * (1 - rows.u * rows.u)
        du = du.flatten(3)  # [B, H, N, L P]
        if self.planes is not None:
            self.planes += (du.mT @ rows.x).sum(0, dtype=torch.float64).view(-1, tables, number, dim)
        return du @ p.planes.to(dtype).flatten(1, 2)

    def gradients(self, dinitial: Tensor, last: Tensor | None) -> Gradients:
        """All of them; ``last [rows, H]`` is what G at each last token gets through the final state."""
        p = self.p
        log_decay = None
        if self.decay is not None and last is not None and p.log_decay is not None:
            log_decay = _decay_gradient(p, self.decay, last).to(p.log_decay.dtype)
        initial = None if p.initial is None else _sketch(p, dinitial)
        return Gradients(
            self.q,
            self.k,
            self.v,
            None if self.planes is None else self.planes.to(p.planes.dtype),
            None if self.beta is None else self.beta.to(p.beta.dtype),
            log_decay,
            initial,
        )


def _decay_gradient(p: AttentionInputs, decay: Tensor, last: Tensor) -> Tensor:
    """``dlog_decay_t = sum over i >= t of dG_i`` inside each document, float64."""
    suffix = decay.flip(1).cumsum(1).flip(1)
    if p.cu_seqlens is None:
        return suffix + last[:, None]
    document = document_ids(p.cu_seqlens, decay.shape[1])
    beyond = F.pad(suffix, (0, 0, 0, 1))[:, p.cu_seqlens[1:]]  # what the documents after it hold
    return suffix - beyond[:, document] + last[document]
