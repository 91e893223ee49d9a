"""Timing by quantiles, several candidates in turn, so that a drift of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the tenth and ninetieth percentiles, and the number of calls."""

    p50: float
    p10: float
    p90: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """The quantiles of the calls' milliseconds."""
        ordered = sorted(samples)
        pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
        return cls(round(statistics.median(ordered), 4), round(pick(0.1), 4), round(pick(0.9), 4), len(ordered))

    def json(self) -> dict[str, float]:
        """As a JSON object."""
        return asdict(self)


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time each candidate ``repeats`` times, in the order A B C A B C ..., after ``warmup`` rounds. CUDA is timed by device
    events."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, call in candidates.items():
            elapsed = _once(call, device)
            if turn >= warmup:
                samples[name].append(elapsed)
    return {name: Timing.of(times) for name, times in samples.items()}


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)
