"""The forward pass: a scan over the tiles that writes the outputs on its way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from race_dist.ops.chunked.loading import LoadedTile, load_tile, put_queries, repeat_per_query_head
from race_dist.ops.chunked.states import (
    add_per_chunk,
    chunk_states,
    select_per_chunk,
    state_after_tile,
    states_after_chunks,
    to_augmented,
    to_sketch,
)
from race_dist.ops.chunked.tiling import Tiling
from race_dist.ops.inputs import BUCKET_EPS, AttentionInputs, ForwardResult, Started, den_floor
from race_dist.sketch import SketchState


def forward(inputs: AttentionInputs) -> ForwardResult:
    """Output, denominators, the states before each tile (causal) or the totals (not causal), and the final state."""
    return _forward(inputs, new_output(inputs))


def start_forward(inputs: AttentionInputs, out: Tensor | None = None) -> Started:
    """The final state alone; :func:`finish_forward` computes everything from the inputs again."""
    _, final = _scan_tiles(inputs, Tiling(inputs))
    return Started(to_sketch(inputs, final), (inputs, new_output(inputs) if out is None else out))


def finish_forward(started: Started, initial: SketchState) -> ForwardResult:
    """The forward pass from the state that enters."""
    inputs, out = started.partial
    return _forward(replace(inputs, initial=initial), out)


def _forward(inputs: AttentionInputs, out: Tensor) -> ForwardResult:
    den = inputs.q.new_empty(inputs.q.shape[:3] if inputs.normalization == "global" else 0, dtype=inputs.compute_dtype)
    tiling = Tiling(inputs)
    if inputs.causal:
        states, final = _scan_tiles(inputs, tiling, out, den)
    else:
        _, final = _scan_tiles(inputs, tiling)
        states = final.to(inputs.compute_dtype)
        for tile in tiling:
            loaded = load_tile(inputs, tile)
            _write_output(inputs, loaded, read_out(inputs, loaded, select_per_chunk(states, tile)), out, den)
    return ForwardResult(out, den, states, to_sketch(inputs, final))


def new_output(inputs: AttentionInputs) -> Tensor:
    """``[B, T, Hq, Dv]``."""
    return inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])


def states_shape(inputs: AttentionInputs) -> tuple[int, ...]:
    """Of ``ForwardResult.states``: the state before each tile (causal) or the totals."""
    shape = (inputs.k.shape[2], inputs.features, inputs.v.shape[3] + 1)
    return (Tiling(inputs).num_tiles, inputs.q.shape[0], *shape) if inputs.causal else (inputs.num_states, *shape)


def unsupported(inputs: AttentionInputs) -> str | None:
    """Always None: this backend computes all inputs, on any device."""
    return None


def _scan_tiles(
    inputs: AttentionInputs, tiling: Tiling, out: Tensor | None = None, den: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scan over the tiles, which writes the output on its way where buffers are given.

    Returns:
        The states before each tile ``[tiles, B, H, S, E]`` (with outputs) and the final state ``[rows, H, S, E]``.
    """
    final = to_augmented(inputs, inputs.initial)
    running = final if inputs.cu_seqlens is None else torch.zeros_like(final[:1])
    entries = []
    for tile in tiling:
        loaded = load_tile(inputs, tile, queries=out is not None)
        if not inputs.causal:
            add_per_chunk(final, loaded.k.phi.mT @ loaded.vx, tile)
            continue
        entries.append(running.to(inputs.compute_dtype))
        state = chunk_states(inputs, loaded, entries[-1])
        if out is not None and den is not None:
            _write_output(inputs, loaded, read_out(inputs, loaded, state.before), out, den)
        running = state_after_tile(inputs, loaded, state, running)
        if tile.ends is not None:
            final[tile.document[tile.ends]] = states_after_chunks(loaded, state)[0].transpose(0, 1)[tile.ends].double()  # type: ignore[index]
    none = running.new_empty(0, *running.shape, dtype=inputs.compute_dtype)
    states = torch.stack(entries) if entries and out is not None else none
    return states, running if inputs.causal and inputs.cu_seqlens is None else final


def read_features(inputs: AttentionInputs, loaded: LoadedTile, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weights with which queries read the state, and for "bucket" mass + eps, by which the features are divided."""
    if inputs.normalization != "bucket":
        return loaded.phi_q, None
    mass = before[..., None, :, -1]  # [B, H, n, 1, S]
    if loaded.weights is not None:
        if loaded.weights.from_start is not None:
            mass = loaded.weights.from_start * mass
        mass = repeat_per_query_head(loaded.weights.intra @ loaded.k.phi + mass, loaded.phi_q)
    mass = mass + BUCKET_EPS
    return loaded.phi_q / mass, mass


def read_out(inputs: AttentionInputs, loaded: LoadedTile, before: Tensor) -> Tensor:
    """The output before normalization, ``[B, H, n, Q, E]``; its last column is the denominator."""
    reads, _ = read_features(inputs, loaded, before)
    num = reads @ before
    if loaded.weights is not None:
        if loaded.weights.from_start is not None:
            num *= repeat_per_query_head(loaded.weights.from_start, num)
        num += weigh_pairs(loaded, reads @ loaded.k.phi.mT) @ loaded.vx
    return num


def weigh_pairs(loaded: LoadedTile, products: Tensor) -> Tensor:
    """Multiply the products of a chunk's queries and keys ``[B, H, n, Q, C]`` by causal mask and decay, in place."""
    assert loaded.weights is not None
    products.unflatten(3, (-1, products.shape[-1])).mul_(loaded.weights.intra[..., None, :, :])
    return products


def _write_output(inputs: AttentionInputs, loaded: LoadedTile, num: Tensor, out: Tensor, den: Tensor) -> None:
    """Normalize and store the output."""
    result = num[..., :-1]
    if inputs.normalization == "global":
        weight = num[..., -1:]
        empty = weight < den_floor(weight.dtype)
        result = (result / weight.masked_fill(empty, 1.0)).masked_fill_(empty, 0.0)
        put_queries(loaded.tile, den, weight[..., 0])
    put_queries(loaded.tile, out, result)
