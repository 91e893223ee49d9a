"""Where the tiles of packed documents lie, found on the device: nothing waits for the documents' lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """``table [tiles, 4]`` int64: document, first token, end, whether it is the document's last; spare rows are empty.
    ``row_tiles [N + 1]`` int64: the first tile of each document. None where nothing is packed."""

    table: Tensor | None
    row_tiles: Tensor | None


def packed_tiles(cu_seqlens: Tensor, tile: int, num_tiles: int) -> Tiles:
    """Cut each document in tiles of ``tile`` tokens; ``num_tiles`` bounds how many there are."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    row_tiles = torch.nn.functional.pad(((ends - starts + tile - 1) // tile).cumsum(0), (1, 0))
    index = torch.arange(num_tiles, device=cu_seqlens.device)
    row = torch.searchsorted(row_tiles[1:], index, right=True).clamp_(max=starts.numel() - 1)
    first = starts[row] + (index - row_tiles[row]) * tile
    end = torch.minimum(first + tile, ends[row])
    used = index < row_tiles[-1]
    return Tiles(torch.stack([row, torch.where(used, first, 0), torch.where(used, end, 0), end == ends[row]], 1), row_tiles)
