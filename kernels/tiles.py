"""How long tiles are where pipelines run, and where the tiles of packed documents are."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PIPELINE_TILE = 8192  # tokens
FILL_CHUNKS = 3  # time, in chunks, until a pipeline of four partitions finishes its first chunk


class Tiles(NamedTuple):
    """``table [tiles, 4]`` int64: document, first token, end, whether it is the document's last; spare rows are empty.
    ``row_tiles [N + 1]`` int64: the first tile of each document. None where nothing is packed."""

    table: Tensor | None
    row_tiles: Tensor | None


@lru_cache(maxsize=4096)
def fitted_tile(length: int, rows: int, num_sms: int) -> int:
    """Tokens per tile for pipelines, whose programs take a whole SM each: the tile with which ``rows`` sequences of ``length``
    tokens take the least time, wave after wave of programs. 2**20 tokens of 8 heads on 132 SMs are 8 full waves of tiles of
    8000 tokens; with tiles of 4096 the last of 16 waves is half empty. Among equals the longest tile, which stores the fewest
    states."""

    def chunks(tile: int) -> int:
        waves = -(-rows * -(-length // tile) // num_sms)
        return waves * (tile // 64 + FILL_CHUNKS)

    return min(range(MAX_PIPELINE_TILE, 0, -64), key=chunks)


def packed_tiles(cu_seqlens: Tensor, tile: int, num_tiles: int) -> Tiles:
    """Divide each document into tiles of ``tile`` tokens, at most ``num_tiles`` in all. Computed on the device, without a
    synchronization for the documents' lengths."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    row_tiles = torch.nn.functional.pad(((ends - starts + tile - 1) // tile).cumsum(0), (1, 0))
    index = torch.arange(num_tiles, device=cu_seqlens.device)
    row = torch.searchsorted(row_tiles[1:], index, right=True).clamp_(max=starts.numel() - 1)
    first = starts[row] + (index - row_tiles[row]) * tile
    end = torch.minimum(first + tile, ends[row])
    used = index < row_tiles[-1]
    return Tiles(torch.stack([row, torch.where(used, first, 0), torch.where(used, end, 0), end == ends[row]], 1), row_tiles)
