"""Activation memory: bytes that autograd saves of one chunk's forward pass, and autocast's copies of the weights.

A block is the mixing layer, which its kind counts (:mod:`.race_costs`, :mod:`.softmax_costs`), and SwiGLU, counted here.
"""

from __future__ import annotations

from race_dist.planning.layer_costs import layer_cost, layer_counts, linear_input_activations, norm_activations
from race_dist.planning.layout import Job
from race_dist.planning.parameter_counts import block_linear_layers
from race_dist.planning.quantities import ActivationBytes, ChunkShape


def ffn_activations(job: Job) -> float:
    """SwiGLU: its norm, its input, then gate, silu(gate), up and their product, ``f`` numbers each."""
    token = norm_activations(job) + linear_input_activations(job, 2, full_precision=False)
    return token + 4 * job.model.resolved_ffn_dim * job.compute_bytes


def block_activations(job: Job, kind: str, chunk: ChunkShape) -> ActivationBytes:
    """One block: mixing layer and SwiGLU."""
    if job.compiled:
        return compiled_block_activations(job, kind, chunk)
    return layer_cost(kind).activations(job, chunk) + ActivationBytes(ffn_activations(job))


def compiled_block_activations(job: Job, kind: str, chunk: ChunkShape) -> ActivationBytes:
    """One block as one graph, which recomputes norms, gates and activation functions: the block's input, the outputs of both
    norms and of the mixing layer, SwiGLU's three products, and what the mixing layer saves."""
    d, f = job.model.dim, job.model.resolved_ffn_dim
    block = ActivationBytes(d * job.param_bytes + (3 * d + 3 * f) * job.compute_bytes)
    return block + layer_cost(kind).compiled_activations(job, chunk)


def embedding_and_loss_activations(job: Job, chunk: ChunkShape) -> ActivationBytes:
    """Embedding (the tokens), last norm, loss (gradients of the hidden states and of the head, saved instead of logits), and
    the cosines and sines that layers of one rotary base share (one set for all rows)."""
    m = job.model
    token = 8 + norm_activations(job) + m.dim * job.param_bytes
    bases = {layer_cost(kind).rope_base(m) for kind in layer_counts(m)} - {None}
    token += len(bases) * m.resolved_head_dim * job.param_bytes / chunk.rows
    return ActivationBytes(token, m.vocab_size * m.dim * job.param_bytes)


def autocast_weight_bytes(job: Job) -> int:
    """Copies of the weights in the compute dtype that autocast keeps for the backward pass."""
    if job.compute_bytes == job.param_bytes:
        return 0
    weights = sum(
        count * layer.weights
        for kind, count in layer_counts(job.model).items()
        for layer in block_linear_layers(job.model, kind)
        if not layer.always_full_precision
    )
    return weights * job.compute_bytes
