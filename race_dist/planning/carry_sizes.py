"""Bytes of carries: those that a streamed step keeps at the chunks' starts, and those that context-parallel ranks exchange."""

from __future__ import annotations

from race_dist.parallel.attention import splits_heads
from race_dist.planning.clusters import Cluster
from race_dist.planning.layer_costs import layer_cost, layer_counts
from race_dist.planning.layout import Job, Layout


def chunk_start_states(job: Job, layout: Layout) -> int:
    """The carries of every layer and row at the starts of all chunks."""
    if layout.chunk_size is None:
        return 0
    return layout.chunks(job) * one_chunk_start(job, layout)


def one_chunk_start(job: Job, layout: Layout) -> int:
    """The carries of every layer and row at the start of one chunk."""
    return layout.rows(job) * sum(count * layer_cost(kind).carry_bytes(job) for kind, count in layer_counts(job.model).items())


def scan_bytes(job: Job, layout: Layout, kind: str) -> int:
    """The states of one layer as the ranks exchange them: float64 when streamed, else the state's own dtype."""
    size = 8 if layout.chunk_size is not None else job.param_bytes
    return layout.rows(job) * layer_cost(kind).state_numbers(job.model) * size


def scan_parts(layout: Layout, cluster: Cluster) -> int:
    """Exchanges that a RACE layer makes of its heads: two halves, or all at once."""
    return 2 if splits_heads(not cluster.on_cpu, layout.sp, cluster.per_node) else 1


def uses_all_gather(ranks: int, size: int, ranks_per_node: int) -> bool:
    """Whether the scan is an all-gather (the ranks of a node, or little data) or recursive doubling: the rule of
    ``race_dist.parallel.scan``."""
    return ranks <= ranks_per_node or ranks * size <= 2**20
