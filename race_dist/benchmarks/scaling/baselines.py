"""RACE and softmax attention over the same ranks, with the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from race_dist import race_attention
from race_dist.benchmarks.attention import inputs
from race_dist.benchmarks.scaling.job import Job
from race_dist.benchmarks.scaling.softmax import ring, ulysses
from race_dist.hashing import sample_planes

SLOWEST = 15.0  # seconds that one call of a baseline may take

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(job: Job) -> dict[str, Any]:
    """Forward + backward of each over all ranks; softmax is skipped where a call would take too long."""
    rows: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    for tokens in job.sizes.baselines:
        for name in ("race", "ulysses", "ring"):
            reason = _reason_to_skip(job, name, tokens, last)
            row: dict[str, Any] = {"name": name, "tokens": tokens, "ranks": job.size}
            if reason is None:
                row["both_ms"] = last[name] = _time(job, name, tokens)
                last[name + " tokens"] = tokens
            else:
                row["skipped"] = reason
            rows.append(row)
            job.say(str(row))
    return {"rows": rows}


def _reason_to_skip(job: Job, name: str, tokens: int, last: dict[str, float]) -> str | None:
    if name == "ulysses" and job.sizes.base.heads % job.size:
        return f"{job.sizes.base.heads} heads are not a multiple of {job.size} ranks"
    if name == "race" or name not in last:
        return None
    expected = last[name] / 1e3 * (tokens / last[name + " tokens"]) ** 2
    return f"would take about {expected:.0f} s per call" if expected > SLOWEST or 3 * expected > job.seconds_left() else None


def _time(job: Job, name: str, tokens: int) -> float:
    shape = replace(job.sizes.base, length=tokens // job.size)
    q, k, v = inputs(shape, job.device)
    gradient = torch.randn_like(q)
    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=job.device, dtype=q.dtype)
    calls: dict[str, Call] = {
        "race": lambda q, k, v: race_attention(q, k, v, planes, 2.0, group=job.group(job.size)),
        "ulysses": lambda q, k, v: ulysses(q, k, v, job.world),
        "ring": lambda q, k, v: ring(q, k, v, job.world),
    }
    both = lambda: torch.autograd.grad(calls[name](q, k, v), (q, k, v), gradient)
    return job.milliseconds(both, job.size, repeats=2)
