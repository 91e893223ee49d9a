"""Memory of one GPU, by kind, at the two moments that can be the highest: inside a chunk's backward pass, and in the
optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field

from race_dist.parallel.attention import splits_heads
from race_dist.planning.clusters import Cluster
from race_dist.planning.layout import Job, Layout
from race_dist.planning.tally import (
    LOSS_ELEMENTS,
    autocast_weight_bytes,
    block_activations,
    block_parameters,
    carry_bytes,
    embedding_and_loss_activations,
    ffn_activations,
    layer_counts,
    norm_activations,
    parameters,
    sketch_numbers,
    state_tile,
    tail_bytes,
    widths,
)

# Resident memory of a CPU process but for its tensors: interpreter, PyTorch 2.13 and this package after a first chunk, 407 MiB,
# and 497 MiB where blocks are compiled (Linux, /proc/self/status, MALLOC_MMAP_THRESHOLD_=262144).
PROCESS = {False: 407 * 2**20, True: 497 * 2**20}
TILE_TENSORS = 5  # features, their products and gradients that the PyTorch pass holds of a tile (counted with a profiler)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        kinds: by kind. Those of ``passing`` exist one at a time, all others together.
        passing: the kinds that come and go: inside the backward pass ("loss", "gradients in flight"), or in the optimizer
            step ("optimizer buffers"), when activations are gone.
        host: bytes of host memory a GPU (chunk-start states that wait there).
        capacity: what tensors may take of the GPU.
        host_capacity: of host memory.
    """

    kinds: dict[str, int]
    host: int
    capacity: int
    host_capacity: int
    passing: tuple[str, ...] = field(default=("loss", "gradients in flight", "optimizer buffers"))

    @property
    def peak(self) -> int:
        """The highest sum."""
        return max(self._inside, self._standing + self.kinds["optimizer buffers"])

    @property
    def first_peak(self) -> int:
        """Of a training's first step: its end makes the optimizer's states, when activations are gone."""
        states = self.kinds["optimizer states"]
        return max(self._inside - states, self._standing + self.kinds["optimizer buffers"])

    @property
    def _standing(self) -> int:
        return sum(self.kinds.get(k, 0) for k in ("parameters", "gradients", "optimizer states", "process", "text"))

    @property
    def _inside(self) -> int:
        """In the backward pass of a chunk."""
        kinds = self.kinds
        step = sum(kinds[k] for k in ("weight copies", "activations", "chunk-start states", "exchange", "tokens"))
        return self._standing + step + max(kinds["loss"], kinds["gradients in flight"])

    @property
    def fits(self) -> bool:
        """Whether both memories are large enough."""
        return self.peak <= self.capacity and self.host <= self.host_capacity


