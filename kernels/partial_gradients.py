"""Gradients of queries or keys, and of the planes, from the gradient of the projections that pipelines write."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.common import locate, low, mm, parts


@triton.jit
def race_unproject_kernel(shares, dx, x, planes, dplanes, G: tl.constexpr, tiles, T, TILE, H, c: tl.constexpr):
    """Program (tile, head of x): ``dx [B, T, H G, D]``, the planes times the sum dz of ``shares [B, T, NVB H G, LPB]``
    (float32; heads block by block), and its part ``dz^T x`` of ``dplanes [tile, H G, LPB, BD]`` unless that is None."""
    heads = H * G
    h = (tl.program_id(0) % heads).to(tl.int64)
    b, _, start, end, _ = locate(tiles, tl.program_id(0) // heads, T, TILE, c)
    slot = tl.arange(0, c.LPB)
    d = tl.arange(0, c.BD)
    inside = (slot < c.L * c.P)[None, :] & (d < c.D)[:, None]
    offset = (slot // c.P)[None, :] * planes[2] + (slot % c.P)[None, :] * planes[3] + d[:, None] * planes[4]
    W = tl.load(planes[0] + h // G * planes[1] + offset, mask=inside, other=0.0).to(tl.float32)
    W, W_rest = parts(W, c)
    rows = tl.arange(0, c.C)
    dW = tl.zeros([c.LPB, c.BD], tl.float32)
    for t in tl.range(start, end, c.C, num_stages=2):
        there = (rows < end - t)[:, None]
        place = shares[0] + b * shares[1] + t * shares[2] + rows[:, None].to(tl.int64) * shares[2] + slot[None, :]
        dz = tl.load(place + h * shares[3], mask=there, other=0.0)
        for part in tl.static_range(1, c.NVB):
            dz += tl.load(place + (part * heads + h) * shares[3], mask=there, other=0.0)
        dz = low(dz, c)
        y = mm(dz, tl.trans(W))
        if c.split_planes:
            y = mm(dz, tl.trans(W_rest), y)
        if dplanes is not None:
            at = x[0] + b * x[1] + t * x[2] + h * x[3] + rows[:, None].to(tl.int64) * x[2] + d[None, :] * x[4]
            row = tl.load(at, mask=there & (d < c.D)[None, :], other=0.0)
            dW = mm(tl.trans(dz), low(row, c), dW)
        place = dx[0] + b * dx[1] + t * dx[2] + h * dx[3] + rows[:, None].to(tl.int64) * dx[2] + d[None, :] * dx[4]
        tl.store(place, y.to(tl.bfloat16), mask=there & (d < c.D)[None, :])
    if dplanes is not None:
        tl.store(dplanes + tl.program_id(0).to(tl.int64) * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :], dW)
