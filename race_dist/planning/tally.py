"""What a model is made of, counted from its configuration: weights, what autograd saves of a block, what a layer carries.

Letters: B rows, T tokens of a row on one rank, H heads (Hq of queries, Hkv of keys), D width of a head, S features,
L tables, P planes. ``a = Hq D`` and ``b = Hkv D`` are the widths of queries and of keys, ``d`` that of the model, ``f`` that
of the SwiGLU. *wide* numbers have the size of the weights, *narrow* ones that of matrix products (2 bytes under bfloat16).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from race_dist.kernels.tiles import fitted_tile
from race_dist.models import ModelConfig
from race_dist.nn import RaceConfig, SoftmaxConfig
from race_dist.planning.layout import Job

WALK_FEATURES = 64  # the Triton kernels keep all features of a head in registers up to this many
PROCESSORS = 132  # that their tiles then fit
SNAPSHOT_TILE = 64  # above it (and for "bucket") one state a matrix-product chunk
LOSS_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # logits that exist at a time unless loss_chunk says otherwise


@dataclass(frozen=True)
class LinearShape:
    """One linear map of a block: its sizes, and whether its product is wide whatever the precision."""

    inputs: int
    outputs: int
    always_full_precision: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


def widths(m: ModelConfig) -> tuple[int, int, int, int]:
    """``d, a, b, f``."""
    return m.dim, m.num_heads * m.resolved_head_dim, m.kv_heads * m.resolved_head_dim, m.resolved_ffn_dim


def layer_counts(m: ModelConfig) -> Counter[str]:
    """How many blocks of each kind."""
    return Counter(m.layer_kinds)


def layer_options(m: ModelConfig, kind: str) -> RaceConfig | SoftmaxConfig:
    """What says a layer's convolution and gate."""
    return m.race if kind == "R" else m.softmax


def conv_channels(m: ModelConfig, kind: str) -> int:
    """Numbers of a token that a layer's short convolutions read: queries, keys, perhaps values."""
    _, a, b, _ = widths(m)
    options = layer_options(m, kind)
    return 0 if not options.short_conv else a + b + (b if options.conv_values else 0)


def linear_layers(m: ModelConfig, kind: str) -> list[LinearShape]:
    """The linear maps of one block: mixer (q, k, v, output, gate, and RACE's decay), then SwiGLU (gate, up, down)."""
    d, a, b, f = widths(m)
    maps = [LinearShape(d, a), LinearShape(d, b), LinearShape(d, b), LinearShape(a, d)]
    if layer_options(m, kind).output_gate:
        maps.append(LinearShape(d, a))
    if kind == "R" and m.race.decay == "token":
        maps.append(LinearShape(d, m.kv_heads, always_full_precision=True))  # a bfloat16 rate of decay would be too coarse
    return [*maps, LinearShape(d, f), LinearShape(d, f), LinearShape(f, d)]


def block_parameters(m: ModelConfig, kind: str) -> int:
    """Trained numbers of one block: linear maps, two norms, convolutions, and of a RACE layer head norm, scales, rates."""
    d, a, _, _ = widths(m)
    count = (
        sum(each.weights for each in linear_layers(m, kind))
        + 2 * d
        + layer_options(m, kind).short_conv * conv_channels(m, kind)
    )
    if kind != "R":
        return count
    race = m.race
    count += a if race.normalization == "none" else 0
    count += m.num_heads + m.kv_heads if race.qk_norm else 0
    count += m.kv_heads if race.train_beta else 0
    count += m.kv_heads if race.decay == "token" else 0
    if race.train_planes:
        count += race.num_tables * race.num_planes * m.resolved_head_dim * (1 if race.share_planes else m.kv_heads)
    return count


def head_parameters(m: ModelConfig) -> int:
    """Of the embedding, the last norm and the head."""
    return m.vocab_size * m.dim * (1 if m.tie_embeddings else 2) + m.dim


def parameters(m: ModelConfig) -> int:
    """Trained numbers of the model."""
    return head_parameters(m) + sum(count * block_parameters(m, kind) for kind, count in layer_counts(m).items())


def matrix_parameters(m: ModelConfig) -> int:
    """Numbers that are multiplied with every token: those of the linear maps and of the head (not the embedding's)."""
    return m.vocab_size * m.dim + sum(
        count * each.weights for kind, count in layer_counts(m).items() for each in linear_layers(m, kind)
    )


# --- what autograd saves of a forward pass -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one block keeps for its backward pass: a token, and whatever the number of tokens is."""

    per_token: float
    constant: float = 0.0

    def __add__(self, other: ActivationBytes) -> ActivationBytes:
        return ActivationBytes(self.per_token + other.per_token, self.constant + other.constant)

    def of(self, tokens: int) -> float:
        """Bytes for that many tokens."""
        return self.per_token * tokens + self.constant


