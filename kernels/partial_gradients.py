"""Gradients of queries or keys, and of the planes, from the partial gradients of the projections that pipelines write."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.products import matmul, split_operand, to_operand
from race_dist.kernels.rows import locate_tile


@triton.jit
def race_unproject_kernel(partial, dx, x, planes, dplanes, G: tl.constexpr, tiling, c: tl.constexpr):
    """Program (tile, head of x): writes ``dx [B, T, H G, D]``, the planes times the sum dz of ``partial [B, T, NVB H G, LPB]``
    (float32, one block of heads per block of value columns), and its part ``dz^T x`` of ``dplanes [tile, H G, LPB, BD]``
    unless that is None."""
    heads = tiling.H * G
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = locate_tile(tiling, tl.program_id(0) // heads, c)
    b = tile.batch
    slot = tl.arange(0, c.LPB)
    d = tl.arange(0, c.BD)
    inside = (slot < c.L * c.P)[None, :] & (d < c.D)[:, None]
    offset = (slot // c.P)[None, :] * planes.stride_l + (slot % c.P)[None, :] * planes.stride_p + d[:, None] * planes.stride_d
    W = tl.load(planes.ptr + h // G * planes.stride_h + offset, mask=inside, other=0.0).to(tl.float32)  # [BD, LPB]
    W, W_low = split_operand(W, c)
    rows = tl.arange(0, c.C)
    dW = tl.zeros([c.LPB, c.BD], tl.float32)
    for t in tl.range(tile.start, tile.end, c.C, num_stages=2):
        token = rows[:, None].to(tl.int64)
        exists = (rows < tile.end - t)[:, None]
        at = partial.ptr + b * partial.stride_b + t * partial.stride_t + token * partial.stride_t + slot[None, :]
        dz = tl.load(at + h * partial.stride_h, mask=exists, other=0.0)  # [C, LPB]
        for value_block in tl.static_range(1, c.NVB):
            dz += tl.load(at + (value_block * heads + h) * partial.stride_h, mask=exists, other=0.0)
        dz = to_operand(dz, c)
        y = matmul(dz, tl.trans(W))  # [C, BD]
        if c.split_planes:
            y = matmul(dz, tl.trans(W_low), y)
        if dplanes is not None:
            at = x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + token * x.stride_t + d[None, :] * x.stride_x
            row = tl.load(at, mask=exists & (d < c.D)[None, :], other=0.0)  # [C, BD]
            dW = matmul(tl.trans(dz), to_operand(row, c), dW)
        at = dx.ptr + b * dx.stride_b + t * dx.stride_t + h * dx.stride_h + token * dx.stride_t + d[None, :] * dx.stride_x
        tl.store(at, y.to(tl.bfloat16), mask=exists & (d < c.D)[None, :])
    if dplanes is not None:
        tl.store(dplanes + tl.program_id(0).to(tl.int64) * (c.LPB * c.BD) + slot[:, None] * c.BD + d[None, :], dW)
