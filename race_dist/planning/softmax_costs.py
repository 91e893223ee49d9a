"""Costs of window and full softmax layers: parameters, activations, arithmetic, carry."""

from __future__ import annotations

from race_dist.models import ModelConfig
from race_dist.planning.layer_costs import (
    LayerCost,
    attention_projections,
    conv_channels,
    conv_tail_bytes,
    linear_input_activations,
    norm_activations,
)
from race_dist.planning.layout import Job
from race_dist.planning.quantities import ActivationBytes, ChunkShape, Cost, LinearShape, widths


class SoftmaxCost(LayerCost):
    """A full softmax layer: :class:`race_dist.nn.FullAttention`."""

    def linear_layers(self, m: ModelConfig) -> list[LinearShape]:
        return attention_projections(m, m.softmax)

    def parameter_count(self, m: ModelConfig) -> int:
        """Linear layers and convolutions."""
        return sum(layer.weights for layer in self.linear_layers(m)) + m.softmax.short_conv * conv_channels(m, m.softmax)

    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """q, k, v, output, one number per head, and the projection's input."""
        m, (_, a, b, _) = job.model, widths(job.model)
        return self._common_activations(job) + ActivationBytes(
            (3 * a + 2 * b) * job.compute_bytes + m.num_heads * job.param_bytes
        )

    def _common_activations(self, job: Job) -> ActivationBytes:
        """Norm, inputs of the projections, convolutions (with the tail in front), and the gate: its input under autocast (each
        linear layer saves a copy), its logits (SiLU), itself, and its product."""
        m, options, (_, a, _, _) = job.model, job.model.softmax, widths(job.model)
        token = norm_activations(job) + linear_input_activations(job, 3, full_precision=False)
        token += conv_channels(m, options) * job.compute_bytes
        if options.output_gate:
            token += (3 if options.gate_activation == "silu" else 2) * a * job.compute_bytes
            token += m.dim * job.compute_bytes if job.compute_bytes < job.param_bytes else 0
        return ActivationBytes(token)

    def compiled_activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """What the layer saves without a compiler, less the norm and the projections' input, which the block counts."""
        counted = norm_activations(job) + linear_input_activations(job, 3, full_precision=False)
        return self.activations(job, chunk) + ActivationBytes(-counted)

    def elementwise_traffic(self, job: Job) -> tuple[float, float]:
        """Rotary positions, convolutions and gate (counted as a RACE layer's)."""
        m, options, w, n = job.model, job.model.softmax, job.param_bytes, job.compute_bytes
        (d, a, b, _), channels = widths(m), conv_channels(m, options)
        forward, backward = 2 * (a + b) * n + 5 * channels * n, 2 * (a + b) * n + channels * (4 * w + 5 * n)
        if options.output_gate:
            forward, backward = forward + 3 * a * n, backward + 6 * a * n + d * n
        return forward, backward

    def visible_keys(self, job: Job) -> float:
        """Keys that one query reads: half of the context."""
        return job.context / 2

    def head_cost(self, job: Job, chunk: ChunkShape) -> tuple[Cost, Cost]:
        """4 D operations per visible key, 2.5 times as many backward; q, k, v, output and their gradients move."""
        width, compute, keys = job.model.resolved_head_dim, job.compute_bytes, self.visible_keys(job)
        return Cost(4 * width * keys, 4 * width * compute), Cost(10 * width * keys, 8 * width * compute)

    def definition_flops(self, m: ModelConfig) -> float:
        raise ValueError("operations of a full softmax layer depend on the context: it cannot be streamed")

    def tail_bytes(self, job: Job) -> int:
        return conv_tail_bytes(job, job.model.softmax)


class WindowCost(SoftmaxCost):
    """A sliding-window layer: :class:`race_dist.nn.WindowAttention`."""

    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """Keys and values with their tail in front, q, output, one number per head, and the output again as the projection
        reads it. With several rows the blocks' overlapping keys are copied."""
        m, rows, (_, a, b, _) = job.model, chunk.rows, widths(job.model)
        copies = 2.0 if rows > 1 else 1.0
        token = (2 * copies * b + 3 * a) * job.compute_bytes + m.num_heads * job.param_bytes
        edge = rows * m.window * ((2 * b + 2 * a) * job.compute_bytes + 2 * b * 8)  # padding of blocks; indices of the tail
        masks = 2 * (m.num_heads // m.kv_heads) * m.window * (2 * m.window - 1) * job.compute_bytes * (rows if rows > 1 else 1)
        return self._common_activations(job) + ActivationBytes(token, edge + masks)

    def visible_keys(self, job: Job) -> float:
        """The window and the rest of its block."""
        return 2 * min(job.model.window, job.context)

    def definition_flops(self, m: ModelConfig) -> float:
        """4 D operations per key of the window."""
        return 4 * m.resolved_head_dim * m.window

    def tail_bytes(self, job: Job) -> int:
        """Convolution inputs; keys, values and visibility of the window."""
        _, _, b, _ = widths(job.model)
        return super().tail_bytes(job) + (job.model.window - 1) * (2 * b * job.compute_bytes + 1)
