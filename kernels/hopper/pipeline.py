"""Rings of shared memory between the parts of a program, and rows that the copy engine moves through them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from race_dist.kernels.hopper.layouts import PLAIN, PLAIN_ROWS, product, tile


@gluon.jit
def make_ring(depth: gl.constexpr, readers: gl.constexpr):
    """The barriers (full, empty) of a ring of ``depth`` buffers, a power of two, each of which ``readers`` parts must have
    read. Buffers are put behind them: ``make_ring(2, 1) + (operands(2, C, BD),)``.

    Make no ring that no part waits at: the compiler gives the room of its barriers to other buffers, and what was set up as
    a barrier corrupts what is stored there (found on an H100)."""
    full = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(depth):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty


@gluon.jit
def operands(depth: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """``depth`` buffers of bfloat16 operands ``[rows, columns]``."""
    return gl.allocate_shared_memory(gl.bfloat16, [depth, rows, columns], tile(rows, columns))


@gluon.jit
def numbers(depth: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """``depth`` buffers of float32 numbers ``[rows, columns]``."""
    return gl.allocate_shared_memory(gl.float32, [depth, rows, columns], PLAIN_ROWS)


@gluon.jit
def vectors(depth: gl.constexpr, size: gl.constexpr):
    """``depth`` buffers of float32 numbers ``[size]``."""
    return gl.allocate_shared_memory(gl.float32, [depth, size], PLAIN)


@gluon.jit
def each_time(j):
    """j, of which the compiler does not see that it is a loop's: it would work out the addresses of every turn's operands
    before the loop, more than there are registers, and read them back from memory each time."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [j], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_full(ring, j):
    """Wait until turn j's buffers are full; their place in the ring."""
    depth: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(ring[0].index(j & (depth - 1)), (j & depth) // depth)
    return j & (depth - 1)


@gluon.jit
def await_empty(ring, j):
    """Wait until turn j's buffers may be written; their place in the ring."""
    depth: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(ring[1].index(j & (depth - 1)), (j & depth) // depth ^ 1)
    return j & (depth - 1)


@gluon.jit
def set_full(ring, j):
    """Hand on turn j's buffers: what ordinary stores wrote is seen by the matrix units too."""
    fence_async_shared()
    mbarrier.arrive(ring[0].index(j & (ring[0].shape[0] - 1)))


@gluon.jit
def set_empty(ring, j, really=True):
    """Give turn j's buffers back."""
    mbarrier.arrive(ring[1].index(j & (ring[1].shape[0] - 1)), pred=really)


@gluon.jit
def next_full(ring, j):
    """Turn j's first buffer, once it is full."""
    return ring[2].index(await_full(ring, j))


@gluon.jit
def open_rows(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """A copy descriptor of head h of row b of ``x [B, T, H, X]``, tokens before ``end``, C at a time."""
    return tma.make_tensor_descriptor(
        x[0] + b * x[1] + h * x[3], [end.to(gl.int32), X], [x[2].to(gl.int64), 1], [c.C, BX], tile(c.C, BX)
    )


@gluon.jit
def open_heads(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """:func:`open_rows` of each query head that reads key/value head h."""
    heads = ()
    for g in gl.static_range(c.G):
        heads = heads + (open_rows(x, b, h * c.G + g, end, X, BX, c),)
    return heads


@gluon.jit
def fetch(rows, t, ring, j, BX: gl.constexpr, c: gl.constexpr, column=0):
    """Ask the copy engine for tokens t on, from a column on, into turn j's buffer."""
    at = await_empty(ring, j)
    mbarrier.expect(ring[0].index(at), c.C * BX * 2)
    tma.async_copy_global_to_shared(rows, [t.to(gl.int32), column], ring[0].index(at), ring[2].index(at))


@gluon.jit
def send(rows, t, buffer, value, column=0):
    """Store ``value [C, BX]`` as tokens t on, from a column on, through a buffer that is free again when the next is sent."""
    tma.store_wait(0)
    buffer.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(rows, [t.to(gl.int32), column], buffer)


@gluon.jit
def load_scalars(x, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """One number a token, ``[C]``, of ``x [B, T, H]`` given as (pointer, three strides); 0 past n."""
    rows = gl.arange(0, c.C, layout)
    return gl.load(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(gl.int64) * x[2], mask=rows < n, other=0.0)


@gluon.jit
def store_share(x, dz, b, t, h, n, c: gl.constexpr):
    """A program's share of the gradient of the projections of tokens t on, ``[C, LPB]``, to
    ``x [B, T, NVB H, LPB]``."""
    rows = gl.arange(0, c.C, gl.SliceLayout(1, product(c.LPB)))
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, product(c.LPB)))
    offset = rows[:, None].to(gl.int64) * x[2] + slot[None, :]
    gl.store(x[0] + b * x[1] + t * x[2] + h * x[3] + offset, dz, mask=(rows < n)[:, None])


@gluon.jit
def store_scalars(x, value, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """The inverse of :func:`load_scalars`."""
    rows = gl.arange(0, c.C, layout)
    gl.store(x[0] + b * x[1] + t * x[2] + h * x[3] + rows.to(gl.int64) * x[2], value, mask=rows < n)