def norm_activations(job: Job) -> float:
    """An RMS norm keeps its input and the scaled input (for the weight's gradient), ``d`` each, and one number a token."""
    return (2 * job.model.dim + 1) * job.param_bytes


def _linear_input_bytes(job: Job, maps: int, wide_too: bool) -> float:
    """Linear maps that read one norm's output keep it once; under autocast each keeps a narrow copy of its own, and the
    wide one stays only for a product that is wide."""
    if job.compute_bytes == job.param_bytes:
        return job.model.dim * job.param_bytes
    return job.model.dim * (maps * job.compute_bytes + (job.param_bytes if wide_too else 0))


def ffn_activations(job: Job) -> float:
    """SwiGLU: its norm, its input, then gate, silu(gate), up and their product, ``f`` narrow numbers each."""
    return norm_activations(job) + _linear_input_bytes(job, 2, False) + 4 * job.model.resolved_ffn_dim * job.compute_bytes


def race_activations(job: Job, rows: int, tile: int) -> ActivationBytes:
    """A RACE layer, in the order of its forward pass (its norm included)."""
    m, wide, narrow = job.model, job.param_bytes, job.compute_bytes
    race, (_, a, b, _), heads = m.race, widths(m), m.num_heads + m.kv_heads
    token = norm_activations(job) + _linear_input_bytes(job, 4 if race.output_gate else 3, race.decay == "token")
    token += conv_channels(m, "R") * narrow  # behind their tail: for the taps' gradient
    if race.qk_norm:
        token += (2 * (a + b) + heads) * wide  # before and after the unit length, in the compute dtype
    if race.decay == "token":
        token += 2 * m.kv_heads * wide  # before and after the softplus
    token += (2 * a + 2 * b) * narrow  # the attention's q, k, v and output
    if race.normalization == "global":
        token += m.num_heads * wide  # its denominators
    if race.normalization == "none":
        token += (a + m.num_heads) * wide  # the head norm: scaled, and one number a head
        token += a * wide if narrow < wide else 0  # its input, which is the attention's output unless that is narrow
    if race.output_gate:
        token += (3 if race.gate_activation == "silu" else 2) * a * narrow  # what is gated, silu's input, the gate
    if race.output_gate or race.normalization == "none":
        token += a * narrow  # the output projection's input; else it is the attention's output
    state = m.kv_heads * race.num_features * (m.resolved_head_dim + 1) * wide
    token += state / tile
    return ActivationBytes(
        token, rows * 5 * state
    )  # entering and leaving states (twice as wide when streamed), and a ragged tile


