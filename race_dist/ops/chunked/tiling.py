"""Division of a sequence into chunks, for matrix products, and tiles of chunks, for saved states.

A *chunk* is up to C tokens of one document; a *tile* is up to n chunks that are computed together. The last rows of a chunk may
be padding: their keys add nothing and their outputs are dropped.

Inside a tile the state before each chunk is a weighted sum of the state before the tile and the sums of the chunks. The
weights, one small matrix per head, express causal order, decay and document boundaries together; the backward pass uses their
transpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.ops.inputs import AttentionInputs

MIN_LOG_DECAY = -1000.0  # its exponential is 0 in float64 too; differences of -inf would be NaN


@dataclass(frozen=True)
class Tile:
    """Some chunks of a sequence, ``n`` of ``C`` tokens each.

    Attributes:
        index: number of the tile.
        start: first token of the tile (dense).
        length: tokens in the tile, at most ``n * C`` (dense).
        shape: ``(n, C)``.
        rows: ``[n, C]`` token of each row (packed documents only).
        valid: ``[n, C]`` bool, False for padding; None when every row holds a token.
        document: ``[n]`` document of each chunk (packed only).
        begins, ends: ``[n]`` bool: first, last chunk of its document (packed only).
    """

    index: int
    start: int
    length: int
    shape: tuple[int, int]
    rows: Tensor | None = None
    valid: Tensor | None = None
    document: Tensor | None = None
    begins: Tensor | None = None
    ends: Tensor | None = None

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Load the tile's rows of ``x [B, T, H, ...]`` as ``[B, H, n, C, ...]``, contiguous."""
        n, c = self.shape
        if self.rows is not None:
            part = x[:, self.rows]
        else:
            part = x[:, self.start : self.start + self.length]
            if self.length < n * c:
                part = F.pad(part, (0, 0) * (x.dim() - 2) + (0, n * c - self.length))
            part = part.unflatten(1, (n, c))
        return part.movedim(3, 1).to(dtype).contiguous()

    def put(self, target: Tensor, part: Tensor) -> None:
        """Store ``part [B, H, n, C, ...]`` to the tile's rows of ``target [B, T, H, ...]``."""
        part = part.movedim(1, 3)  # [B, n, C, H, ...]
        if self.rows is not None:
            target[:, self.rows[self.valid]] = part[:, self.valid].to(target.dtype)
        else:
            target[:, self.start : self.start + self.length] = part.flatten(1, 2)[:, : self.length].to(target.dtype)


