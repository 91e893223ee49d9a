"""Arithmetic, bytes and seconds of one optimizer step on one GPU, by part.

Every part is a roofline: the longer of its arithmetic at the achieved peak and its bytes at the achieved bandwidth. What a
measurement must say (what is achieved) is in :class:`race_dist.planning.device_rates.Rates`; everything else is counted here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from race_dist.models import ModelConfig
from race_dist.planning.clusters import Cluster, Link
from race_dist.planning.device_rates import Rates
from race_dist.planning.elementwise_traffic import block_traffic, embedding_and_loss_traffic
from race_dist.planning.layout import Job, Layout
from race_dist.planning.memory import chunk_start_states, gathers_all, scan_bytes, scan_parts
from race_dist.planning.tally import (
    LinearShape,
    block_activations,
    layer_counts,
    linear_layers,
    matrix_parameters,
    norm_activations,
    parameters,
    state_tile,
    tail_bytes,
)

MATMUL_CHUNK = 64  # tokens that meet each other in one product inside the attention
TENSOR_CORE = 16  # smallest side of a product there: smaller ones are padded


@dataclass(frozen=True)
class PassCounts:
    """How often each token's blocks run forward and backward; the head runs once each way."""

    forward: float
    backward: float = 1.0

    @property
    def products(self) -> float:
        """In units of one forward pass: a backward pass is two (one for the inputs, one for the weights)."""
        return self.forward + 2 * self.backward


def count_passes(job: Job, layout: Layout) -> PassCounts:
    """One forward pass that is differentiated; one more over all chunks but the last when streamed; one more with
    checkpointing. So 6 x parameters x tokens operations become 8 when streamed, 10 with both."""
    chunks = layout.chunks(job)
    streamed = 0.0 if layout.chunk_size is None else (chunks - 1) / chunks
    return PassCounts(1.0 + streamed + layout.checkpointing)


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


def linear_cost(job: Job, each: LinearShape) -> Cost:
    """One token through one linear map: ``2 in out`` operations; the token is read and its product written (the weights
    are read once for thousands of tokens)."""
    size = job.param_bytes if each.always_full_precision else job.compute_bytes
    return Cost(2 * each.weights, size * (each.inputs + each.outputs))


def attention_cost(m: ModelConfig, narrow: int, tile: int) -> tuple[Cost, Cost]:
    """The RACE attention of one token and query head, forward and backward.

    Arithmetic, with products padded to tensor-core sizes (``S'``, ``P'`` = max(16, .) of S features and of L P planes):
    hashing a row is a product with the planes (2 D P') and one of log-features with signs (2 x 2 P' S', twice as dear in
    TF32). Forward: keys hash in the sums and again in the read-out, queries once (3 hashes); three products with a state
    (2 S' D: sum, running state, read) and, inside a chunk of C tokens, Fq Fk^T and its product with V (2 C (S' + D)).
    Backward: queries and keys hash in both walks (4); six products with a state (prefix state, its reading, suffix sums
    twice, its readings for features and for values); three in-chunk products with features and three with values; and the
    way back through the planes for queries and keys.

    Bytes: forward reads k, v, then q, k, v and writes the output (6 D numbers); backward reads q, k, v and the gradient
    twice and writes three gradients less what the second walk finds in cache (10 D). Saved states are written, scanned
    (read and written) and read: 4 times S (D + 1) float32 a tile, in each direction.
    """
    width, race = m.resolved_head_dim, m.race
    s, p = max(TENSOR_CORE, race.num_features), max(TENSOR_CORE, race.num_tables * race.num_planes)
    group = m.num_heads / m.kv_heads
    hashing, state, c = 2 * width * p + 8 * p * s, 2 * s * width, MATMUL_CHUNK
    states = 4 * race.num_features * (width + 1) * 4 / tile / group
    forward = Cost(3 * hashing + 3 * state + 2 * c * (s + width), 6 * width * narrow + states)
    backward = Cost(4 * hashing + 6 * state + 6 * c * (s + width) + 4 * width * p, 10 * width * narrow + states)
    return forward, backward


