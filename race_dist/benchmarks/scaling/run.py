"""Run every part in turn within the time limit, and write the JSON after each."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from race_dist.benchmarks.scaling import baselines, exactness, exchange, layers, step
from race_dist.benchmarks.scaling.job import LARGE, SMALL, Job
from race_dist.parallel import init_distributed, shutdown
from race_dist.training.config import load_config

PARTS = ("exactness", "exchange", "weak", "strong", "streamed_step", "baselines")  # also the keys of the report
OLD_NAMES = {"peers": "baselines"}  # of parts, in the commands of stored figures
TIMEOUT = 240.0  # seconds of the collectives' timeout: a rank may be compiling


def main() -> None:
    """The entry point that torchrun starts on every rank."""
    options = _parser().parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast off: not every host allows it
    device = init_distributed(device=options.device, timeout=TIMEOUT)
    job = Job(device, SMALL if device.type == "cpu" else LARGE, options.out, options.seconds)
    config = load_config(options.config, [f"data.path={options.text}", *options.override])
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "exactness": lambda: exactness.measure(job),
        "exchange": lambda: exchange.measure(job),
        "weak": lambda: layers.weak(job),
        "strong": lambda: layers.strong(job),
        "streamed_step": lambda: step.streamed_step(job, config, options.tokens, options.chunk, compiled=options.compile),
        "baselines": lambda: baselines.measure(job),
    }
    for given in options.parts.split(","):
        name = OLD_NAMES.get(given, given)
        _measure(job, name, measures[name])
    job.say(f"written: {options.out}")
    shutdown()


def _measure(job: Job, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Run one part. An error that every rank raises is written to the report and the next part runs; where ranks have
    diverged, the next collective fails."""
    gc.collect()
    left = job.seconds_left()
    if left <= 0:
        job.report[name] = {"skipped": f"the limit had passed by {-left:.0f} s"}
        job.write()
        return
    job.say(f"{name} ({left:.0f} s left)")
    try:
        job.report[name] = measure()
    except (RuntimeError, ValueError, ImportError) as error:  # out of memory, a missing operator
        job.report[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        job.say(f"{name} failed: {error}")
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    job.report.setdefault("seconds_left_after", {})[name] = job.seconds_left()
    job.write()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="race_dist.benchmarks.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=560, help="the call ends about then, with partial results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--config", type=Path, default=Path("configs/streaming-h100.toml"), help="model of the streamed step")
    parser.add_argument("--override", "-o", action="append", default=[], metavar="KEY=VALUE", help="change one of its keys")
    parser.add_argument("--text", default="python-stdlib", help="text of the streamed step")
    parser.add_argument("--tokens", type=int, default=75_000_000, help="of the streamed step, rounded up to whole chunks")
    parser.add_argument("--chunk", type=int, default=65536, help="tokens per rank whose activations exist at a time")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the streamed step")
    return parser
