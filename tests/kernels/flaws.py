"""A small pipeline, and the ways of getting one wrong: what the emulation has to find."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from race_dist.kernels.hopper.layouts import blocked_layout, wgmma_layout
from race_dist.kernels.hopper.pipeline import allocate_operands, make_mbarriers, make_pipeline

LOAD, MMA = "load_partition", "mma_partition"
FLAWS = {
    "a producer does not wait": f"{LOAD} writes flaws.py:.* while {MMA}.* reads it|every partition waits",
    "a consumer does not wait": (
        f"{MMA}'s products reads flaws.py:.*, which nobody has written|{MMA}.* while {LOAD} writes it"
    ),
    "a buffer is released before its products are done": f"{LOAD} writes flaws.py:.* while {MMA}'s products reads it",
    "no fence": f"{MMA}'s products reads .*, which {LOAD} stored without a fence",
    "a product is read too early": "before warpgroup_mma_wait",
    "a buffer is not released": f"every partition waits: {MMA} at the mbarrier of flaws.py.*; {LOAD} at ",
    "a buffer is released twice": "every partition waits",
    "a store is not waited for": f"{MMA} ends while its last TMA store still reads",
    "a value overwrites the last one's store": f"{MMA} writes flaws.py:.* while {MMA}'s TMA stores reads it",
    "nobody waits": "nobody waits at the mbarrier of flaws.py",
    "a token too many": "element 24576 of a tensor whose storage holds 24576",
}


@gluon.jit
def square_kernel(x, y, turns, flaw: gl.constexpr):
    """``y [n, 64, 64] = x @ x``: one partition hands x on, the other multiplies."""
    pipe = make_pipeline(2, 1, 64, 64)
    if flaw == "nobody waits":
        full, _ = make_mbarriers(1, 1)
        mbarrier.arrive(full.index(0))
    y_desc = tma.make_tensor_descriptor(y, [turns * 64, 64], [64, 1], [64, 64])
    gl.warp_specialize([(mma_partition, (pipe, y_desc, turns, flaw)), (load_partition, (pipe, x, turns, flaw))], [4], [64])


@gluon.jit
def load_partition(pipe, x, turns, flaw: gl.constexpr):
    layout: gl.constexpr = blocked_layout(64)
    rows, columns = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    offset = rows[:, None] * 64 + columns[None, :]
    for i in range(turns):
        stage = i % 2
        if flaw != "a producer does not wait":
            pipe.producer_acquire(i)
        ahead = 1 if flaw == "a token too many" else 0
        pipe.buffers.index(stage).store(gl.load(x + (i + ahead) * 64 * 64 + offset))
        if flaw != "no fence":
            fence_async_shared()
        mbarrier.arrive(pipe.full.index(stage))


@gluon.jit
def mma_partition(pipe, y_desc, turns, flaw: gl.constexpr):
    staging = allocate_operands(1, 64, 64)
    for i in range(turns):
        stage = i % 2
        if flaw != "a consumer does not wait":
            pipe.consumer_wait(i)
        value = pipe.buffers.index(stage)
        early = flaw == "a buffer is released before its products are done"
        square = warpgroup_mma(value, value, gl.zeros([64, 64], gl.float32, wgmma_layout(64)), is_async=True)
        if early:
            pipe.consumer_release(i)
        if flaw == "a product is read too early":
            square = square * 1.0
        square = warpgroup_mma_wait(0, (square,))
        if not early and flaw != "a buffer is not released":
            pipe.consumer_release(i)
        if flaw == "a buffer is released twice":
            pipe.consumer_release(i)
        if flaw != "a value overwrites the last one's store":
            tma.store_wait(0)
        staging.index(0).store(square.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [i * 64, 0], staging.index(0))
    if flaw != "a store is not waited for":
        tma.store_wait(0)