def softmax_cost(m: ModelConfig, kind: str, context: int, narrow: int) -> tuple[Cost, Cost]:
    """Softmax attention of one token and query head: 4 D operations a key that is seen (half of the context, or a window
    and the rest of its block), 2.5 times as many backward; q, k, v, output and their gradients move."""
    width = m.resolved_head_dim
    keys = context / 2 if kind == "S" else 2 * min(m.window, context)
    return Cost(4 * width * keys, 4 * width * narrow), Cost(10 * width * keys, 8 * width * narrow)


def useful_flops(job: Job) -> float:
    """Operations of the step that any method needs: 6 x matrix parameters x tokens, and the attention once forward and
    once backward. What streaming and checkpointing do again does not count."""
    m, tokens = job.model, job.context * job.batch
    attention = 0.0
    for kind, count in layer_counts(m).items():
        costs = (
            attention_cost(m, job.compute_bytes, MATMUL_CHUNK)
            if kind == "R"
            else softmax_cost(m, kind, job.context, job.compute_bytes)
        )
        attention += count * m.num_heads * sum(each.flops for each in costs)
    return tokens * (6 * matrix_parameters(m) + attention)


def streamed_flops(m: ModelConfig, tokens: int) -> float:
    """Operations of one streamed step, as they are usually counted: 8 x parameters x tokens, and the attention by its
    definition, two forward passes and a backward pass of twice their work. A token and query head hash twice (2 D L P
    each), add to and read one state (2 S D each) and meet half a chunk of C = 64 tokens (C (S + D)); a window layer's
    query meets its window (4 D a key)."""
    width, race = m.resolved_head_dim, m.race
    hashing, state = 4 * width * race.num_tables * race.num_planes, 4 * race.num_features * width
    forward = {"R": hashing + state + MATMUL_CHUNK * (race.num_features + width), "W": 4 * width * m.window}
    attention = sum(count * m.num_heads * forward[kind] for kind, count in layer_counts(m).items())
    return float(tokens) * (8 * parameters(m) + 4 * attention)


# --- seconds -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """A GPU of the cluster at the rates that it achieves."""

    job: Job
    cluster: Cluster
    rates: Rates

    def products(self, work: Cost) -> float:
        """Seconds of matrix products."""
        peak = self.cluster.gpu.flops[self.job.precision] * self.rates.matmul
        return max(work.flops / peak, work.bytes / self.stream)

    def attention(self, work: Cost, slowdown: float) -> float:
        """Seconds of the attention: its roofline times what it takes of that."""
        return slowdown * max(work.flops / self.cluster.gpu.flops[self.job.precision], work.bytes / self.stream)

    @property
    def stream(self) -> float:
        """Bytes a second that element-wise work achieves."""
        return self.cluster.gpu.bandwidth * self.rates.bandwidth


def matmul_seconds(job: Job, layout: Layout, machine: Roofline) -> float:
    """Matrix products of this GPU's tokens: blocks by their passes, the head 3 times a forward product."""
    tokens = layout.rows(job) * layout.shard(job)
    each = count_passes(job, layout).products
    seconds = sum(
        count * machine.products(linear_cost(job, one) * each)
        for kind, count in layer_counts(job.model).items()
        for one in linear_layers(job.model, kind)
    )
    return tokens * (seconds + machine.products(linear_cost(job, LinearShape(job.model.dim, job.model.vocab_size)) * 3))


def attention_seconds(job: Job, layout: Layout, machine: Roofline) -> tuple[float, float]:
    """One token through the attention of all layers, forward and backward."""
    m, rows, chunk = job.model, layout.rows(job), layout.chunk(job)
    tile = state_tile(m, rows, cpu=machine.cluster.gpu.name == "cpu", chunk=chunk)
    slow = machine.rates.attention_slowdown(m.race.num_features)
    totals = [0.0, 0.0]
    for kind, count in layer_counts(m).items():
        race = kind == "R"
        costs = attention_cost(m, job.compute_bytes, tile) if race else softmax_cost(m, kind, job.context, job.compute_bytes)
        for i, work in enumerate(costs):
            seconds = machine.attention(work, slow[i]) if race else machine.products(work)
            totals[i] += count * m.num_heads * seconds
    return totals[0], totals[1]


