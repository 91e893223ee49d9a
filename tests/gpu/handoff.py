"""The smallest hand-off between two parts of a program, right by construction: what racecheck reports of it is the tool's.

    compute-sanitizer --tool racecheck python -m tests.gpu.handoff

One part stores a vector and arrives at a barrier, the other waits for the barrier and loads it, as every ring of
``kernels/hopper`` does.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from race_dist.kernels.hopper.pipeline import await_empty, make_ring, next_full, set_empty, set_full, vectors

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def hand_on(x, y, turns, SIZE: gl.constexpr):
    ring = make_ring(2, 1) + (vectors(2, SIZE),)  # noqa: RUF005
    gl.warp_specialize([(_take, (ring, y, turns, SIZE)), (_give, (ring, x, turns, SIZE))], [4], [64])


@gluon.jit
def _give(ring, x, turns, SIZE: gl.constexpr):
    for i in range(turns):
        ring[2].index(await_empty(ring, i)).store(gl.load(x + i * SIZE + gl.arange(0, SIZE, LINE)))
        set_full(ring, i)


@gluon.jit
def _take(ring, y, turns, SIZE: gl.constexpr):
    for i in range(turns):
        value = next_full(ring, i).load(LINE)
        set_empty(ring, i)
        gl.store(y + i * SIZE + gl.arange(0, SIZE, LINE), value)


def main() -> None:
    """Copy by hand-off, and check the copy."""
    x = torch.randn(16, 256, device="cuda")
    y = torch.zeros_like(x)
    hand_on[(8,)](x, y, 16, 256, num_warps=4)
    print("equal", torch.equal(x, y))


if __name__ == "__main__":
    main()
