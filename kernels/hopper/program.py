"""Where a program of a pipelined kernel works."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.rows import locate_tile


@aggregate
class Program:
    """One program: a tile of one key/value head, and one block of BV value columns."""

    b: gl.tensor  # batch row
    h: gl.tensor  # key/value head, of H
    H: gl.tensor
    start: gl.tensor  # first token of the tile
    end: gl.tensor
    num_chunks: gl.tensor
    tile_index: gl.tensor
    index: gl.tensor  # of (tile, head)
    state_index: gl.tensor  # of the state that the tile starts from: (tile, head); not causal: (sequence, head)
    value_block: gl.tensor


@gluon.jit
def locate_program(tiling, c: gl.constexpr):
    """The :class:`Program`, and its :class:`Tile`."""
    H = tiling.H
    value_block = gl.program_id(0) % c.NVB
    h = (gl.program_id(0) // c.NVB % H).to(gl.int64)
    tile_index = gl.program_id(0) // (c.NVB * H)
    tile = locate_tile(tiling, tile_index, c)
    num_chunks = ((tile.end - tile.start + c.C - 1) // c.C).to(gl.int32)
    index = tile_index.to(gl.int64) * H + h
    state_index = index if c.causal else tile.sequence * H + h
    return Program(tile.batch, h, H, tile.start, tile.end, num_chunks, tile_index, index, state_index, value_block), tile
