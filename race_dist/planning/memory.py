"""Peak memory of one GPU, by kind: the larger of a chunk's backward pass and the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field

from race_dist.planning.activation_memory import (
    autocast_weight_bytes,
    block_activations,
    embedding_and_loss_activations,
    ffn_activations,
)
from race_dist.planning.carry_sizes import chunk_start_states, one_chunk_start, scan_bytes, scan_parts, uses_all_gather
from race_dist.planning.clusters import Cluster
from race_dist.planning.layer_costs import layer_cost, layer_counts, norm_activations
from race_dist.planning.layout import Job, Layout
from race_dist.planning.parameter_counts import block_parameter_count, parameter_count

# Resident memory of a CPU process without its tensors: interpreter, PyTorch 2.13 and this package after a first chunk, 407 MiB,
# and 497 MiB where blocks are compiled (Linux, /proc/self/status, MALLOC_MMAP_THRESHOLD_=262144).
PROCESS_BYTES = {False: 407 * 2**20, True: 497 * 2**20}
LOSS_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # logits that exist at a time unless loss_chunk says otherwise


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        kinds: bytes by kind. The kinds of ``transient`` exist one at a time, all others together. transient: the kinds that
        exist for a moment: inside the backward pass ("loss", "gradients in flight"), or in the optimizer
            step ("optimizer buffers"), when activations are freed.
        host: bytes of host memory per GPU (carries at chunk starts under ``keep = "host"``).
        capacity: bytes of the GPU that tensors may take.
        host_capacity: bytes of host memory per GPU.
    """

    kinds: dict[str, int]
    host: int
    capacity: int
    host_capacity: int
    transient: tuple[str, ...] = field(default=("loss", "gradients in flight", "optimizer buffers"))

    @property
    def peak(self) -> int:
        """The largest sum of kinds that exist together."""
        return max(self._backward_peak, self._persistent + self.kinds["optimizer buffers"])

    @property
    def first_peak(self) -> int:
        """The peak of a training's first step, which creates the optimizer's states at its end, when activations are freed."""
        states = self.kinds["optimizer states"]
        return max(self._backward_peak - states, self._persistent + self.kinds["optimizer buffers"])

    @property
    def _persistent(self) -> int:
        return sum(self.kinds.get(k, 0) for k in ("parameters", "gradients", "optimizer states", "process", "text"))

    @property
    def _backward_peak(self) -> int:
        """Bytes in the backward pass of a chunk."""
        kinds = self.kinds
        step = sum(kinds[k] for k in ("weight copies", "activations", "chunk-start states", "exchange", "tokens"))
        return self._persistent + step + max(kinds["loss"], kinds["gradients in flight"])

    @property
    def fits(self) -> bool:
        """Whether both memories are large enough."""
        return self.peak <= self.capacity and self.host <= self.host_capacity


