"""One exact streamed optimizer step over all ranks, and its throughput compared with one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from race_dist.benchmarks.scaling.job import Job
from race_dist.benchmarks.scaling.predicted import step_seconds
from race_dist.benchmarks.streaming import Options, measure
from race_dist.parallel import barrier
from race_dist.training.config import TrainConfig

SINGLE_RANK_CHUNKS = 24  # chunks that one rank streams alone, to measure its throughput
RESERVED = 30.0  # seconds kept for the parts after this one


def streamed_step(job: Job, config: TrainConfig, tokens: int, chunk_size: int, *, compiled: bool) -> dict[str, Any]:
    """The step over all ranks; before it, the first rank alone over a part of the text."""
    options = Options(chunk_size, str(job.device), compiled=compiled)
    part = max(1, min(tokens // chunk_size, SINGLE_RANK_CHUNKS)) * chunk_size
    job.say(f"streaming {part:,} tokens on one rank")
    alone = measure(config, part, options) if job.rank == 0 else {}
    job.report["streamed_step_alone"] = alone
    job.write()
    barrier(job.world)
    step = chunk_size * job.size
    whole = -(-tokens // step) * step  # a shorter last chunk would compile another graph
    job.say(f"streaming {whole:,} tokens on {job.size} ranks")
    limited = replace(options, limit=max(1.0, job.seconds_left() - RESERVED))
    shared = measure(config, whole, limited, group=job.group(job.size))
    result: dict[str, Any] = {"alone": alone, "shared": shared, "peak_bytes": job.all_values(shared["peak_bytes"])}
    result["predicted_seconds"] = step_seconds(job, config, whole, chunk_size, job.size)
    if job.rank == 0 and "tokens_per_second" in alone and "tokens_per_second" in shared:
        result["speedup"] = shared["tokens_per_second"] / alone["tokens_per_second"]
        result["efficiency"] = result["speedup"] / job.size
    return result
