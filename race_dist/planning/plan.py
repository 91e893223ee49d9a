"""A plan: memory, communication and time of one optimizer step under a layout, and the search for the best layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from race_dist.planning.clusters import Cluster
from race_dist.planning.communication_cost import Exchange, exchange
from race_dist.planning.cost_model import (
    attention_seconds,
    count_passes,
    elementwise_seconds,
    launch_seconds,
    matmul_seconds,
    offload_seconds,
    optimizer_seconds,
    useful_flops,
)
from race_dist.planning.device_rates import Rates
from race_dist.planning.layout import Job, Keep, Layout, Sharding, growing_carries, parse_count
from race_dist.planning.memory import Memory, memory
from race_dist.planning.roofline import Roofline

MAX_CONTEXT = 2**50  # tokens: where the search for the largest context ends
CHUNKS = tuple(2**n for n in range(10, 23))  # chunk sizes that are tried


@dataclass(frozen=True)
class Plan:
    """One job under one layout.

    Attributes:
        job, layout, cluster, rates: the inputs of the plan.
        memory: of the GPU that needs most.
        exchange: bytes that one GPU sends per step.
        seconds: per step, by part; they add up to ``step``.
    """

    job: Job
    layout: Layout
    cluster: Cluster
    rates: Rates
    memory: Memory
    exchange: Exchange
    seconds: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all GPUs."""
        return self.job.context * self.job.batch / self.step

    @property
    def mfu(self) -> float:
        """Useful operations over what the GPUs' peak could do in the time; recomputation does not count."""
        peak = self.cluster.gpu.flops[self.job.precision] * self.layout.ranks
        return useful_flops(self.job) / (peak * self.step)

    @property
    def repeats(self) -> float:
        """Operations of the blocks over those that any method needs: 4/3 when streamed, because of recomputation."""
        return count_passes(self.job, self.layout).forward_units / 3


def make_plan(job: Job, layout: Layout, cluster: Cluster, rates: Rates | None = None) -> Plan:
    """Predict one step.

    Raises:
        ValueError: the layout does not fit the job or the cluster.
    """
    layout.check(job, cluster)
    rates = rates or Rates()
    roofline = Roofline(job, cluster, rates)
    tokens = layout.rows(job) * layout.shard(job)
    forward, backward = attention_seconds(job, layout, roofline)
    sent = exchange(job, layout, roofline)
    seconds = {
        "matrix products": matmul_seconds(job, layout, roofline),
        "attention": tokens * (forward * count_passes(job, layout).forward + backward),
        "element-wise": elementwise_seconds(job, layout, roofline),
        "exchange not hidden": sent.exposed,
        "optimizer": optimizer_seconds(job, layout, roofline),
        "offload not hidden": offload_seconds(job, layout, roofline),
    }
    device = sum(seconds[part] for part in ("matrix products", "attention", "element-wise"))
    seconds["waiting for the host"] = max(0.0, launch_seconds(job, layout, roofline) - device)
    return Plan(job, layout, cluster, rates, memory(job, layout, cluster), sent, seconds)