def memory(job: Job, layout: Layout, cluster: Cluster) -> Memory:
    """Memory of the fullest GPU."""
    weights = parameters(job.model) * job.param_bytes
    share = layout.ranks if layout.sharding == "fsdp" else 1
    starts = chunk_start_states(job, layout)
    on_host = layout.keep == "host"
    rows, chunk = layout.rows(job), layout.chunk(job)
    loss, backward = _loss(job, rows * chunk, cluster), _in_flight(job, layout, cluster)
    kinds = {
        "parameters": -(-weights // share),
        # a streamed step adds up its gradients whole, and divides them after the last chunk
        "gradients": weights if layout.chunk_size is not None else -(-weights // share),
        "optimizer states": 2 * -(-weights // share),  # AdamW: first and second moment
        "weight copies": _weight_copies(job, layout),
        "activations": activations(job, layout, cluster),
        "chunk-start states": _states_in_use(job, layout) if on_host else starts,
        "loss": loss,
        "gradients in flight": backward,
        "exchange": _exchange(job, layout, cluster),
        "tokens": 16 * rows * chunk,  # tokens and labels, int64
        "optimizer buffers": -(-weights // share),  # roots of the second moments; or, before, the gradients' exchange
    }
    if cluster.gpu.name == "cpu":
        kinds |= {"process": PROCESS[job.compiled], "text": _text(job, layout)}
    return Memory(kinds, starts if on_host else 0, cluster.usable, cluster.gpu.host_memory)


def _text(job: Job, layout: Layout) -> int:
    """The mapped token file's pages: once read they count as resident."""
    size = 1 if job.model.vocab_size <= 2**8 else 2 if job.model.vocab_size <= 2**16 else 4
    return layout.rows(job) * layout.shard(job) * size


def activations(job: Job, layout: Layout, cluster: Cluster) -> int:
    """What autograd saves of one chunk. With checkpointing: each block's input, and one block's own while it runs again, by
    when what the last norm and the loss had saved is gone."""
    rows, chunk = layout.rows(job), layout.chunk(job)
    tokens = rows * chunk
    tile = state_tile(job.model, rows, cpu=cluster.gpu.name == "cpu", chunk=chunk)
    blocks = {kind: block_activations(job, kind, rows, tile).of(tokens) for kind in layer_counts(job.model)}
    ends = embedding_and_loss_activations(job, rows).of(tokens)
    if layout.checkpointing:
        gone = (norm_activations(job) + job.model.dim * job.param_bytes) * tokens
        return int(job.model.num_layers * job.model.dim * job.param_bytes * tokens + max(*blocks.values(), gone) + ends - gone)
    return int(sum(count * blocks[kind] for kind, count in layer_counts(job.model).items()) + ends)


def chunk_start_states(job: Job, layout: Layout) -> int:
    """The carries at the starts of all chunks: every layer's, every row's."""
    if layout.chunk_size is None:
        return 0
    return layout.chunks(job) * _states_of_one(job, layout)


def _states_of_one(job: Job, layout: Layout) -> int:
    return layout.rows(job) * sum(count * carry_bytes(job, kind) for kind, count in layer_counts(job.model).items())


def _states_in_use(job: Job, layout: Layout) -> int:
    """Of states that wait on the host, this chunk's and the next one's are on the device."""
    return 2 * _states_of_one(job, layout) if layout.chunk_size is not None else 0


def _weight_copies(job: Job, layout: Layout) -> int:
    """Autocast's narrow copies of all weights; under FSDP the gathered weights of two blocks, one in use and the next."""
    if layout.sharding == "none":
        return autocast_weight_bytes(job)
    return 2 * max(block_parameters(job.model, kind) for kind in layer_counts(job.model)) * job.compute_bytes


def _loss(job: Job, tokens: int, cluster: Cluster) -> int:
    """The head: logits of some rows at a time in wide numbers, their gradient in wide and (if that is less) in narrow ones,
    and the weight's narrow copy and the product that is added to its gradient."""
    m = job.model
    limit = LOSS_ELEMENTS["cpu" if cluster.gpu.name == "cpu" else "cuda"]
    rows = min(tokens, m.loss_chunk or max(16, limit // m.vocab_size))
    converted = job.compute_bytes if job.compute_bytes < job.param_bytes else 0
    return rows * m.vocab_size * (2 * job.param_bytes + converted) + m.vocab_size * m.dim * 2 * job.compute_bytes


def _in_flight(job: Job, layout: Layout, cluster: Cluster) -> int:
    """Gradients and temporaries at the fullest moment of the last block's backward pass.

    At its start: gradients of the hidden states, the residual stream and the norm's input (``d`` wide each), and of the
    SwiGLU's product and one factor (``f`` narrow each). Later, in the attention: the gradients of q, k and v, and, in the
    PyTorch pass (the Triton kernels keep them in registers), some tensors of a tile's features; by then what the SwiGLU
    and the mixer's output side had saved is free again.
    """
    m, rows, chunk = job.model, layout.rows(job), layout.chunk(job)
    tokens, (d, a, b, f) = rows * chunk, widths(m)
    start = tokens * (3 * d * job.param_bytes + 2 * f * job.compute_bytes)
    if m.layer_kinds[-1] != "R" or cluster.gpu.name != "cpu":
        return start
    tile = state_tile(m, rows, cpu=True, chunk=chunk)
    features = rows * tile * (m.num_heads + m.kv_heads) * m.race.num_features * job.param_bytes
    freed = ffn_activations(job) + (4 * a * job.compute_bytes if m.race.output_gate else 0)
    inside = TILE_TENSORS * features + tokens * ((a + 2 * b) * job.compute_bytes + 2 * d * job.param_bytes - freed)
    return int(max(start, inside))


def scan_bytes(job: Job, layout: Layout) -> int:
    """One layer's sketches of a chunk as the ranks exchange them: float64 when streamed, else the state's own dtype."""
    size = 8 if layout.chunk_size is not None else job.param_bytes
    return layout.rows(job) * sketch_numbers(job.model) * size


def scan_parts(layout: Layout, cluster: Cluster) -> int:
    """Exchanges a RACE layer makes of its heads: two halves, or all at once."""
    return 2 if splits_heads(cluster.gpu.name != "cpu", layout.sp, cluster.per_node) else 1


def _exchange(job: Job, layout: Layout, cluster: Cluster) -> int:
    """Buffers of one layer's exchange: what is sent and what arrives, from every rank of a few and from one of many."""
    if layout.sp == 1:
        return 0
    sketch = scan_bytes(job, layout) if "R" in job.model.layer_kinds else 0
    tail = layout.rows(job) * max(tail_bytes(job, kind) for kind in layer_counts(job.model))
    copies = layout.sp + 1 if gathers_all(layout.sp, sketch // scan_parts(layout, cluster), cluster.per_node) else 4
    return copies * sketch + (layout.sp + 1) * tail


def gathers_all(ranks: int, size: int, ranks_per_node: int) -> bool:
    """Whether the scan is an all-gather (the ranks of a node, or little data) or recursive doubling: the rule of
    ``race_dist.parallel.scan``."""
    return ranks <= ranks_per_node or ranks * size <= 2**20
