"""The cost of a RACE layer, counted from its configuration; tests compare it with autograd and a profiler."""

from __future__ import annotations

from race_dist.kernels.tiles import fitted_tile
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
from race_dist.planning.roofline import Roofline

MATMUL_CHUNK = 64  # tokens of one block of matrix products inside the attention
TENSOR_CORE = 16  # smallest side of a product on tensor cores; smaller sides are padded
REGISTER_FEATURES = 64  # the recurrent Triton kernels keep up to this many features of a head in registers
NUM_SMS = 132  # for which these kernels choose their tiles
MATERIALIZED_TILE = 64  # with more features, and for "bucket": one saved state per block of matrix products
CPU_TILE_TENSORS = (
    5  # features, their products and gradients that the PyTorch backend holds of one tile (counted with a profiler)
)


class RaceCost(LayerCost):
    """A RACE layer: :class:`race_dist.nn.RaceAttention`."""

    def linear_layers(self, m: ModelConfig) -> list[LinearShape]:
        shapes = attention_projections(m, m.race)
        if m.race.decay == "token":  # bfloat16 decay rates would be too coarse
            shapes.append(LinearShape(m.dim, m.kv_heads, always_full_precision=True))
        return shapes

    def parameter_count(self, m: ModelConfig) -> int:
        """Linear layers, convolutions, output norm, scales of queries and keys, beta, decay bias, planes."""
        race, (_, a, _, _) = m.race, widths(m)
        count = sum(layer.weights for layer in self.linear_layers(m)) + race.short_conv * conv_channels(m, race)
        count += a if race.normalization == "none" else 0
        count += m.num_heads + m.kv_heads if race.qk_norm else 0
        count += m.kv_heads if race.train_beta else 0
        count += m.kv_heads if race.decay == "token" else 0
        if race.train_planes:
            count += race.num_tables * race.num_planes * m.resolved_head_dim * (1 if race.share_planes else m.kv_heads)
        return count

    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """In the order of the layer's forward pass."""
        m, full, compute = job.model, job.param_bytes, job.compute_bytes
        race, (_, a, b, _), heads = m.race, widths(m), m.num_heads + m.kv_heads
        token = norm_activations(job)
        token += linear_input_activations(job, 4 if race.output_gate else 3, full_precision=race.decay == "token")
        token += conv_channels(m, race) * compute  # with the tail in front: for the gradient of the filters
        if race.qk_norm:
            token += (2 * (a + b) + heads) * full  # before and after the normalization, in the compute dtype
        if race.decay == "token":
            token += 2 * m.kv_heads * full  # before and after the softplus
        token += (2 * a + 2 * b) * compute  # the attention's q, k, v and output
        if race.normalization == "global":
            token += m.num_heads * full  # its denominators
        if race.normalization == "none":
            token += (a + m.num_heads) * full  # the output norm: the scaled input, and one number per head
            token += a * full if compute < full else 0  # its input, unless that is the attention's output
        if race.output_gate:
            token += (3 if race.gate_activation == "silu" else 2) * a * compute  # gated values, input of SiLU, the gate
        if race.output_gate or race.normalization == "none":
            token += a * compute  # input of the output projection; otherwise it is the attention's output
        return ActivationBytes(token) + self._saved_states(job, chunk)

    def compiled_activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """Norms, gates and activations are recomputed. Saved are the attention's q, k, v and output, queries and keys with
        the tail in front, and, in the parameters' precision, the input of the normalization of queries and keys."""
        m, full, compute = job.model, job.param_bytes, job.compute_bytes
        race, (_, a, b, _) = m.race, widths(m)
        token = float((2 * a + 2 * b) * compute)
        token += (a + b) * compute if race.short_conv or race.qk_norm else 0
        token += b * compute if race.conv_values else 0
        token += (a + b) * full if race.short_conv and race.qk_norm else 0
        token += a * compute if race.output_gate else 0
        token += a * compute if race.output_gate or race.normalization == "none" else 0
        token += (2 * m.num_heads + 3 * m.kv_heads) * full  # of norms, decay rates and denominators
        return ActivationBytes(token) + self._saved_states(job, chunk)

    def _saved_states(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """One state per tile; initial and final states (twice as wide when streamed), and a ragged last tile."""
        m = job.model
        state = m.kv_heads * m.race.num_features * (m.resolved_head_dim + 1) * job.param_bytes
        return ActivationBytes(state / state_tile(m, chunk), chunk.rows * 5 * state)

    def elementwise_traffic(self, job: Job) -> tuple[float, float]:
        m, w, n = job.model, job.param_bytes, job.compute_bytes
        race, (d, a, b, _) = m.race, widths(m)
        qk, channels, forward, backward = a + b, conv_channels(m, race), 0.0, 0.0
        if race.decay == "token" and n < w:
            forward += d * w  # the norm's output once more, for the product in full precision
            backward += d * w
        if race.short_conv:
            forward += channels * 2 * n  # concatenation with the tail
            backward += 4 * channels * (w + n)  # gradients of filters and inputs: four kernels read the uncast gradient
        if race.short_conv or race.qk_norm:
            forward += qk * (2 * n + w + n)  # both terms of the convolution; their sum in full precision; normalized and cast
            backward += qk * (n + 2 * w)
        if self.rope_base(m) is not None:
            forward += qk * 2 * n
            backward += qk * 2 * n
        if race.normalization == "none":
            forward += a * n  # mean square per head
            backward += 4 * a * n
        if race.output_gate:
            backward += d * n  # the gate's gradient at the first norm
        if race.output_gate or race.normalization == "none":
            forward += 3 * a * n  # output, gate, and their product
            backward += 6 * a * n  # the product's gradient, output, gate, two gradients; read again for the norm's weight
        return forward, backward

    def head_cost(self, job: Job, chunk: ChunkShape) -> tuple[Cost, Cost]:
        return attention_cost(job.model, job.compute_bytes, state_tile(job.model, chunk))

    def head_seconds(self, job: Job, chunk: ChunkShape, roofline: Roofline) -> tuple[float, float]:
        slowdown = roofline.rates.attention_slowdown(job.model.race.num_features)
        forward, backward = self.head_cost(job, chunk)
        return roofline.attention(forward, slowdown[0]), roofline.attention(backward, slowdown[1])

    def definition_flops(self, m: ModelConfig) -> float:
        """Two hashes (2 D L P each), one update and one read of the state (2 S D each), and half a chunk of C tokens (C (S +
        D))."""
        width, race = m.resolved_head_dim, m.race
        hashing, state = 4 * width * race.num_tables * race.num_planes, 4 * race.num_features * width
        return hashing + state + MATMUL_CHUNK * (race.num_features + width)

    def rope_base(self, m: ModelConfig) -> float | None:
        return m.race.resolved_rope_base(m.rope_base)

    def state_numbers(self, m: ModelConfig) -> int:
        """Mass and values of every feature and the log decay, for each key/value head."""
        return m.kv_heads * (m.race.num_features * (m.resolved_head_dim + 1) + (m.race.decay != "none"))

    def tail_bytes(self, job: Job) -> int:
        return conv_tail_bytes(job, job.model.race)

    def backward_temporaries(self, job: Job, chunk: ChunkShape) -> float | None:
        """On the CPU: gradients of q, k and v, and some tensors of a tile's features (the Triton kernels keep them in
        registers)."""
        if not chunk.on_cpu:
            return None
        m, (_, a, b, _) = job.model, widths(job.model)
        features = chunk.rows * state_tile(m, chunk) * (m.num_heads + m.kv_heads) * m.race.num_features * job.param_bytes
        freed = 4 * a * job.compute_bytes if m.race.output_gate else 0  # saved by the layer's output side
        return CPU_TILE_TENSORS * features + chunk.rows * chunk.tokens * ((a + 2 * b) * job.compute_bytes - freed)


def state_tile(m: ModelConfig, chunk: ChunkShape) -> int:
    """Tokens that share one saved state inside a layer.

    The PyTorch backend works on tiles of 8 to 64 chunks of 64 tokens (128 from 128 features on), so that about 2**14 query rows
    are in work at a time. The Triton kernels save one state per tile, whose length fits the GPU's SMs, or one state every
    ``MATERIALIZED_TILE`` tokens where the features of a head do not fit the registers.
    """
    if chunk.on_cpu:
        size = 64 if m.race.num_features <= 128 else 128
        tokens = size * min(64, max(8, 2**14 // (size * chunk.rows * m.num_heads)))
    elif m.race.num_features > REGISTER_FEATURES or m.race.normalization == "bucket":
        tokens = MATERIALIZED_TILE
    else:
        tokens = fitted_tile(chunk.tokens, chunk.rows * m.kv_heads, NUM_SMS)
    return max(1, min(tokens, chunk.tokens))


def attention_cost(m: ModelConfig, compute_bytes: int, tile: int) -> tuple[Cost, Cost]:
    """The RACE attention of one token and query head, forward and backward.

    Arithmetic, with products padded to tensor-core sizes (``S'``, ``P'`` = max(16, .) of S features and of L P planes):
    hashing a row is a product with the planes (2 D P') and one of log-features with signs (2 x 2 P' S', twice as expensive in
    TF32). Forward: keys are hashed for the tile sums and again for the output, queries once (3 hashes); three products with a
    state (2 S' D: sum, running state, read); and, inside a chunk of C tokens, Fq Fk^T and its product with V (2 C (S' + D)).
    Backward: queries and keys are hashed in both kernels (4); six products with a state (prefix state, its reading, suffix sums
    twice, its readings for features and for values); three in-chunk products with features and three with values; and the
    gradient through the planes for queries and keys.

    Bytes: forward reads k, v, then q, k, v and writes the output (6 D numbers); backward reads q, k, v and the gradient
    twice and writes three gradients, less what the second kernel finds in cache (10 D). Saved states are written, scanned
    (read and written) and read: 4 times S (D + 1) float32 per tile, in each direction.
    """
    width, race = m.resolved_head_dim, m.race
    s, p = max(TENSOR_CORE, race.num_features), max(TENSOR_CORE, race.num_tables * race.num_planes)
    group = m.num_heads / m.kv_heads
    hashing, state, c = 2 * width * p + 8 * p * s, 2 * s * width, MATMUL_CHUNK
    states = 4 * race.num_features * (width + 1) * 4 / tile / group
    forward = Cost(3 * hashing + 3 * state + 2 * c * (s + width), 6 * width * compute_bytes + states)
    backward = Cost(4 * hashing + 6 * state + 6 * c * (s + width) + 4 * width * p, 10 * width * compute_bytes + states)
    return forward, backward
