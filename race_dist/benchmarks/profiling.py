"""Profile of one call, kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

MAX_ROWS = 60


def profile(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The call's kernels by total time; on the CPU its operators, named "outer/inner" inside one of this package's operators.

    Returns:
        ``wall_ms``, ``busy_ms`` (sum over kernels) and ``kernels``: name, calls and ms, slowest first.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    kernels = _device_kernels(profiler) if cuda else _operators(profiler)
    kernels.sort(key=lambda k: -k["ms"])
    return {"wall_ms": 1e3 * wall, "busy_ms": sum(k["ms"] for k in kernels), "kernels": kernels[:MAX_ROWS]}


def _device_kernels(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    return [
        {"name": event.key[:120], "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profiler.key_averages()
        if event.self_device_time_total and "CUDA" in str(event.device_type)
    ]


def _operators(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    """Self time of each operator, without the operators that it calls."""
    rows: dict[str, dict[str, Any]] = {}
    for event in profiler.events() or ():
        outer, name = event.cpu_parent, event.name[:120]
        while outer is not None and not outer.name.startswith("race_dist::"):
            outer = outer.cpu_parent
        name = name if outer is None else f"{outer.name}/{name}"
        row = rows.setdefault(name, {"name": name, "calls": 0, "ms": 0.0})
        row["calls"] += 1
        row["ms"] += event.self_cpu_time_total / 1e3
    return list(rows.values())
