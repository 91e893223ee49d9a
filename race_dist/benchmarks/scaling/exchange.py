"""Time of the exclusive scan alone, and how much of it overlaps the attention's computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from race_dist.benchmarks.attention import inputs
from race_dist.benchmarks.scaling.job import Job
from race_dist.hashing import sample_planes
from race_dist.ops.backends import get_backend, select_backend
from race_dist.ops.inputs import AttentionInputs
from race_dist.parallel import state_exchange
from race_dist.parallel.attention import context_parallel_attention, splits_heads
from race_dist.parallel.scan import Algorithm, start_scan
from race_dist.rank_environment import ranks_per_node
from race_dist.sketch import SketchState

REPEATS = 20


def measure(job: Job) -> dict[str, Any]:
    """For each algorithm and number of ranks: the scan alone, and the attention with and without it."""
    rows = []
    for count in job.counts[1:]:
        for algorithm in ("all_gather", "recursive_doubling"):
            rows.append(
                {"ranks": count, "algorithm": algorithm, **_scan(job, count, algorithm), **_hidden(job, count, algorithm)}
            )
            job.say(str(rows[-1]))
    return {"tokens_per_rank": job.sizes.per_rank, "rows": rows}


def _scan(job: Job, count: int, algorithm: Algorithm) -> dict[str, Any]:
    """Forward and reverse scan of one layer's float32 sketch."""
    base = job.sizes.base
    state = SketchState.empty(1, job.sizes.state_heads, base.tables * 2**base.planes, base.head_dim, device=job.device)

    def both() -> None:
        for reverse in (False, True):
            start_scan([state], job.group(count), reverse=reverse, algorithm=algorithm).wait()

    size = sum(t.numel() * t.element_size() for t in state.tensors())
    sent = job.sent(both) if job.takes_part(count) else {}
    return {"state_bytes": size, "scan_microseconds": 1e3 * job.milliseconds(both, count, repeats=REPEATS) / 2, "sent": sent}


class _NoScan:
    """A scan without communication."""

    def __init__(self, pieces: Sequence[SketchState]) -> None:
        self._pieces = pieces

    def wait(self) -> list[SketchState]:
        return [piece.zero() for piece in self._pieces]


def _hidden(job: Job, count: int, algorithm: Algorithm) -> dict[str, Any]:
    """The time that the exchange adds: with it minus without it, for the same local computation."""
    call = _call(job, count, algorithm) if job.takes_part(count) else lambda: None
    whole = job.milliseconds(call, count)
    with mock.patch.object(state_exchange, "start_scan", lambda pieces, *_, **__: _NoScan(pieces)):
        local = job.milliseconds(call, count)
    scans = 4 if splits_heads(job.device.type == "cuda", count, ranks_per_node()) else 2  # forward and backward
    scan = _scan_of(job, count, algorithm, job.sizes.base.heads * 2 // scans)
    added, alone = max(0.0, whole - local), scans * scan
    return {
        "both_ms": whole,
        "without_exchange_ms": local,
        "exchange_share": added / whole,
        "scans_alone_ms": alone,
        "hidden": 1 - min(1.0, added / alone) if alone else None,
    }


def _scan_of(job: Job, count: int, algorithm: Algorithm, heads: int) -> float:
    """Milliseconds of the scan of the state of ``heads`` heads."""
    base = job.sizes.base
    state = SketchState.empty(1, heads, base.tables * 2**base.planes, base.head_dim, device=job.device)
    return job.milliseconds(lambda: start_scan([state], job.group(count), algorithm=algorithm).wait(), count, repeats=REPEATS)


def _call(job: Job, count: int, algorithm: Algorithm) -> Callable[[], object]:
    shape = replace(job.sizes.base, length=job.sizes.per_rank)
    q, k, v = inputs(shape, job.device)
    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=job.device, dtype=q.dtype)
    attention_inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        planes=planes.expand(shape.heads, -1, -1, -1),
        beta=torch.full((shape.heads,), 2.0, device=job.device),
        log_decay=None,
        key_mask=None,
        cu_seqlens=None,
        initial=None,
        causal=True,
        normalization="global",
    )
    backend = get_backend(select_backend(attention_inputs, "auto").name)
    group, gradient = job.group(count), torch.randn_like(q)
    assert group is not None

    def both() -> None:
        out, _ = context_parallel_attention(
            attention_inputs, group, "contiguous", backend, output_final=False, algorithm=algorithm
        )
        torch.autograd.grad(out, (q, k, v), gradient)

    return both
