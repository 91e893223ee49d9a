"""Description of the machine on which a benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from race_dist import __version__

_LIBRARIES = ("torch", "triton", "numpy", "fla-core", "flash-attn-3", "megatron-core")


def machine_info(device: torch.device) -> dict[str, Any]:
    """The header of a benchmark's JSON: processor, accelerator, versions, threads, date."""
    header: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "race_dist": __version__,
        "torch_threads": torch.get_num_threads(),
        "command": f"{_program()} {shlex.join(sys.argv[1:])}".rstrip(),
    }
    for name in _LIBRARIES:
        try:
            header[name] = version(name)
        except PackageNotFoundError:
            header[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        header |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return header


def _program() -> str:
    """The program in front of the arguments: ``race-dist``, or ``python -m`` with a module of this package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else ""
    return f"python -m {name}" if name.startswith("race_dist.") else "race-dist"


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    From /proc on Linux, because ``ru_maxrss`` is never lower than the parent's memory when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
        return peak if sys.platform == "darwin" else 1024 * peak
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
