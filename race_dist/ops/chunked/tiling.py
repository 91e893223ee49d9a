"""How a sequence is cut for the chunked pass: chunks for matrix products, tiles of chunks for saved states.

A *chunk* is up to C tokens of one document; a *tile* is up to n chunks worked on together. Rows of a chunk that hold no
token (a ragged end) are padding: their keys add nothing and their outputs are dropped.

Inside a tile the state before each chunk is a weighted sum of *sources*: the state that enters the tile and the
chunks' own sums. The weights, one small matrix a head, carry the causal order, the decay and the document boundaries all
at once; the backward pass is its transpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.ops.inputs import AttentionInputs

MIN_LOG_DECAY = -1000.0  # exp of it is 0 in float64 too; -inf itself would make differences NaN


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
        """The tile's part of ``x [B, T, H, ...]`` as ``[B, H, n, C, ...]``, contiguous."""
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
        """Write ``part [B, H, n, C, ...]`` to its place in ``target [B, T, H, ...]``."""
        part = part.movedim(1, 3)  # [B, n, C, H, ...]
        if self.rows is not None:
            target[:, self.rows[self.valid]] = part[:, self.valid].to(target.dtype)
        else:
            target[:, self.start : self.start + self.length] = part.flatten(1, 2)[:, : self.length].to(target.dtype)


class Tiling:
    """The tiles of one problem, in order."""

    def __init__(self, inputs: AttentionInputs) -> None:
        batch, length, query_heads, _ = inputs.q.shape
        self.device = inputs.q.device
        self.chunk = max(1, min(64 if inputs.features <= 128 else 128, length))  # one token is decoded without padding
        rows = 2**14 if inputs.q.device.type == "cpu" else 2**18  # query rows worked on at once: a few MB of features
        self.per_tile = min(64, max(8, rows // (self.chunk * max(1, batch * query_heads))))
        self.length, self.cu_seqlens = length, inputs.cu_seqlens
        # every document may leave one ragged chunk; a bound that depends on shapes only
        ragged = inputs.num_states if inputs.cu_seqlens is not None and length else 0
        self.num_chunks = length // self.chunk + ragged if ragged else -(-length // self.chunk)
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
        held = valid[:, 0]
        return Tile(
            index,
            0,
            0,
            shape,
            rows,
            valid,
            document,
            begins=held & (number == 0),
            ends=held & (chunk == last_chunk[document] - 1),
        )


@dataclass(frozen=True)
class TileWeights:
    """The weights inside a tile, broadcastable over batch and heads; None where all are 1.

    Attributes:
        intra: ``[.., n, C, C]``: token i of a chunk sees token j <= i of it with this weight.
        from_start: ``[.., n, C, 1]``: token i sees the state before its chunk with this weight.
        to_end: ``[.., n, C, 1]``: token j is added to the sum of its chunk with this weight.
        chunk_decay: ``[.., n, 1, 1]``: a state crosses a chunk with this weight.
        inter: ``[.., n + 1, n + 1]``: row m, the state before chunk m (row n: after the tile), reads column 0, the
            state that enters the tile, and column j, the sum of chunk j - 1.
        from_initial: ``[.., n + 1, n]``: row m reads the initial state of the document that begins at chunk j (packed only).
        tile_decay: ``[.., 1, 1]`` float64: the state that enters the tile leaves it with this weight.
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
    segment = torch.zeros(n, dtype=torch.long, device=device) if tile.begins is None else tile.begins.cumsum(0)
    reader = torch.cat([segment, segment[-1:]])  # [n + 1]: document read by the state before chunk m, and after the tile
    source = torch.cat([segment.new_zeros(1), segment])  # [n + 1]: document of the initial state and of the chunks
    order = torch.arange(n + 1, device=device)
    seen = (order[:, None] >= order) & (reader[:, None] == source)
    seen_begin = None
    if tile.begins is not None:
        seen_begin = (order[:, None] >= order[:-1]) & (reader[:, None] == segment) & tile.begins
    lower = torch.ones(c, c, dtype=torch.bool, device=device).tril()
    if inputs.log_decay is None:
        begin = None if seen_begin is None else seen_begin.to(dtype)
        return TileWeights(lower.to(dtype), None, None, None, seen.to(dtype), begin, seen[-1:, :1].double())

    log_decay = tile.take(inputs.log_decay.clamp(min=MIN_LOG_DECAY), torch.float64)  # [B, H, n, C]
    if tile.valid is not None:
        log_decay = log_decay * tile.valid
    inside = log_decay.cumsum(-1)
    total = inside[..., -1:]  # [B, H, n, 1]
    before = F.pad(total[..., 0].cumsum(-1), (1, 0))  # [B, H, n + 1]: decay from the tile's start to chunk m

    def weights(difference: Tensor, mask: Tensor) -> Tensor:
        return difference.masked_fill_(~mask, -torch.inf).to(dtype).exp_()

    sources = weights(before[..., :, None] - before[..., None, :], seen)
    begin = None if seen_begin is None else weights(before[..., :, None] - before[..., None, :-1], seen_begin)
    return TileWeights(
        weights(inside[..., :, None] - inside[..., None, :], lower),
        inside[..., None].exp().to(dtype),
        (total - inside)[..., None].exp().to(dtype),
        total[..., None].exp().to(dtype),
        sources,
        begin,
        (before[..., -1:].exp() * seen[-1, 0])[..., None],
    )
