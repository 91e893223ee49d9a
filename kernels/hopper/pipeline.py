"""Pipelines of shared memory between the partitions of a program, synchronized by mbarriers, and TMA through them.

A pipeline has ``depth`` stages (a power of two), each with a full and an empty mbarrier. Turn j uses stage ``j % depth``; the
phase of its mbarriers flips every ``depth`` turns.

    producer_acquire(j) -> stage    wait until the consumers have released the stage
    producer_commit(j)              mark the stage's buffers as full
    consumer_wait(j) -> stage       wait until the stage is full
    consumer_release(j)             release the stage to the producer
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from race_dist.kernels.hopper.aggregate import aggregate
from race_dist.kernels.hopper.layouts import MATRIX_LAYOUT, VECTOR_LAYOUT, shared_layout, wgmma_layout


class Mbarriers:
    """The methods of a pipeline, over its fields ``full`` and ``empty``."""

    @gluon.jit
    def producer_acquire(self, j):
        """Wait until turn j's buffers may be written; their stage."""
        depth: gl.constexpr = self.full.shape[0]
        mbarrier.wait(self.empty.index(j & (depth - 1)), (j & depth) // depth ^ 1)
        return j & (depth - 1)

    @gluon.jit
    def producer_commit(self, j):
        """Mark turn j's buffers as full: what ordinary stores wrote is visible to wgmma and TMA too."""
        fence_async_shared()
        mbarrier.arrive(self.full.index(j & (self.full.shape[0] - 1)))

    @gluon.jit
    def consumer_wait(self, j):
        """Wait until turn j's buffers are full; their stage."""
        depth: gl.constexpr = self.full.shape[0]
        mbarrier.wait(self.full.index(j & (depth - 1)), (j & depth) // depth)
        return j & (depth - 1)

    @gluon.jit
    def consumer_release(self, j, pred=True):
        """Release turn j's buffers to the producer."""
        mbarrier.arrive(self.empty.index(j & (self.empty.shape[0] - 1)), pred=pred)


@aggregate
class Pipeline(Mbarriers):
    """A pipeline of one buffer per stage."""

    full: gl.shared_memory_descriptor  # [depth, 1] mbarriers
    empty: gl.shared_memory_descriptor  # [depth, 1] mbarriers
    buffers: gl.shared_memory_descriptor  # [depth, ...]

    @gluon.jit
    def consumer_buffer(self, j):
        """Turn j's buffer, once it is full."""
        return self.buffers.index(self.consumer_wait(j))

    @gluon.jit
    def produce(self, j, value):
        """Store ``value``, converted to the buffers' type, as turn j's buffer, and commit it."""
        self.buffers.index(self.producer_acquire(j)).store(value.to(self.buffers.dtype))
        self.producer_commit(j)


@gluon.jit
def make_mbarriers(depth: gl.constexpr, consumers: gl.constexpr):
    """The full and the empty mbarriers of a pipeline that ``consumers`` partitions read.

    Make no mbarrier that no partition waits for: the compiler gives its shared memory to other buffers, and its initialization
    then corrupts what is stored there (seen on an H100)."""
    full = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [depth, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(depth):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=consumers)
    return full, empty


@gluon.jit
def make_pipeline(depth: gl.constexpr, consumers: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """A pipeline of bfloat16 operands ``[rows, columns]``."""
    full, empty = make_mbarriers(depth, consumers)
    return Pipeline(full, empty, allocate_operands(depth, rows, columns))


@gluon.jit
def make_float32_pipeline(depth: gl.constexpr, consumers: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """A pipeline of float32 matrices ``[rows, columns]``."""
    full, empty = make_mbarriers(depth, consumers)
    return Pipeline(full, empty, gl.allocate_shared_memory(gl.float32, [depth, rows, columns], MATRIX_LAYOUT))


@gluon.jit
def allocate_operands(depth: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """``depth`` buffers of bfloat16 operands ``[rows, columns]``."""
    return gl.allocate_shared_memory(gl.bfloat16, [depth, rows, columns], shared_layout(rows, columns))


@gluon.jit
def allocate_vectors(depth: gl.constexpr, size: gl.constexpr):
    """``depth`` buffers of float32 vectors ``[size]``."""
    return gl.allocate_shared_memory(gl.float32, [depth, size], VECTOR_LAYOUT)


@gluon.jit
def opaque(j):
    """j, hidden from the compiler's loop analysis: it would compute the addresses of every turn's operands before the loop,
    more than there are registers, and spill them."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [j], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def make_row_descriptor(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """A TMA descriptor of head h of row b of ``x [B, T, H, X]``, tokens before ``end``, C at a time."""
    ptr = x.ptr + b * x.stride_b + h * x.stride_h
    return tma.make_tensor_descriptor(
        ptr, [end.to(gl.int32), X], [x.stride_t.to(gl.int64), 1], [c.C, BX], shared_layout(c.C, BX)
    )


@gluon.jit
def make_group_descriptors(x, b, h, end, X: gl.constexpr, BX: gl.constexpr, c: gl.constexpr):
    """:func:`make_row_descriptor` of each query head that reads key/value head h."""
    descriptors = ()
    for g in gl.static_range(c.G):
        descriptors = descriptors + (make_row_descriptor(x, b, h * c.G + g, end, X, BX, c),)
    return descriptors


@gluon.jit
def tma_load(descriptor, t, pipe, j, BX: gl.constexpr, c: gl.constexpr, column=0):
    """Start to load tokens t .. t + C, columns ``column`` .. ``column + BX``, into turn j's buffer; TMA commits it."""
    stage = pipe.producer_acquire(j)
    mbarrier.expect(pipe.full.index(stage), c.C * BX * 2)
    tma.async_copy_global_to_shared(descriptor, [t.to(gl.int32), column], pipe.full.index(stage), pipe.buffers.index(stage))


@gluon.jit
def tma_store(descriptor, t, staging, value, column=0):
    """Start to store ``value [C, BX]`` as tokens t .. t + C, columns ``column`` on, through the buffer ``staging``, once the
    store before has read it."""
    tma.store_wait(0)
    staging.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(descriptor, [t.to(gl.int32), column], staging)


@gluon.jit
def load_scalars(x, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """Tokens t .. t + C of head h of ``x [B, T, H]``, ``[C]``; zeros from the n-th on."""
    rows = gl.arange(0, c.C, layout)
    pointer = x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + rows.to(gl.int64) * x.stride_t
    return gl.load(pointer, mask=rows < n, other=0.0)


@gluon.jit
def store_scalars(x, value, b, t, h, n, layout: gl.constexpr, c: gl.constexpr):
    """The inverse of :func:`load_scalars`."""
    rows = gl.arange(0, c.C, layout)
    pointer = x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + rows.to(gl.int64) * x.stride_t
    gl.store(pointer, value, mask=rows < n)


@gluon.jit
def store_partial_gradient(x, dz, b, t, h, n, c: gl.constexpr):
    """Store ``dz [C, LPB]``, a program's part of the gradient of the projections, to ``x [B, T, NVB H, LPB]``."""
    rows = gl.arange(0, c.C, gl.SliceLayout(1, wgmma_layout(c.LPB)))
    slot = gl.arange(0, c.LPB, gl.SliceLayout(0, wgmma_layout(c.LPB)))
    offset = rows[:, None].to(gl.int64) * x.stride_t + slot[None, :]
    gl.store(x.ptr + b * x.stride_b + t * x.stride_t + h * x.stride_h + offset, dz, mask=(rows < n)[:, None])
