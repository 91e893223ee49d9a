"""Time per attention call and per layer on 1, 2, 4, ... ranks: strong and weak scaling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from race_dist import RaceAttention, RaceConfig, race_attention
from race_dist.benchmarks.attention import Shape, inputs
from race_dist.benchmarks.scaling.job import Job
from race_dist.benchmarks.scaling.predicted import attention_milliseconds
from race_dist.hashing import sample_planes
from race_dist.nn import Sequence


def strong(job: Job) -> dict[str, Any]:
    """Strong scaling: a fixed length over more and more ranks."""
    rows: list[dict[str, Any]] = []
    for tokens, heads in job.sizes.lengths:
        for count in job.counts:
            rows.append(_row(job, tokens, heads, count))
            job.say(str(rows[-1]))
        _compare_with_fewest([row for row in rows if row["tokens"] == tokens], strong=True)
        job.report["strong"] = {"rows": rows}
        job.write()
        if job.seconds_left() < 0:
            break
    return {"rows": rows}


def weak(job: Job) -> dict[str, Any]:
    """Weak scaling: a fixed length per rank, for the attention and for a RACE layer under autocast."""
    calls = [_row(job, job.sizes.per_rank * count, job.sizes.base.heads, count) for count in job.counts]
    _compare_with_fewest(calls, strong=False)
    layers = [_layer_row(job, count) for count in job.counts]
    _compare_with_fewest(layers, strong=False)
    return {"attention": calls, "layer": layers}


def _row(job: Job, tokens: int, heads: int, count: int) -> dict[str, Any]:
    """Forward, and forward + backward, of one attention call."""
    shape = replace(job.sizes.base, length=tokens // count, heads=heads)
    row: dict[str, Any] = {"tokens": tokens, "heads": heads, "ranks": count}
    if not job.fits(1.1 * shape.tensor_bytes):
        return row | {"skipped": f"q, k, v, output and gradients need {shape.tensor_bytes / 2**30:.0f} GiB per rank"}
    forward, both = _calls(job, shape, count)
    row |= {"forward_ms": job.milliseconds(forward, count), "both_ms": job.milliseconds(both, count)}
    return row | {"predicted_both_ms": attention_milliseconds(job, shape, count)}


def _calls(job: Job, shape: Shape, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The call of the first ``count`` ranks without and with gradients."""
    if not job.takes_part(count):
        return (lambda: None), (lambda: None)
    q, k, v = inputs(shape, job.device)
    gradient, group = torch.randn_like(q), job.group(count)
    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=job.device, dtype=q.dtype)

    def attend() -> Tensor:
        return race_attention(q, k, v, planes, 2.0, group=group)

    def forward() -> None:
        with torch.no_grad():
            attend()

    return forward, lambda: torch.autograd.grad(attend(), (q, k, v), gradient)


def _layer_row(job: Job, count: int) -> dict[str, Any]:
    """Forward + backward of a RaceAttention layer with its defaults."""
    base = job.sizes.base
    dim, tokens = base.heads * base.head_dim, job.sizes.per_rank
    row: dict[str, Any] = {"tokens": tokens * count, "ranks": count}
    if not job.fits(60 * tokens * dim):  # counted: what autograd saves of the layer, and its gradients
        return row | {"skipped": "does not fit"}
    call: Callable[[], object] = lambda: None
    if job.takes_part(count):
        config = RaceConfig(dim=dim, num_heads=base.heads, num_tables=base.tables, num_planes=base.planes)
        layer = RaceAttention(config).to(job.device)
        x = torch.randn(1, tokens, dim, device=job.device, requires_grad=True)
        autocast = torch.autocast(job.device.type, torch.bfloat16) if base.dtype == "bfloat16" else nullcontext()

        def call() -> None:
            with autocast:
                sequence = Sequence.of(tokens, group=job.group(count), return_carry=False, device=job.device)
                y, _ = layer(x, None, sequence)
            y.sum().backward()

    return row | {"both_ms": job.milliseconds(call, count)}


def _compare_with_fewest(rows: list[dict[str, Any]], *, strong: bool) -> None:
    """Efficiency relative to the smallest number of ranks that was measured: 1 is linear scaling."""
    measured = [row for row in rows if "both_ms" in row]
    for row in measured:
        first = measured[0]
        gain = first["both_ms"] / row["both_ms"]
        row["efficiency"] = gain * first["ranks"] / row["ranks"] if strong else gain
