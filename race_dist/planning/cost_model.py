"""Arithmetic and seconds of one optimizer step on one GPU, by part; communication is in :mod:`.communication_cost`.

Every part is a roofline: the longer of its arithmetic at the achieved peak and its bytes at the achieved bandwidth. What only a
measurement can say (the achieved rates) is in :class:`race_dist.planning.device_rates.Rates`; everything else is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from race_dist.models import ModelConfig
from race_dist.planning.activation_memory import block_activations
from race_dist.planning.carry_sizes import chunk_start_states
from race_dist.planning.device_rates import Rates
from race_dist.planning.elementwise_traffic import block_traffic, embedding_and_loss_traffic
from race_dist.planning.layer_costs import layer_cost, layer_counts, norm_activations
from race_dist.planning.layout import Job, Layout
from race_dist.planning.parameter_counts import block_linear_layers, matmul_parameter_count, parameter_count
from race_dist.planning.quantities import ChunkShape, Cost, LinearShape
from race_dist.planning.roofline import Roofline


@dataclass(frozen=True)
class PassCounts:
    """How often each token's blocks run forward and backward; the head runs once each way."""

    forward: float
    backward: float = 1.0

    @property
    def forward_units(self) -> float:
        """In units of one forward pass: a backward pass counts twice (gradients of inputs and of weights)."""
        return self.forward + 2 * self.backward


def count_passes(job: Job, layout: Layout) -> PassCounts:
    """One forward pass that is differentiated; one more over all chunks but the last when streamed; one more with
    checkpointing. So 6 x parameters x tokens operations become 8 when streamed, 10 with both."""
    chunks = layout.chunks(job)
    streamed = 0.0 if layout.chunk_size is None else (chunks - 1) / chunks
    return PassCounts(1.0 + streamed + layout.checkpointing)


def linear_cost(job: Job, layer: LinearShape) -> Cost:
    """One token through one linear layer: ``2 in out`` operations; the token is read and its product written (the weights
    are read once for thousands of tokens)."""
    size = job.param_bytes if layer.always_full_precision else job.compute_bytes
    return Cost(2 * layer.weights, size * (layer.inputs + layer.outputs))


def useful_flops(job: Job) -> float:
    """Operations of the step that any method needs: 6 x matrix parameters x tokens, and the attention once forward and
    once backward. Recomputation by streaming and checkpointing does not count."""
    m, tokens = job.model, job.context * job.batch
    whole = ChunkShape(job.batch, job.context, on_cpu=False)
    attention = 0.0
    for kind, count in layer_counts(m).items():
        attention += count * m.num_heads * sum(cost.flops for cost in layer_cost(kind).head_cost(job, whole))
    return tokens * (6 * matmul_parameter_count(m) + attention)


def streamed_flops(m: ModelConfig, tokens: int) -> float:
    """Operations of one streamed step, as they are usually counted: 8 x parameters x tokens, and the attention by its
    definition: two forward passes, and a backward pass of twice the work of one."""
    attention = sum(count * m.num_heads * layer_cost(kind).definition_flops(m) for kind, count in layer_counts(m).items())
    return float(tokens) * (8 * parameter_count(m) + 4 * attention)


# --- seconds -------------------------------------------------------------------------------------------------------------


def matmul_seconds(job: Job, layout: Layout, roofline: Roofline) -> float:
    """Matrix products of this GPU's tokens: blocks by their passes, the head 3 times a forward product."""
    tokens = layout.rows(job) * layout.shard(job)
    units = count_passes(job, layout).forward_units
    seconds = sum(
        count * roofline.matmul(linear_cost(job, layer) * units)
        for kind, count in layer_counts(job.model).items()
        for layer in block_linear_layers(job.model, kind)
    )
    return tokens * (seconds + roofline.matmul(linear_cost(job, LinearShape(job.model.dim, job.model.vocab_size)) * 3))


def attention_seconds(job: Job, layout: Layout, roofline: Roofline) -> tuple[float, float]:
    """One token through the attention of all layers, forward and backward."""
    m, chunk = job.model, layout.chunk_shape(job, roofline.cluster)
    forward, backward = 0.0, 0.0
    for kind, count in layer_counts(m).items():
        head_forward, head_backward = layer_cost(kind).head_seconds(job, chunk, roofline)
        forward += count * m.num_heads * head_forward
        backward += count * m.num_heads * head_backward
    return forward, backward


def elementwise_seconds(job: Job, layout: Layout, roofline: Roofline) -> float:
    """Norms, positions, gates, casts and logits: of compiled blocks by the bytes that their kernels move, otherwise by the
    bytes that autograd saves of them (see ``Rates``). A logit is written, read for its sum, read and written for its
    gradient, and read twice by products: 6 uncast numbers."""
    forward, backward = _compiled_bytes(job, roofline.rates) if job.compiled else _eager_bytes(job, layout, roofline)
    moved = forward * count_passes(job, layout).forward + backward + 6 * job.model.vocab_size * job.param_bytes
    return layout.rows(job) * layout.shard(job) * moved / roofline.bandwidth


def _compiled_bytes(job: Job, rates: Rates) -> tuple[float, float]:
    """Bytes per token of all compiled blocks, the embedding and the loss, forward and backward."""
    parts = [embedding_and_loss_traffic(job), *(block_traffic(job, kind) for kind in job.model.layer_kinds)]
    return rates.compiled_forward * sum(p[0] for p in parts), rates.compiled_backward * sum(p[1] for p in parts)


def _eager_bytes(job: Job, layout: Layout, roofline: Roofline) -> tuple[float, float]:
    """The same without a compiler."""
    rates, chunk = roofline.rates, layout.chunk_shape(job, roofline.cluster)
    blocks = sum(count * block_activations(job, kind, chunk).per_token for kind, count in layer_counts(job.model).items())
    last_norm = norm_activations(job) * (rates.elementwise_forward + rates.elementwise_backward)
    return blocks * rates.elementwise_forward, blocks * rates.elementwise_backward + last_norm


def optimizer_seconds(job: Job, layout: Layout, roofline: Roofline) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them; clipping reads and writes the gradient."""
    share = layout.ranks if layout.sharding == "fsdp" else 1
    return (7 / share + 3) * parameter_count(job.model) * job.param_bytes / roofline.bandwidth


def launch_seconds(job: Job, layout: Layout, roofline: Roofline) -> float:
    """Seconds in which the host launches all kernels: small chunks are launch-bound. CPUs launch nothing."""
    if roofline.cluster.on_cpu:
        return 0.0
    units = count_passes(job, layout).forward_units
    return layout.chunks(job) * job.model.num_layers * roofline.rates.host_forward * units


def offload_seconds(job: Job, layout: Layout, roofline: Roofline) -> float:
    """Carries at chunk starts to the host and back, as far as computation does not hide it."""
    if layout.keep != "host":
        return 0.0
    return (1 - roofline.rates.overlap) * 2 * chunk_start_states(job, layout) / roofline.cluster.gpu.host