def elementwise_seconds(job: Job, layout: Layout, machine: Roofline) -> float:
    """Norms, positions, gates, casts and the logits: of compiled blocks by the bytes that their kernels move, otherwise by
    the bytes that autograd saves of them (see ``Rates``). A logit is written, read for its sum, read and written for its
    gradient, and read twice by products: 6 wide numbers."""
    forward, backward = _fused_bytes(job, machine.rates) if job.compiled else _plain_bytes(job, layout, machine)
    moved = forward * count_passes(job, layout).forward + backward + 6 * job.model.vocab_size * job.param_bytes
    return layout.rows(job) * layout.shard(job) * moved / machine.stream


def _fused_bytes(job: Job, rates: Rates) -> tuple[float, float]:
    """A token's, of all blocks and both ends, compiled: forward and backward."""
    parts = [embedding_and_loss_traffic(job), *(block_traffic(job, kind) for kind in job.model.layer_kinds)]
    return rates.compiled_forward * sum(p[0] for p in parts), rates.compiled_backward * sum(p[1] for p in parts)


def _plain_bytes(job: Job, layout: Layout, machine: Roofline) -> tuple[float, float]:
    """The same without a compiler; the ends once."""
    rows, rates = layout.rows(job), machine.rates
    tile = state_tile(job.model, rows, cpu=machine.cluster.gpu.name == "cpu", chunk=layout.chunk(job))
    block = sum(count * block_activations(job, kind, rows, tile).per_token for kind, count in layer_counts(job.model).items())
    ends = norm_activations(job) * (rates.elementwise_forward + rates.elementwise_backward)
    return block * rates.elementwise_forward, block * rates.elementwise_backward + ends


def optimizer_seconds(job: Job, layout: Layout, machine: Roofline) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them; clipping reads and writes the gradient."""
    share = layout.ranks if layout.sharding == "fsdp" else 1
    return (7 / share + 3) * parameters(job.model) * job.param_bytes / machine.stream


def launch_seconds(job: Job, layout: Layout, machine: Roofline) -> float:
    """What the host needs to queue all kernels: a bound on small chunks. CPUs have no queue."""
    if machine.cluster.gpu.name == "cpu":
        return 0.0
    return layout.chunks(job) * job.model.num_layers * machine.rates.host_forward * count_passes(job, layout).products


# --- exchange ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Bytes that one GPU sends in a step, by kind, and the seconds of them that nothing hides."""

    bytes: dict[str, int]
    exposed: float


def scan_seconds(ranks: int, size: float, link: Link, *, ranks_per_node: int) -> float:
    """The exclusive scan of carries of ``size`` bytes: an all-gather (a start a doubling of the ranks, then W - 1 carries
    arrive), or recursive doubling (``ceil(log2 W)`` rounds of one carry)."""
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    if gathers_all(ranks, int(size), ranks_per_node):
        return rounds * link.latency + (ranks - 1) * size / link.bandwidth
    return rounds * (link.latency + size / link.bandwidth)


def scan_sent(ranks: int, size: float, *, ranks_per_node: int) -> float:
    """Bytes that one rank sends in a scan."""
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return size * (ranks - 1 if gathers_all(ranks, int(size), ranks_per_node) else rounds)


def all_reduce_seconds(ranks: int, size: float, link: Link) -> float:
    """A sum over the ranks: there and back, (W - 1) / W of the bytes each way."""
    if ranks == 1:
        return 0.0
    return 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def exchange(job: Job, layout: Layout, machine: Roofline) -> Exchange:
    """Everything that one GPU sends in a step."""
    sent = {"sketches (scan)": 0.0, "final states": 0.0, "tails": 0.0, "gradients": 0.0, "weights": 0.0}
    exposed = 0.0
    if layout.sp > 1:
        exposed += _sequence_exchange(job, layout, machine, sent)
    if layout.ranks > 1:
        exposed += _weight_exchange(job, layout, machine, sent)
    return Exchange({kind: int(size) for kind, size in sent.items()}, exposed)


