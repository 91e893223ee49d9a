"""The walks of ``walk.py`` and ``walk_backward.py`` for Hopper, in Gluon: each program is a small pipeline of warp groups.

A program walks one tile of one head with four parts that run at the same time, each a chunk ahead of the next:

    loader    (1 warp)   rows come in by the copy engine
    features  (4 warps)  phi of the chunk's keys and queries, as bfloat16 operands in shared memory
    state     (4 warps)  the running state in registers, published as operands before each chunk
    rows      (4 warps)  the chunk's products, and the rows that leave

They hand chunks over in *rings*: ``depth`` buffers, each with a barrier for full and one for empty. The mathematics, the
letters and the Spec ``c`` are those of ``common.py``; 16-bit products only.
"""