@dataclass(frozen=True)
class Choices:
    """Options that the search may vary: None is free, a value is fixed. ``chunk_size = 0`` fixes "not streamed"."""

    dp: int | None = None
    sp: int | None = None
    chunk_size: int | None = None
    checkpointing: bool | None = None
    sharding: Sharding | None = None
    keep: Keep | None = None

    @classmethod
    def checked(
        cls,
        dp: int | None,
        sp: int | None,
        chunk_size: str | None,
        checkpointing: bool | None,
        sharding: str | None,
        keep: str | None,
    ) -> Choices:
        """Choices from the command line's texts. Raises ValueError for an invalid one."""
        chunk = None if chunk_size is None else parse_count(chunk_size)
        tried = Layout(
            1 if dp is None else dp,
            1 if sp is None else sp,
            chunk or None,
            False,
            cast(Sharding, sharding or "none"),
            cast(Keep, keep or "device"),
        )
        return cls(
            dp, sp, chunk, checkpointing, None if sharding is None else tried.sharding, None if keep is None else tried.keep
        )

    def layouts(self, job: Job, cluster: Cluster) -> Iterator[Layout]:
        """Every layout that the choices allow and whose sizes divide."""
        for dp, sp in self._meshes(job, cluster):
            shard = -(-job.context // sp)
            for chunk in self._chunks(job, shard):
                for checkpointing in (False, True) if self.checkpointing is None else (self.checkpointing,):
                    keeps: tuple[Keep, ...] = ("device", "host") if self.keep is None else (self.keep,)
                    for keep in keeps if chunk is not None else keeps[:1]:
                        for sharding in self._shardings(cluster):
                            yield Layout(dp, sp, chunk, checkpointing, sharding, keep)

    def _meshes(self, job: Job, cluster: Cluster) -> list[tuple[int, int]]:
        meshes = [
            (dp, cluster.count // dp)
            for dp in range(1, min(cluster.count, job.batch) + 1)
            if cluster.count % dp == 0 and job.batch % dp == 0 and job.context >= cluster.count // dp
        ]
        meshes = [(dp, sp) for dp, sp in meshes if self.dp in (None, dp) and self.sp in (None, sp)]
        if not meshes:
            dp = self.dp or (max(1, cluster.count // self.sp) if self.sp else 1)
            Layout(dp, self.sp or max(1, cluster.count // dp)).check(job, cluster)
            raise ValueError(f"no dp x sp makes {cluster.count} GPUs with batch = {job.batch}: change --gpus or --batch")
        return meshes

    def _chunks(self, job: Job, shard: int) -> list[int | None]:
        if self.chunk_size is not None:
            return [self.chunk_size or None]
        if growing_carries(job.model):
            return [None]
        return [None, *(chunk for chunk in CHUNKS if chunk < shard)]

    def _shardings(self, cluster: Cluster) -> tuple[Sharding, ...]:
        if self.sharding is not None:
            return (self.sharding,)
        return ("none", "fsdp") if cluster.count > 1 else ("none",)


def recommend(job: Job, cluster: Cluster, rates: Rates | None = None, choices: Choices | None = None) -> Plan:
    """The fastest layout that fits; among those within 2% of it the simplest, then the one with the smallest peak.

    Where none fits, the one that is closest to fitting (its ``memory.fits`` is False).
    """
    plans = [make_plan(job, layout, cluster, rates) for layout in (choices or Choices()).layouts(job, cluster)]
    fitting = [plan for plan in plans if plan.memory.fits]
    if not fitting:
        return min(
            plans,
            key=lambda plan: (
                plan.memory.peak / plan.memory.capacity + max(0.0, plan.memory.host / plan.memory.host_capacity - 1)
            ),
        )
    fastest = min(plan.step for plan in fitting)
    close = [plan for plan in fitting if plan.step <= 1.02 * fastest]
    return min(
        close,
        key=lambda plan: (
            plan.layout.sharding == "fsdp",
            plan.layout.checkpointing,
            plan.layout.keep == "host",
            plan.memory.peak,
        ),
    )


def largest_context(plan: Plan, choices: Choices | None = None, *, seconds: float | None = None) -> int:
    """The longest context, to 1%, that fits the memory (and a step of ``seconds``) on the plan's mesh and sharding with the
    best chunk size for it; 0 if none does."""
    layout = plan.layout
    fixed = replace(choices or Choices(), dp=layout.dp, sp=layout.sp, sharding=layout.sharding)

    def possible(context: int) -> bool:
        job = replace(plan.job, context=context)
        for candidate in fixed.layouts(job, plan.cluster):
            if not memory(job, candidate, plan.cluster).fits:
                continue
            if seconds is None or make_plan(job, candidate, plan.cluster, plan.rates).step <= seconds:
                return True
        return False

    return _largest(possible, layout.sp)


def _largest(possible: Callable[[int], bool], start: int) -> int:
    """The largest number for which ``possible`` holds, to 1%; it must hold up to some number and not beyond."""
    if not possible(start):
        return 0
    low, high = start, 2 * start
    while possible(high):
        if high >= MAX_CONTEXT:
            return high
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return low
