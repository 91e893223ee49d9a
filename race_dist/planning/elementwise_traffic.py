"""Bytes that the element-wise kernels of compiled blocks read and write, a token, counted kernel by kernel.

What inductor fuses can be read off a profile's kernel names; here each kernel counts the tensors that it reads once and writes
once. Letters as in :mod:`race_dist.planning.tally`; ``w`` and ``n`` are the bytes of a wide and of a narrow number.
"""

from __future__ import annotations

from race_dist.planning.layout import Job
from race_dist.planning.tally import conv_channels, layer_options, widths


def block_traffic(job: Job, kind: str) -> tuple[float, float]:
    """Forward and backward of one block."""
    (d, _, _, f), w, n = widths(job.model), job.param_bytes, job.compute_bytes
    cast = 0 if n == w else d * (w + n)
    forward, backward = _race(job) if kind == "R" else _softmax(job, kind)
    forward += d * (w + n)  # the first norm
    forward += d * (w + 2 * n)  # the residual stream and the mixer's output; the second norm's output
    forward += 3 * f * n  # gate, up, and their product
    forward += d * (2 * w + 2 * n)  # the residual stream, both outputs, and what the block hands on
    backward += cast  # the block's gradient
    backward += 5 * f * n  # gate, up and the product's gradient; two gradients
    backward += d * (3 * w + 4 * n)  # the second norm: two gradients, both its inputs, the residual's; a wide and a narrow one
    backward += d * (3 * n + 5 * w)  # the first: of q, k and v, their sum twice, its input, the residual's, the result
    return forward, backward


def _race(job: Job) -> tuple[float, float]:
    """Between the projections of a RACE layer."""
    m, w, n = job.model, job.param_bytes, job.compute_bytes
    race, (d, a, b, _) = m.race, widths(m)
    both, forward, backward = a + b, 0.0, 0.0
    if race.decay == "token" and n < w:
        forward += d * w  # the norm's output once more, for the wide product
        backward += d * w
    if race.short_conv:
        forward += conv_channels(m, "R") * 2 * n  # behind their tail
        backward += (
            4 * conv_channels(m, "R") * (w + n)
        )  # the taps' gradient and the inputs': four kernels read the wide gradient
    if race.short_conv or race.qk_norm:
        forward += both * (2 * n + w + n)  # both terms of the convolution; the sum, wide; at unit length, narrow
        backward += both * (n + 2 * w)
    if race.rope_base is not None:
        forward += both * 2 * n
        backward += both * 2 * n
    if race.normalization == "none":
        forward += a * n  # a head's mean square
        backward += 4 * a * n
    if race.output_gate:
        backward += d * n  # the gate's gradient at the first norm
    if race.output_gate or race.normalization == "none":
        forward += 3 * a * n  # output, gate, and their product
        backward += 6 * a * n  # product's gradient, output, gate, two gradients; read again for the norm's weight
    return forward, backward


def _softmax(job: Job, kind: str) -> tuple[float, float]:
    """Of a window or softmax layer: rotary positions, convolutions and gate (counted as a RACE layer's)."""
    (d, a, b, _), w, n = widths(job.model), job.param_bytes, job.compute_bytes
    taken = conv_channels(job.model, kind)
    forward, backward = 2 * (a + b) * n + 5 * taken * n, 2 * (a + b) * n + taken * (4 * w + 5 * n)
    if layer_options(job.model, kind).output_gate:
        forward, backward = forward + 3 * a * n, backward + 6 * a * n + d * n
    return forward, backward


def embedding_and_loss_traffic(job: Job) -> tuple[float, float]:
    """Forward (of every pass) and backward: embedding and last norm; hidden states cast, their gradient written, scaled and
    taken through the norm, and added to the embedding's."""
    d, w, n = job.model.dim, job.param_bytes, job.compute_bytes
    cast = 0 if n == w else d * (w + n)
    return 4 * d * w, 2 * cast + d * (2 + 5 + 1) * w
