"""The smallest hand-off between two partitions, right by construction: what racecheck reports of it is the tool's.

    compute-sanitizer --tool racecheck python -m tests.gpu.handoff

One partition stores a vector and arrives at an mbarrier, the other waits for the mbarrier and loads it, as in every pipeline of
``kernels/hopper``.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from race_dist.kernels.hopper.layouts import LINE_LAYOUT
from race_dist.kernels.hopper.pipeline import Pipeline, allocate_vectors, make_mbarriers


@gluon.jit
def copy_kernel(x, y, turns, SIZE: gl.constexpr):
    full, empty = make_mbarriers(2, 1)
    pipe = Pipeline(full, empty, allocate_vectors(2, SIZE))
    gl.warp_specialize([(store_partition, (pipe, y, turns, SIZE)), (load_partition, (pipe, x, turns, SIZE))], [4], [64])


@gluon.jit
def load_partition(pipe, x, turns, SIZE: gl.constexpr):
    for i in range(turns):
        pipe.produce(i, gl.load(x + i * SIZE + gl.arange(0, SIZE, LINE_LAYOUT)))


@gluon.jit
def store_partition(pipe, y, turns, SIZE: gl.constexpr):
    for i in range(turns):
        value = pipe.consumer_buffer(i).load(LINE_LAYOUT)
        pipe.consumer_release(i)
        gl.store(y + i * SIZE + gl.arange(0, SIZE, LINE_LAYOUT), value)


def main() -> None:
    """Copy from one partition to the other, and check the copy."""
    x = torch.randn(16, 256, device="cuda")
    y = torch.zeros_like(x)
    copy_kernel[(8,)](x, y, 16, 256, num_warps=4)
    print("equal", torch.equal(x, y))


if __name__ == "__main__":
    main()
