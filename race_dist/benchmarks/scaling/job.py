"""A measurement over several ranks: its sizes, its timing, and the JSON that is written after every part."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from race_dist.benchmarks.attention import Shape
from race_dist.machine import machine_info
from race_dist.parallel import all_gather_tensor, all_reduce_max, barrier, broadcast_tensor, count_bytes
from race_dist.planning import GPUS, Cluster
from race_dist.planning.clusters import match_gpu


@dataclass(frozen=True)
class Sizes:
    """How large the problems are; :data:`LARGE` for GPUs, :data:`SMALL` for a test on CPUs.

    Attributes:
        base: sizes of the timed attention, without the length.
        exact: tokens of the inputs whose results are compared.
        lengths: total tokens, shared by 1, 2, 4, ... ranks (strong scaling), each with its number of heads: with few heads the
            longest fit one GPU of 80 GB.
        per_rank: tokens per rank (weak scaling).
        baselines: total tokens of the comparison with softmax over many ranks.
        state_heads: heads of the sketch whose scan is timed.
        repeats: timed calls.
    """

    base: Shape
    exact: int
    lengths: tuple[tuple[int, int], ...]
    per_rank: int
    baselines: tuple[int, ...]
    state_heads: int
    repeats: int


LARGE = Sizes(
    Shape(0, heads=8, head_dim=128, dtype="bfloat16"),
    2**16,
    ((2**20, 8), (2**22, 8), (2**24, 2), (2**26, 1)),
    2**20,
    (2**17, 2**18, 2**20),
    16,
    5,
)
SMALL = Sizes(Shape(0, heads=4, head_dim=16, tables=2, planes=2), 96, ((1024, 4), (2048, 2)), 512, (256,), 4, 2)


class Job:
    """One run of the benchmark: its ranks, its time limit and its report.

    Attributes:
        device: of this rank.
        sizes: of the inputs.
        report: JSON that rank 0 writes after every measurement.
    """

    def __init__(self, device: torch.device, sizes: Sizes, out: Path, seconds: float) -> None:
        self.device, self.sizes, self._out = device, sizes, out
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._started, self._seconds = time.monotonic(), seconds
        self.counts = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < self.size} | {self.size})
        self._groups = {n: dist.new_group(list(range(n))) for n in self.counts if n < self.size}
        assert dist.group.WORLD is not None
        self.world: ProcessGroup = dist.group.WORLD
        self.report: dict[str, Any] = {
            "machine": machine_info(device),
            "ranks": self.size,
            "limit_seconds": seconds,
            "torch_nccl": _nccl_version(device),
        }

    def group(self, count: int) -> ProcessGroup | None:
        """The first ``count`` ranks; None for one."""
        return None if count == 1 else self.world if count == self.size else self._groups[count]

    def takes_part(self, count: int) -> bool:
        """Whether this rank is one of the first ``count``."""
        return self.rank < count

    def cluster(self, count: int) -> Cluster:
        """The first ``count`` ranks as the planner's cluster."""
        gpu = match_gpu(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return Cluster(gpu or GPUS["cpu"], count, max(count, 1))

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.rank == 0:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)

    def seconds_left(self) -> float:
        """Seconds until the time limit by rank 0's clock, the same on every rank."""
        remaining = torch.tensor(self._seconds - (time.monotonic() - self._started), dtype=torch.float64, device=self.device)
        return float(broadcast_tensor(remaining, self.world))

    def write(self) -> None:
        """Write the report."""
        if self.rank == 0:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def max_over_ranks(self, value: float) -> float:
        """The maximum over all ranks."""
        return float(all_reduce_max(torch.tensor(value, dtype=torch.float64, device=self.device), self.world))

    def all_values(self, value: float) -> list[float]:
        """The values of all ranks."""
        return [float(v) for v in all_gather_tensor(torch.tensor(value, dtype=torch.float64, device=self.device), self.world)]

    def milliseconds(self, call: Callable[[], object], count: int, *, repeats: int | None = None) -> float:
        """The median time of a call that the first ``count`` ranks make together, on the slowest rank; all ranks wait."""
        median = 0.0
        if self.takes_part(count):
            call()
            median = statistics.median(self._once(call, count) for _ in range(repeats or self.sizes.repeats))
        barrier(self.world)
        return self.max_over_ranks(median)

    def _once(self, call: Callable[[], object], count: int) -> float:
        barrier(self.group(count))
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)

    def sent(self, call: Callable[[], object]) -> dict[str, Any]:
        """Calls and bytes that this rank passes to collectives in a call, by collective."""
        with count_bytes() as count:
            call()
        return {"bytes": count.bytes, "calls": count.calls, "by_op": {op: list(pair) for op, pair in count.by_op.items()}}

    def fits(self, size: float) -> bool:
        """Whether ``size`` bytes fit into the free memory of every rank's device (a CPU: 2 GiB)."""
        free = 2.0**31
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = float(torch.cuda.mem_get_info(self.device)[0])
        return self.max_over_ranks(size / free) <= 0.95


def _nccl_version(device: torch.device) -> list[int] | None:
    return list(torch.cuda.nccl.version()) if device.type == "cuda" else None
