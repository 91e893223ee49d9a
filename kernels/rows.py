"""Where a tile lies, and how the rows of one chunk are read and written.

Letters: C tokens per chunk, X columns (D or Dv) padded to BX. ``c`` is the :class:`~race_dist.kernels.plan.Spec` that a kernel
is compiled for. Element offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """One tile: its batch row, its sequence (a document when packed), its first token, its end, and whether it is the last."""

    batch: Any
    sequence: Any
    start: Any
    end: Any
    is_last: Any


class HeadRows(NamedTuple):
    """The rows ``[end, X]`` of one head, or of a group of heads: ``ptr``, the first head's; ``tma``: a TMA descriptor per head,
    where the plan says so."""

    ptr: Any
    stride_h: Any
    stride_t: Any
    stride_x: Any
    end: Any
    tma: Any


@triton.jit
def locate_tile(tiling, tile, c: tl.constexpr):
    """The :class:`Tile` number ``tile``."""
    if c.packed:
        sequence = tl.load(tiling.table + 4 * tile)
        start = tl.load(tiling.table + 4 * tile + 1)
        end = tl.load(tiling.table + 4 * tile + 2)
        is_last = tl.load(tiling.table + 4 * tile + 3) != 0
        batch = sequence * 0
    else:
        per_row = tl.cdiv(tiling.T, tiling.TILE)
        sequence = (tile // per_row).to(tl.int64)
        start = (tile % per_row).to(tl.int64) * tiling.TILE
        end = tl.minimum(start + tiling.TILE, tiling.T).to(tl.int64)
        is_last = tile % per_row == per_row - 1
        batch = sequence
    return Tile(batch, sequence, start, end, is_last)


@triton.jit
def open_heads(x, b, h, heads: tl.constexpr, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """The :class:`HeadRows` of heads h .. h + heads of row b of ``x [B, T, H, X]``, tokens before ``end``."""
    ptr = x.ptr + b * x.stride_b + h * x.stride_h
    tma = ()
    if c.tma:
        for g in tl.static_range(heads):
            head = ptr + g * x.stride_h
            desc = tl.make_tensor_descriptor(head, [end.to(tl.int32), X], [x.stride_t.to(tl.int64), 1], [c.C, BX])
            tma = tma + (desc,)
    return HeadRows(ptr, x.stride_h, x.stride_t, x.stride_x, end, tma)


@triton.jit
def load_rows(head_rows, g: tl.constexpr, t, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """Tokens t .. t + C of the group's head g, ``[C, BX]``; zeros past the end and past column X."""
    if c.tma:
        return head_rows.tma[g].load([t.to(tl.int32), 0])
    else:
        rows = tl.arange(0, c.C)
        cols = tl.arange(0, BX)
        inside = (rows < head_rows.end - t)[:, None]
        if X != BX:
            inside = inside & (cols < X)[None, :]
        return tl.load(row_pointers(head_rows, g, t, rows, cols), mask=inside, other=0.0)


@triton.jit
def store_rows(head_rows, g: tl.constexpr, value, t, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """The inverse of :func:`load_rows`."""
    if c.tma:
        head_rows.tma[g].store([t.to(tl.int32), 0], value.to(head_rows.tma[g].dtype))
    else:
        rows = tl.arange(0, c.C)
        cols = tl.arange(0, BX)
        inside = (rows < head_rows.end - t)[:, None] & (cols < X)[None, :]
        tl.store(row_pointers(head_rows, g, t, rows, cols), value.to(head_rows.ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_pointers(head_rows, g: tl.constexpr, t, rows, cols):
    """Pointers ``[C, BX]`` to tokens t + rows of the group's head g."""
    token = rows[:, None].to(tl.int64) * head_rows.stride_t
    return head_rows.ptr + g * head_rows.stride_h + t * head_rows.stride_t + token + cols[None, :] * head_rows.stride_x


@triton.jit
def load_head_rows(x, b, t, h, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """:func:`load_rows` of one chunk of one head of a tensor."""
    return load_rows(open_heads(x, b, h, 1, end, X, BX, c), 0, t, X, BX, c)


@triton.jit
def store_head_rows(x, value, b, t, h, end, X: tl.constexpr, BX: tl.constexpr, c: tl.constexpr):
    """The inverse of :func:`load_head_rows`."""
    store_rows(open_heads(x, b, h, 1, end, X, BX, c), 0, value, t, X, BX, c)


@triton.jit
def load_scalars(x, b, t, h, n, c: tl.constexpr):
    """Tokens t .. t + C of head h of ``x [B, T, H]``, ``[C]``; zeros from the n-th on."""
    rows = tl.arange(0, c.C)
    pointer = x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + rows.to(tl.int64) * x.stride_t
    return tl.load(pointer, mask=rows < n, other=0)


@triton.jit
def store_scalars(x, value, b, t, h, n, c: tl.constexpr):
    """The inverse of :func:`load_scalars`."""
    rows = tl.arange(0, c.C)
    pointer = x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + rows.to(tl.int64) * x.stride_t
    tl.store(pointer, value, mask=rows < n)


@triton.jit
def load_key_mask(key_mask, b, t, n, c: tl.constexpr):
    """Which of a chunk's n keys are present, ``[C]``."""
    rows = tl.arange(0, c.C)
    present = rows < n
    if c.masked:
        pointer = key_mask.ptr + b * key_mask.stride_b + (t + rows) * key_mask.stride_t
        present = present & (tl.load(pointer, mask=present, other=0) != 0)
    return present