def _sequence_exchange(job: Job, layout: Layout, machine: Roofline, sent: dict[str, float]) -> float:
    """Carries between the ranks of a sequence, every layer, every chunk.

    RACE layers exchange their heads in two halves, so that one half's exchange runs beside the other half's sums and
    read-out, or (:func:`scan_parts`) all at once, beside nothing. When streamed, the state after the chunk (backward: its
    gradient) is summed over the ranks too, and tails are scanned and broadcast; nothing hides their start-up.
    """
    m, ranks, link = job.model, layout.sp, machine.cluster.link(layout.sp)
    parts, per_node = scan_parts(layout, machine.cluster), machine.cluster.per_node
    streamed, again, part = layout.chunk_size is not None, count_passes(job, layout), scan_bytes(job, layout) / parts
    own = [seconds * layout.rows(job) * layout.chunk(job) / m.num_layers for seconds in attention_seconds(job, layout, machine)]
    exposed = 0.0
    for kind, count in layer_counts(m).items():
        chunks = count * layout.chunks(job)
        calls = chunks * (again.forward + again.backward)
        tail = layout.rows(job) * tail_bytes(job, kind)
        if tail:
            sent["tails"] += calls * (scan_sent(ranks, tail, ranks_per_node=per_node) + (tail if streamed else 0))
            broadcast = all_reduce_seconds(ranks, tail, link) / 2 if streamed else 0.0
            exposed += calls * (scan_seconds(ranks, tail, link, ranks_per_node=per_node) + broadcast)
        if kind != "R":
            continue
        sent["sketches (scan)"] += calls * parts * scan_sent(ranks, part, ranks_per_node=per_node)
        one = scan_seconds(ranks, part, link, ranks_per_node=per_node)
        for times, local in ((again.forward, own[0]), (again.backward, own[1])):
            hidden = machine.rates.overlap * local / 2  # of each half, beside the other's work
            shown = one if parts == 1 else max(0.0, one - hidden / 2) + max(0.0, one - hidden)
            exposed += chunks * times * shown
        if streamed:
            sent["final states"] += calls * parts * 2 * part * (ranks - 1) / ranks
            exposed += calls * all_reduce_seconds(ranks, part, link)
    return exposed


def _weight_exchange(job: Job, layout: Layout, machine: Roofline, sent: dict[str, float]) -> float:
    """Gradients, once a step. Under FSDP weights are gathered for each pass over each chunk, beside the block before, and
    gradients reduced to shares (half an all-reduce)."""
    ranks, link, weights = layout.ranks, machine.cluster.link(layout.ranks), parameters(job.model)
    other = (ranks - 1) / ranks
    if layout.sharding == "none":
        sent["gradients"] = 2 * other * weights * job.param_bytes
        return all_reduce_seconds(ranks, weights * job.param_bytes, link)
    gathers = layout.chunks(job) * (count_passes(job, layout).forward + count_passes(job, layout).backward)
    sent["gradients"] = other * weights * job.param_bytes
    sent["weights"] = gathers * other * weights * job.compute_bytes
    seconds = gathers * (job.model.num_layers * link.latency + other * weights * job.compute_bytes / link.bandwidth)
    beside = machine.rates.overlap * matmul_seconds(job, layout, machine)
    return max(0.0, seconds - beside) + all_reduce_seconds(ranks, weights * job.param_bytes, link) / 2


def offload_seconds(job: Job, layout: Layout, machine: Roofline) -> float:
    """Chunk-start states to the host and back, beside the computation but for what it does not cover."""
    if layout.keep != "host":
        return 0.0
    return (1 - machine.rates.overlap) * 2 * chunk_start_states(job, layout) / machine.cluster.gpu.host