def window_activations(job: Job, rows: int) -> ActivationBytes:
    """A window layer (norm included): its input, keys and values behind their tail, q, output, one number a head, and the
    output again as the projection reads it. With several rows the blocks' overlapping keys are copied."""
    m, (_, a, b, _) = job.model, widths(job.model)
    token = norm_activations(job) + _linear_input_bytes(job, 3, False) + _conv_and_gate_activations(job, "W")
    copies = 2.0 if rows > 1 else 1.0
    token += (2 * copies * b + 3 * a) * job.compute_bytes + m.num_heads * job.param_bytes
    edge = rows * m.window * ((2 * b + 2 * a) * job.compute_bytes + 2 * b * 8)  # blocks are padded; the tail's indices
    masks = 2 * (m.num_heads // m.kv_heads) * m.window * (2 * m.window - 1) * job.compute_bytes * (rows if rows > 1 else 1)
    return ActivationBytes(token, edge + masks)


def softmax_activations(job: Job) -> ActivationBytes:
    """A full-softmax layer (norm included): q, k, v, output, one number a head, and the projection's input."""
    m, (_, a, b, _) = job.model, widths(job.model)
    token = (
        norm_activations(job)
        + _linear_input_bytes(job, 3, False)
        + (3 * a + 2 * b) * job.compute_bytes
        + m.num_heads * job.param_bytes
    )
    return ActivationBytes(token + _conv_and_gate_activations(job, "S"))


def _conv_and_gate_activations(job: Job, kind: str) -> float:
    """The convolutions and the gate of a window or softmax layer: what is convolved, behind its tail; the gate's input under
    autocast (each linear map keeps a copy), its logits (SiLU), itself, and its product."""
    m, options, (_, a, _, _) = job.model, layer_options(job.model, kind), widths(job.model)
    token = conv_channels(m, kind) * job.compute_bytes
    if options.output_gate:
        token += (3 if options.gate_activation == "silu" else 2) * a * job.compute_bytes
        token += m.dim * job.compute_bytes if job.compute_bytes < job.param_bytes else 0
    return token


def compiled_block_activations(job: Job, kind: str, rows: int, tile: int) -> ActivationBytes:
    """One block as one graph: inputs and products of linear maps (norms, gates and activations are computed again); of a RACE
    layer the attention's q, k, v and output, queries and keys behind their tail, and, wide, what their unit length is taken
    of; of any other mixing layer what it saves without a compiler."""
    m, wide, narrow = job.model, job.param_bytes, job.compute_bytes
    race, (d, a, b, f) = m.race, widths(m)
    token = d * wide + (3 * d + 3 * f) * narrow  # the block's input; both norms' output and the mixer's; SwiGLU
    if kind != "R":
        other = window_activations(job, rows) if kind == "W" else softmax_activations(job)
        return other + ActivationBytes(token - norm_activations(job) - _linear_input_bytes(job, 3, False))
    token += (2 * a + 2 * b) * narrow
    token += (a + b) * narrow if race.short_conv or race.qk_norm else 0
    token += b * narrow if race.conv_values else 0
    token += (a + b) * wide if race.short_conv and race.qk_norm else 0
    token += a * narrow if race.output_gate else 0
    token += a * narrow if race.output_gate or race.normalization == "none" else 0
    token += (2 * m.num_heads + 3 * m.kv_heads) * wide  # of head norms, unit lengths, rates and denominators
    state = m.kv_heads * race.num_features * (m.resolved_head_dim + 1) * wide
    return ActivationBytes(token + state / tile, rows * 5 * state)


def block_activations(job: Job, kind: str, rows: int, tile: int) -> ActivationBytes:
    """One block: mixing layer and SwiGLU."""
    if job.compiled:
        return compiled_block_activations(job, kind, rows, tile)
    mixer = {
        "R": lambda: race_activations(job, rows, tile),
        "W": lambda: window_activations(job, rows),
        "S": lambda: softmax_activations(job),
    }[kind]()
    return mixer + ActivationBytes(ffn_activations(job))


def embedding_and_loss_activations(job: Job, rows: int) -> ActivationBytes:
    """Embedding (the tokens), the last norm, the loss (gradients of the hidden states and of the head, kept instead of
    logits), and the cosines and sines that all layers share (one set for all rows)."""
    m = job.model
    token = 8 + norm_activations(job) + m.dim * job.param_bytes
    bases = {m.race.rope_base if kind == "R" else m.rope_base for kind in layer_counts(m)} - {None}
    token += len(bases) * m.resolved_head_dim * job.param_bytes / rows
    return ActivationBytes(token, m.vocab_size * m.dim * job.param_bytes)


def autocast_weight_bytes(job: Job) -> int:
    """Narrow copies of the weights that autocast keeps for the backward pass."""
    if job.compute_bytes == job.param_bytes:
        return 0
    return (
        sum(
            count * each.weights
            for kind, count in layer_counts(job.model).items()
            for each in linear_layers(job.model, kind)
            if not each.always_full_precision
        )
        * job.compute_bytes
    )


def state_tile(m: ModelConfig, rows: int, *, cpu: bool, chunk: int) -> int:
    """Tokens that share one saved state inside a layer.

    The PyTorch pass works on tiles of 8 to 64 chunks of 64 tokens (128 from 128 features on), such that about 2**14 query
    rows are worked on at a time. The Triton kernels save a state a tile, whose length fits the GPU's multiprocessors, and every
    ``SNAPSHOT_TILE`` tokens where the features of a head do not fit one block.
    """
    if cpu:
        size = 64 if m.race.num_features <= 128 else 128
        tokens = size * min(64, max(8, 2**14 // (size * rows * m.num_heads)))
    elif m.race.num_features > WALK_FEATURES or m.race.normalization == "bucket":
        tokens = SNAPSHOT_TILE
    else:
        tokens = fitted_tile(chunk, rows * m.kv_heads, PROCESSORS)
    return max(1, min(tokens, chunk))


# --- what a layer carries ------------------------------------------------------------------------------------------------


def sketch_numbers(m: ModelConfig) -> int:
    """Of one RACE layer and row: mass and values of every feature, and the log decay, a head."""
    return m.kv_heads * (m.race.num_features * (m.resolved_head_dim + 1) + (m.race.decay != "none"))


def tail_bytes(job: Job, kind: str) -> int:
    """The tail of one row of a layer: inputs of the convolutions, or keys, values and their visibility of a window."""
    m, (_, _, b, _) = job.model, widths(job.model)
    tail = max(0, layer_options(m, kind).short_conv - 1) * conv_channels(m, kind) * job.compute_bytes
    return tail + ((m.window - 1) * (2 * b * job.compute_bytes + 1) if kind == "W" else 0)


def carry_bytes(job: Job, kind: str) -> int:
    """What one layer hands from chunk to chunk for one row. Sketches are float64 there: sums over the whole sequence."""
    return tail_bytes(job, kind) + (8 * sketch_numbers(job.model) if kind == "R" else 0)
