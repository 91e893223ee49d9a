"""Load one tile of the inputs: rows, their features, and the value rows ``[v | 1]``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.hashing import bucket_probabilities, project
from race_dist.ops.chunked.tiling import Tile, TileWeights, tile_weights
from race_dist.ops.inputs import AttentionInputs


@dataclass
class HashedRows:
    """Query or key rows of one tile and their features; ``N`` rows are those of n chunks.

    Attributes:
        x: ``[B, H, N, D]`` the rows.
        u: ``[B, H, N, L, P]`` tanh of their projections.
        phi: ``[B, H, n, N / n, S]`` their features.
    """

    x: Tensor
    u: Tensor
    phi: Tensor


@dataclass
class LoadedTile:
    """The inputs of one tile.

    Attributes:
        tile: which tokens.
        weights: causal order, decay and document boundaries; None without ``causal``.
        q: hashed queries, None unless asked for.
        k: hashed keys; features of masked keys and of padding are 0.
        vx: ``[B, H, n, C, E]`` value rows ``[v | 1]``.
    """

    tile: Tile
    weights: TileWeights | None
    q: HashedRows | None
    k: HashedRows
    vx: Tensor

    @property
    def phi_q(self) -> Tensor:
        assert self.q is not None
        return self.q.phi


def load_tile(inputs: AttentionInputs, tile: Tile, *, queries: bool = True) -> LoadedTile:
    """Copy the rows of a tile and hash them."""
    dtype = inputs.compute_dtype
    k = hash_rows(inputs, tile.take(inputs.k, dtype))
    keep = tile.valid
    if inputs.key_mask is not None:
        mask = tile.take(inputs.key_mask[..., None], torch.bool)  # [B, 1, n, C]
        keep = mask if keep is None else mask & keep
    if keep is not None:
        k.phi *= keep[..., None]
    vx = F.pad(tile.take(inputs.v, dtype), (0, 1), value=1.0)
    return LoadedTile(
        tile,
        tile_weights(inputs, tile) if inputs.causal else None,
        hash_rows(inputs, take_queries(inputs, tile, inputs.q)) if queries else None,
        k,
        vx,
    )


def hash_rows(inputs: AttentionInputs, x: Tensor) -> HashedRows:
    """Hash rows ``[B, H, n, N / n, D]``."""
    rows = x.flatten(2, 3)
    u = project(rows, inputs.planes.to(rows.dtype)).tanh_()
    phi = bucket_probabilities(2 * inputs.beta.to(rows.dtype)[:, None, None, None] * u).flatten(-2)
    return HashedRows(rows, u, phi.unflatten(2, x.shape[2:4]))


def take_queries(inputs: AttentionInputs, tile: Tile, x: Tensor) -> Tensor:
    """Load ``x [B, T, Hq, ...]`` as ``[B, Hkv, n, Q, ...]``: the query heads of one key/value head follow each other."""
    part = tile.take(x, inputs.compute_dtype).unflatten(1, (inputs.k.shape[2], -1))
    return part.movedim(2, 3).flatten(3, 4)


def put_queries(tile: Tile, target: Tensor, part: Tensor) -> None:
    """Store rows; the inverse of :func:`take_queries`."""
    part = part.unflatten(3, (-1, tile.shape[1])).movedim(3, 2)
    tile.put(target, part.flatten(1, 2))


def repeat_per_query_head(weight: Tensor, like: Tensor) -> Tensor:
    """Weights of a chunk's tokens ``[..., C, x]``, repeated for the query heads: ``[..., Q, x]``."""
    repeats = like.shape[-2] // weight.shape[-2]
    return weight if repeats == 1 else weight.repeat(*(1,) * (weight.dim() - 2), repeats, 1)
