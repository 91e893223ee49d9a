"""Bytes that one GPU sends in a step, and the seconds of communication that computation does not hide."""

from __future__ import annotations

import math
from dataclasses import dataclass

from race_dist.planning.carry_sizes import scan_bytes, scan_parts, uses_all_gather
from race_dist.planning.clusters import Link
from race_dist.planning.cost_model import attention_seconds, count_passes, matmul_seconds
from race_dist.planning.layer_costs import layer_cost, layer_counts
from race_dist.planning.layout import Job, Layout
from race_dist.planning.parameter_counts import parameter_count
from race_dist.planning.roofline import Roofline


@dataclass(frozen=True)
class Exchange:
    """Bytes that one GPU sends in a step, by kind, and the seconds that computation does not hide."""

    bytes: dict[str, int]
    exposed: float


def scan_seconds(ranks: int, size: float, link: Link, *, ranks_per_node: int) -> float:
    """The exclusive scan of carries of ``size`` bytes: an all-gather (one latency per doubling of the ranks, then W - 1 carries
    arrive), or recursive doubling (``ceil(log2 W)`` rounds of one carry)."""
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    if uses_all_gather(ranks, int(size), ranks_per_node):
        return rounds * link.latency + (ranks - 1) * size / link.bandwidth
    return rounds * (link.latency + size / link.bandwidth)


def scan_sent(ranks: int, size: float, *, ranks_per_node: int) -> float:
    """Bytes that one rank sends in a scan."""
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return size * (ranks - 1 if uses_all_gather(ranks, int(size), ranks_per_node) else rounds)


def all_reduce_seconds(ranks: int, size: float, link: Link) -> float:
    """Reduce-scatter and all-gather, (W - 1) / W of the bytes each."""
    if ranks == 1:
        return 0.0
    return 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def exchange(job: Job, layout: Layout, roofline: Roofline) -> Exchange:
    """Everything that one GPU sends in a step."""
    sent = {"sketches (scan)": 0.0, "final states": 0.0, "tails": 0.0, "gradients": 0.0, "weights": 0.0}
    exposed = 0.0
    if layout.sp > 1:
        exposed += _carry_exchange(job, layout, roofline, sent)
    if layout.ranks > 1:
        exposed += _weight_exchange(job, layout, roofline, sent)
    return Exchange({kind: int(size) for kind, size in sent.items()}, exposed)


def _carry_exchange(job: Job, layout: Layout, roofline: Roofline, sent: dict[str, float]) -> float:
    """Carries between context-parallel ranks, for every layer and chunk.

    RACE layers exchange their heads in two halves, so that the exchange of one half overlaps the other half's computation, or
    (:func:`scan_parts`) all at once without overlap. When streamed, the state after the chunk (backward: its gradient) is
    summed over the ranks too, and tails are scanned and broadcast; their latency is not hidden.
    """
    m, ranks, link = job.model, layout.sp, roofline.cluster.link(layout.sp)
    parts, streamed, passes = scan_parts(layout, roofline.cluster), layout.chunk_size is not None, count_passes(job, layout)
    per_node, chunk_tokens = roofline.cluster.per_node, layout.rows(job) * layout.chunk(job)
    layer_seconds = [seconds * chunk_tokens / m.num_layers for seconds in attention_seconds(job, layout, roofline)]
    exposed = 0.0
    for kind, count in layer_counts(m).items():
        chunks = count * layout.chunks(job)
        calls = chunks * (passes.forward + passes.backward)
        tail = layout.rows(job) * layer_cost(kind).tail_bytes(job)
        if tail:
            sent["tails"] += calls * (scan_sent(ranks, tail, ranks_per_node=per_node) + (tail if streamed else 0))
            broadcast = all_reduce_seconds(ranks, tail, link) / 2 if streamed else 0.0
            exposed += calls * (scan_seconds(ranks, tail, link, ranks_per_node=per_node) + broadcast)
        part = scan_bytes(job, layout, kind) / parts
        if not part:
            continue
        sent["sketches (scan)"] += calls * parts * scan_sent(ranks, part, ranks_per_node=per_node)
        one = scan_seconds(ranks, part, link, ranks_per_node=per_node)
        for times, local in ((passes.forward, layer_seconds[0]), (passes.backward, layer_seconds[1])):
            hidden = roofline.rates.overlap * local / 2  # for each half, behind the other half's computation
            shown = one if parts == 1 else max(0.0, one - hidden / 2) + max(0.0, one - hidden)
            exposed += chunks * times * shown
        if streamed:
            sent["final states"] += calls * parts * 2 * part * (ranks - 1) / ranks
            exposed += calls * all_reduce_seconds(ranks, part, link)
    return exposed


def _weight_exchange(job: Job, layout: Layout, roofline: Roofline, sent: dict[str, float]) -> float:
    """All-reduce of gradients, once per step. Under FSDP weights are gathered for each pass over each chunk, behind the block
    before, and gradients reduce-scattered (half an all-reduce)."""
    ranks, link, weights = layout.ranks, roofline.cluster.link(layout.ranks), parameter_count(job.model)
    other = (ranks - 1) / ranks
    if layout.sharding == "none":
        sent["gradients"] = 2 * other * weights * job.param_bytes
        return all_reduce_seconds(ranks, weights * job.param_bytes, link)
    gathers = layout.chunks(job) * (count_passes(job, layout).forward + count_passes(job, layout).backward)
    sent["gradients"] = other * weights * job.param_bytes
    sent["weights"] = gathers * other * weights * job.compute_bytes
    seconds = gathers * (job.model.num_layers * link.latency + other * weights * job.compute_bytes / link.bandwidth)
    hidden = roofline.rates.overlap * matmul_seconds(job, layout, roofline)
    return max(0.0, seconds - hidden) + all_reduce_seconds(ranks, weights * job.param_bytes, link) / 2