def memory(job: Job, layout: Layout, cluster: Cluster) -> Memory:
    """Memory of the GPU that needs most."""
    weights = parameter_count(job.model) * job.param_bytes
    share = layout.ranks if layout.sharding == "fsdp" else 1
    starts = chunk_start_states(job, layout)
    on_host = layout.keep == "host"
    rows, chunk = layout.rows(job), layout.chunk(job)
    loss, backward = _loss(job, rows * chunk, cluster), _gradients_in_flight(job, layout, cluster)
    kinds = {
        "parameters": -(-weights // share),
        # a streamed step accumulates unsharded gradients and shards them after the last chunk
        "gradients": weights if layout.chunk_size is not None else -(-weights // share),
        "optimizer states": 2 * -(-weights // share),  # AdamW: first and second moment
        "weight copies": _weight_copies(job, layout),
        "activations": activations(job, layout, cluster),
        "chunk-start states": _states_in_use(job, layout) if on_host else starts,
        "loss": loss,
        "gradients in flight": backward,
        "exchange": _exchange(job, layout, cluster),
        "tokens": 16 * rows * chunk,  # tokens and labels, int64
        "optimizer buffers": -(-weights // share),  # roots of the second moments; earlier, the buckets of the all-reduce
    }
    if cluster.on_cpu:
        kinds |= {"process": PROCESS_BYTES[job.compiled], "text": _text(job, layout)}
    return Memory(kinds, starts if on_host else 0, cluster.usable, cluster.gpu.host_memory)


def _text(job: Job, layout: Layout) -> int:
    """The mapped token file's pages: once read they count as resident."""
    size = 1 if job.model.vocab_size <= 2**8 else 2 if job.model.vocab_size <= 2**16 else 4
    return layout.rows(job) * layout.shard(job) * size


def activations(job: Job, layout: Layout, cluster: Cluster) -> int:
    """What autograd saves of one chunk. With checkpointing: each block's input, and the activations of the one block that is
    recomputed, by when those of the last norm and the loss are freed."""
    chunk = layout.chunk_shape(job, cluster)
    tokens = chunk.rows * chunk.tokens
    blocks = {kind: block_activations(job, kind, chunk).total(tokens) for kind in layer_counts(job.model)}
    ends = embedding_and_loss_activations(job, chunk).total(tokens)
    if layout.checkpointing:
        freed = (norm_activations(job) + job.model.dim * job.param_bytes) * tokens
        inputs = job.model.num_layers * job.model.dim * job.param_bytes * tokens
        return int(inputs + max(*blocks.values(), freed) + ends - freed)
    return int(sum(count * blocks[kind] for kind, count in layer_counts(job.model).items()) + ends)


def _states_in_use(job: Job, layout: Layout) -> int:
    """Of states that wait on the host, this chunk's and the next one's are on the device."""
    return 2 * one_chunk_start(job, layout) if layout.chunk_size is not None else 0


def _weight_copies(job: Job, layout: Layout) -> int:
    """Autocast's copies of all weights; under FSDP the gathered weights of two blocks, the current and the next."""
    if layout.sharding == "none":
        return autocast_weight_bytes(job)
    return 2 * max(block_parameter_count(job.model, kind) for kind in layer_counts(job.model)) * job.compute_bytes


def _loss(job: Job, tokens: int, cluster: Cluster) -> int:
    """The head: logits of some rows at a time, their gradient (uncast, and cast under autocast), the weight's copy in the
    compute dtype, and the product that is added to the weight's gradient."""
    m = job.model
    limit = LOSS_ELEMENTS["cpu" if cluster.on_cpu else "cuda"]
    rows = min(tokens, m.loss_chunk or max(16, limit // m.vocab_size))
    cast = job.compute_bytes if job.compute_bytes < job.param_bytes else 0
    return rows * m.vocab_size * (2 * job.param_bytes + cast) + m.vocab_size * m.dim * 2 * job.compute_bytes


def _gradients_in_flight(job: Job, layout: Layout, cluster: Cluster) -> int:
    """Gradients and temporaries at the fullest moment of the last block's backward pass.

    At its start: gradients of the hidden states, the residual stream and the norm's input (``d`` numbers each), and of SwiGLU's
    product and one factor (``f`` numbers each). Later, in the mixing layer: the layer's temporaries and two gradients of hidden
    states, when SwiGLU's activations are freed.
    """
    m, chunk = job.model, layout.chunk_shape(job, cluster)
    tokens = chunk.rows * chunk.tokens
    start = tokens * (3 * m.dim * job.param_bytes + 2 * m.resolved_ffn_dim * job.compute_bytes)
    temporaries = layer_cost(m.layer_kinds[-1]).backward_temporaries(job, chunk)
    if temporaries is None:
        return start
    return int(max(start, temporaries + tokens * (2 * m.dim * job.param_bytes - ffn_activations(job))))


def _exchange(job: Job, layout: Layout, cluster: Cluster) -> int:
    """Buffers of one layer's exchange: what is sent, and what arrives from every rank (all-gather) or from one (doubling)."""
    if layout.sp == 1:
        return 0
    state = max(scan_bytes(job, layout, kind) for kind in layer_counts(job.model))
    tail = layout.rows(job) * max(layer_cost(kind).tail_bytes(job) for kind in layer_counts(job.model))
    copies = layout.sp + 1 if uses_all_gather(layout.sp, state // scan_parts(layout, cluster), cluster.per_node) else 4
    return copies * state + (layout.sp + 1) * tail
