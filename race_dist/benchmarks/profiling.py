"""Where the time of a call goes, kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

ROWS = 60


def profile(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The call's kernels (operators on the CPU) by their time in all.

    Returns:
        ``wall_ms``, ``busy_ms`` (kernels alone) and ``kernels``: name, calls and ms, the slowest first.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    kernels: list[dict[str, Any]] = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent and not (cuda and "CUDA" not in str(event.device_type)):
            kernels.append({"name": event.key[:120], "calls": event.count, "ms": spent / 1e3})
    kernels.sort(key=lambda k: -k["ms"])
    return {"wall_ms": 1e3 * wall, "busy_ms": sum(k["ms"] for k in kernels), "kernels": kernels[:ROWS]}
