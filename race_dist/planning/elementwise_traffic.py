"""Bytes per token that the element-wise kernels of compiled blocks read and write, counted kernel by kernel.

A profile's kernel names show what inductor fuses. Each kernel counts the tensors that it reads once and writes once. Letters
as in :mod:`race_dist.planning.quantities`; ``w`` is the bytes of a number in the parameters' dtype, ``n`` in the compute
dtype.
"""

from __future__ import annotations

from race_dist.planning.layer_costs import layer_cost
from race_dist.planning.layout import Job
from race_dist.planning.quantities import widths


def block_traffic(job: Job, kind: str) -> tuple[float, float]:
    """Forward and backward of one block."""
    (d, _, _, f), w, n = widths(job.model), job.param_bytes, job.compute_bytes
    cast = 0 if n == w else d * (w + n)
    forward, backward = layer_cost(kind).elementwise_traffic(job)
    forward += d * (w + n)  # the first norm
    forward += d * (w + 2 * n)  # the residual stream and the mixing layer's output; the second norm's output
    forward += 3 * f * n  # gate, up, and their product
    forward += d * (2 * w + 2 * n)  # the residual stream, both outputs, and the block's output
    backward += cast  # the block's gradient
    backward += 5 * f * n  # gate, up and the product's gradient; two gradients
    backward += d * (3 * w + 4 * n)  # the second norm: two gradients, both its inputs, the residual's; one uncast, one cast
    backward += d * (3 * n + 5 * w)  # the first: of q, k and v, their sum twice, its input, the residual's, the result
    return forward, backward


def embedding_and_loss_traffic(job: Job) -> tuple[float, float]:
    """Forward (of every pass) and backward: embedding and last norm; hidden states cast, their gradient written, scaled,
    propagated through the norm, and added to the embedding's."""
    d, w, n = job.model.dim, job.param_bytes, job.compute_bytes
    cast = 0 if n == w else d * (w + n)
    return 4 * d * w, 2 * cast + d * (2 + 5 + 1) * w
