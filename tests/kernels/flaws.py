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

from race_dist.kernels.hopper.layouts import by_rows, product
from race_dist.kernels.hopper.pipeline import await_empty, await_full, make_ring, operands, set_empty

FLAWS = {
    "a writer does not wait": "_give writes flaws.py:.* while _take.* reads it|every part waits",
    "a reader does not wait": "_take's products reads flaws.py:.*, which nobody has written|_take.* while _give writes it",
    "a buffer is given back before its products are done": "_give writes flaws.py:.* while _take's products reads it",
    "no fence": "_take's products reads .*, which _give stored without a fence",
    "a product is read too early": "before warpgroup_mma_wait",
    "a buffer is not given back": "every part waits: _take at the barrier of flaws.py.*; _give at ",
    "a buffer is given back twice": "every part waits",
    "a send is not waited for": "_take ends while its last send still reads",
    "the next value meets the last one's send": "_take writes flaws.py:.* while _take's sends reads it",
    "nobody waits": "nobody waits at the barrier of flaws.py",
    "a token too many": "element 24576 of a tensor whose storage holds 24576",
}


@gluon.jit
def hand_on(x, y, turns, flaw: gl.constexpr):
    """``y [n, 64, 64] = x @ x``, one part handing x on, the other multiplying."""
    ring = make_ring(2, 1) + (operands(2, 64, 64),)  # noqa: RUF005
    if flaw == "nobody waits":
        full, _ = make_ring(1, 1)
        mbarrier.arrive(full.index(0))
    rows = tma.make_tensor_descriptor(y, [turns * 64, 64], [64, 1], [64, 64])
    gl.warp_specialize([(_take, (ring, rows, turns, flaw)), (_give, (ring, x, turns, flaw))], [4], [64])


@gluon.jit
def _give(ring, x, turns, flaw: gl.constexpr):
    layout: gl.constexpr = by_rows(64)
    place = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    for i in range(turns):
        at = i % 2
        if flaw != "a writer does not wait":
            await_empty(ring, i)
        ahead = 1 if flaw == "a token too many" else 0
        ring[2].index(at).store(gl.load(x + (i + ahead) * 64 * 64 + place))
        if flaw != "no fence":
            fence_async_shared()
        mbarrier.arrive(ring[0].index(at))


@gluon.jit
def _take(ring, rows, turns, flaw: gl.constexpr):
    staging = operands(1, 64, 64)
    for i in range(turns):
        at = i % 2
        if flaw != "a reader does not wait":
            await_full(ring, i)
        value = ring[2].index(at)
        early = flaw == "a buffer is given back before its products are done"
        product_ = warpgroup_mma(value, value, gl.zeros([64, 64], gl.float32, product(64)), is_async=True)
        if early:
            set_empty(ring, i)
        if flaw == "a product is read too early":
            product_ = product_ * 1.0
        product_ = warpgroup_mma_wait(0, (product_,))
        if not early and flaw != "a buffer is not given back":
            set_empty(ring, i)
        if flaw == "a buffer is given back twice":
            set_empty(ring, i)
        if flaw != "the next value meets the last one's send":
            tma.store_wait(0)
        staging.index(0).store(product_.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(rows, [i * 64, 0], staging.index(0))
    if flaw != "a send is not waited for":
        tma.store_wait(0)
