"""The chunk recurrences of ``recurrent_fwd.py`` and ``recurrent_bwd.py`` for Hopper, in Gluon, as warp-specialized pipelines.

A program runs a tile of one head with four partitions at the same time, each a chunk ahead of the next:

    load_partition   (1 warp)   TMA loads of rows
    hash_partition   (4 warps)  phi of the chunk's keys and queries, as bfloat16 operands in shared memory
    state_partition  (4 warps)  the running state in registers, published as operands before each chunk
    mma_partition    (4 warps)  the chunk's products, and the rows that TMA stores (the default partition)

Chunks pass from one partition to the next through pipelines (``pipeline.py``): buffers in shared memory with a full and an
empty mbarrier each. Each kernel's partitions share one ``PartitionArgs``. The mathematics, the letters and the Spec ``c`` are
those of the Triton kernels; products take bfloat16 operands only.
"""