class Tiling:
    """The tiles of one call, in order."""

    def __init__(self, inputs: AttentionInputs) -> None:
        batch, length, query_heads, _ = inputs.q.shape
        self.device = inputs.q.device
        self.chunk = max(1, min(64 if inputs.features <= 128 else 128, length))  # a single token is not padded
        rows = 2**14 if inputs.q.device.type == "cpu" else 2**18  # query rows per tile: a few MB of features
        self.per_tile = min(64, max(8, rows // (self.chunk * max(1, batch * query_heads))))
        self.length, self.cu_seqlens = length, inputs.cu_seqlens
        # every document may have one chunk with padding: an upper bound from shapes alone
        padded = inputs.num_states if inputs.cu_seqlens is not None and length else 0
        self.num_chunks = length // self.chunk + padded if padded else -(-length // self.chunk)
        self.num_tiles = -(-self.num_chunks // self.per_tile)

    def __iter__(self) -> Iterator[Tile]:
        return map(self.tile, range(self.num_tiles))

    def __reversed__(self) -> Iterator[Tile]:
        return map(self.tile, reversed(range(self.num_tiles)))

    def tile(self, index: int) -> Tile:
        first = index * self.per_tile
        shape = (min(self.per_tile, self.num_chunks - first), self.chunk)
        if self.cu_seqlens is not None:
            return self._packed_tile(index, first, shape)
        start = first * self.chunk
        length = min(shape[0] * self.chunk, self.length - start)
        valid = None
        if length < shape[0] * self.chunk:
            valid = (torch.arange(shape[0] * self.chunk, device=self.device) < length).view(shape)
        return Tile(index, start, length, shape, valid=valid)

    def _packed_tile(self, index: int, first: int, shape: tuple[int, int]) -> Tile:
        assert self.cu_seqlens is not None
        starts, lengths = self.cu_seqlens[:-1], self.cu_seqlens.diff()
        last_chunk = (-(-lengths // self.chunk)).cumsum(0)  # of each document, exclusive
        chunk = torch.arange(first, first + shape[0], device=self.device)
        # chunks past the last document extend it: they hold no token and change nothing
        document = torch.searchsorted(last_chunk, chunk, right=True).clamp(max=lengths.numel() - 1)
        number = chunk - (last_chunk - -(-lengths // self.chunk))[document]  # of the chunk in its document
        offset = number[:, None] * self.chunk + torch.arange(self.chunk, device=self.device)
        valid = offset < lengths[document, None]
        rows = torch.where(valid, starts[document, None] + offset, 0)
        not_empty = valid[:, 0]
        return Tile(
            index,
            0,
            0,
            shape,
            rows,
            valid,
            document,
            begins=not_empty & (number == 0),
            ends=not_empty & (chunk == last_chunk[document] - 1),
        )


@dataclass(frozen=True)
class TileWeights:
    """The weights inside a tile, broadcastable over batch and heads; None where all are 1.

    Attributes:
        intra: ``[.., n, C, C]`` weight of token j in the output of token i of the same chunk.
        from_start: ``[.., n, C, 1]`` weight of the state before the chunk in the output of token i.
        to_end: ``[.., n, C, 1]`` weight of token j in the sum of its chunk.
        chunk_decay: ``[.., n, 1, 1]`` weight of the state before a chunk in the state after it.
        inter: ``[.., n + 1, n + 1]`` weights in the state before chunk m (row m; row n: after the tile) of the state before the
            tile (column 0) and of the sum of chunk j - 1 (column j).
        from_initial: ``[.., n + 1, n]`` weight in the state before chunk m of the initial state of the document that begins at
            chunk j (packed only).
        tile_decay: ``[.., 1, 1]`` float64 weight of the state before the tile in the state after it.
    """

    intra: Tensor
    from_start: Tensor | None
    to_end: Tensor | None
    chunk_decay: Tensor | None
    inter: Tensor
    from_initial: Tensor | None
    tile_decay: Tensor


def tile_weights(inputs: AttentionInputs, tile: Tile) -> TileWeights:
    """The weights of a causal tile. Sums of log decays are float64: only their differences are exponentiated."""
    (n, c), dtype, device = tile.shape, inputs.compute_dtype, inputs.q.device
    document = torch.zeros(n, dtype=torch.long, device=device) if tile.begins is None else tile.begins.cumsum(0)
    row = torch.cat([document, document[-1:]])  # [n + 1]: document of the state before chunk m, and after the tile
    column = torch.cat([document.new_zeros(1), document])  # [n + 1]: document of the state before the tile, and of the chunks
    order = torch.arange(n + 1, device=device)
    visible = (order[:, None] >= order) & (row[:, None] == column)
    initial_visible = None
    if tile.begins is not None:
        initial_visible = (order[:, None] >= order[:-1]) & (row[:, None] == document) & tile.begins
    lower = torch.ones(c, c, dtype=torch.bool, device=device).tril()
    if inputs.log_decay is None:
        from_initial = None if initial_visible is None else initial_visible.to(dtype)
        return TileWeights(lower.to(dtype), None, None, None, visible.to(dtype), from_initial, visible[-1:, :1].double())

    log_decay = tile.take(inputs.log_decay.clamp(min=MIN_LOG_DECAY), torch.float64)  # [B, H, n, C]
    if tile.valid is not None:
        log_decay = log_decay * tile.valid
    inside = log_decay.cumsum(-1)
    total = inside[..., -1:]  # [B, H, n, 1]
    before = F.pad(total[..., 0].cumsum(-1), (1, 0))  # [B, H, n + 1]: decay from the tile's start to chunk m

    def masked_exp(difference: Tensor, mask: Tensor) -> Tensor:
        return difference.masked_fill_(~mask, -torch.inf).to(dtype).exp_()

    inter = masked_exp(before[..., :, None] - before[..., None, :], visible)
    from_initial = (
        None if initial_visible is None else masked_exp(before[..., :, None] - before[..., None, :-1], initial_visible)
    )
    return TileWeights(
        masked_exp(inside[..., :, None] - inside[..., None, :], lower),
        inside[..., None].exp().to(dtype),
        (total - inside)[..., None].exp().to(dtype),
        total[..., None].exp().to(dtype),
        inter,
        from_initial,
        (before[..., -1:].exp() * visible[-1, 0])[..., None],
    )
