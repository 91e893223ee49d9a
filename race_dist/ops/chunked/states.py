"""States of chunks and tiles in augmented form, and their conversion to sketches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from race_dist.ops.chunked.loading import LoadedTile
from race_dist.ops.chunked.tiling import Tile
from race_dist.ops.inputs import AttentionInputs, total_log_decay
from race_dist.sketch import SketchState


@dataclass
class ChunkStates:
    """States of the chunks of one tile.

    Attributes:
        sums: ``[B, H, n, S, E]`` what the keys and values of each chunk add.
        before: ``[B, H, n, S, E]`` the state before each chunk.
    """

    sums: Tensor
    before: Tensor


def to_sketch(inputs: AttentionInputs, state: Tensor) -> SketchState:
    """The sketches of augmented states ``[rows, H, S, E]``, in the state dtype."""
    state = state.to(inputs.state_dtype)
    mass, values = (part.clone(memory_format=torch.contiguous_format) for part in (state[..., -1], state[..., :-1]))
    return SketchState.unchecked(mass, values, total_log_decay(inputs))


def to_augmented(inputs: AttentionInputs, state: SketchState | None) -> Tensor:
    """Augmented states ``[values | mass]`` of sketches, float64; zeros for None."""
    if state is None:
        return torch.zeros(
            inputs.num_states,
            inputs.k.shape[2],
            inputs.features,
            inputs.v.shape[3] + 1,
            dtype=torch.float64,
            device=inputs.q.device,
        )
    return torch.cat([state.values, state.mass[..., None]], -1).double()


def select_per_chunk(state: Tensor, tile: Tile) -> Tensor:
    """The state of each chunk's row or document, ``[B, H, n or 1, S, E]``."""
    return state[:, :, None] if tile.document is None else state[tile.document].transpose(0, 1)[None]


def add_per_chunk(target: Tensor, chunks: Tensor, tile: Tile) -> None:
    """Add the states ``[B, H, n, S, E]`` of chunks to their batch rows or documents in ``target``."""
    if tile.document is None:
        target += chunks.sum(2)
    else:
        target.index_add_(0, tile.document, chunks[0].transpose(0, 1).to(target.dtype))


def chunk_states(inputs: AttentionInputs, loaded: LoadedTile, initial: Tensor) -> ChunkStates:
    """The sums of the chunks and the states before them, from the state ``initial [B, H, S, E]`` before the tile."""
    weights = loaded.weights
    assert weights is not None
    sums = (loaded.k.phi if weights.to_end is None else loaded.k.phi * weights.to_end).mT @ loaded.vx
    sources = torch.cat([initial[:, :, None].to(sums.dtype), sums[:, :, :-1]], 2)
    before = (weights.inter[..., :-1, :-1] @ sources.flatten(3)).view_as(sums)
    if weights.from_initial is not None and inputs.initial is not None:
        injected = select_per_chunk(to_augmented(inputs, inputs.initial).to(sums.dtype), loaded.tile)
        before += (weights.from_initial[..., :-1, :] @ injected.flatten(3)).view_as(sums)
    return ChunkStates(sums, before)


def state_after_tile(inputs: AttentionInputs, loaded: LoadedTile, state: ChunkStates, initial: Tensor) -> Tensor:
    """The float64 state after the tile, ``[B, H, S, E]``, from the state ``initial`` before it."""
    weights = loaded.weights
    assert weights is not None
    local = (weights.inter[..., -1:, 1:] @ state.sums.flatten(3)).view_as(initial).double()
    if weights.from_initial is not None and inputs.initial is not None:
        injected = select_per_chunk(to_augmented(inputs, inputs.initial), loaded.tile)
        local += (weights.from_initial[..., -1:, :].double() @ injected.flatten(3)).view_as(initial)
    return weights.tile_decay * initial.view_as(local) + local


def states_after_chunks(loaded: LoadedTile, state: ChunkStates) -> Tensor:
    """The state after each chunk."""
    assert loaded.weights is not None
    decay = loaded.weights.chunk_decay
    return state.sums + (state.before if decay is None else decay * state.before)
