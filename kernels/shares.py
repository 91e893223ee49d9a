"""Gradients of queries or keys, from the shares that a pipeline's blocks of value columns have in those of the projections."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import locate, low, mm


@triton.jit
def unproject_shares(shares, dx, planes, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head): ``dx [B, T, H, D]``, the planes times the sum of ``shares [B, T, NVB H, LPB]`` (float32; heads
    block by block)."""
    h = (tl.program_id(0) % H).to(tl.int64)
    b, _, start, end, _ = locate(tiles, tl.program_id(0) // H, T, TILE, c)
    slot = tl.arange(0, c.LPB)
    d = tl.arange(0, c.BD)
    inside = (slot < c.L * c.P)[None, :] & (d < c.D)[:, None]
    offset = (slot // c.P)[None, :] * planes[2] + (slot % c.P)[None, :] * planes[3] + d[:, None] * planes[4]
    W = low(tl.load(planes[0] + h * planes[1] + offset, mask=inside, other=0.0), c)
    rows = tl.arange(0, c.C)
    for t in tl.range(start, end, c.C, num_stages=2):
        there = (rows < end - t)[:, None]
        place = shares[0] + b * shares[1] + t * shares[2] + rows[:, None].to(tl.int64) * shares[2] + slot[None, :]
        dz = tl.load(place + h * shares[3], mask=there, other=0.0)
        for part in tl.static_range(1, c.NVB):
            dz += tl.load(place + (part * H + h) * shares[3], mask=there, other=0.0)
        x = mm(low(dz, c), tl.trans(W))
        place = dx[0] + b * dx[1] + t * dx[2] + h * dx[3] + rows[:, None].to(tl.int64) * dx[2] + d[None, :] * dx[4]
        tl.store(place, x.to(tl.bfloat16), mask=there & (d < c.D)[None, :])
