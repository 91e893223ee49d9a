"""The dry run: a memory estimate and two steps on random tokens, before hours are spent on the run itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from race_dist.planning.clusters import GPU, Cluster, find_gpu, match_gpu
from race_dist.planning.layout import Job, Layout
from race_dist.planning.memory import Memory, memory
from race_dist.training.config import TrainConfig
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.step import random_batch
from race_dist.training.trainer import Trainer
from race_dist.training.utilization import peak_bytes


def estimate(config: TrainConfig, mesh: RankMesh) -> tuple[Memory, GPU | None]:
    """Estimated memory of one rank, and the planner's entry for its device (None: unknown; the estimate is that of a CPU)."""
    gpu = match_gpu(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else find_gpu("cpu")
    job = Job.checked(
        config.model, config.data.context, max(mesh.dp, config.data.batch_size // config.optim.accumulate), config.precision
    )
    layout = Layout(mesh.dp, mesh.sp, None, config.model.activation_checkpointing, config.parallel.sharding)
    return memory(job, layout, Cluster(gpu or find_gpu("cpu"), mesh.dp * mesh.sp)), gpu


def run_two_steps(trainer: Trainer) -> Iterator[str]:
    """Run two steps on random tokens and yield sentences for the user. Every rank calls it. It spoils the weights.

    Raises:
        FloatingPointError: the loss or the gradient is NaN or Inf.
    """
    config, mesh = trainer.config, trainer.mesh
    yield from trainer.describe()
    expected, gpu = estimate(config, mesh)
    kinds = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in expected.kinds.items() if size >= 2**19)
    yield f"estimated memory per rank: {expected.peak / 2**20:,.0f} MiB ({kinds})"
    if gpu is not None and mesh.device.type == "cuda" and expected.peak > (total := _memory_of(mesh.device)):
        yield f"warning: the device has {total / 2**20:,.0f} MiB; shard parameters, checkpoint activations, or use more ranks"
    before = peak_bytes(mesh.device)
    seconds = 0.0
    for attempt in range(2):  # the first step loads and compiles kernels
        started = time.perf_counter()
        try:
            result = trainer.train_step(batch=random_batch(config, attempt))
        except ValueError as error:
            if attempt == 0:
                raise
            raise FloatingPointError(f"after one step on made-up text {error}{_remedy(config)}") from None
        seconds = time.perf_counter() - started
        if result.verdict.bad is not None:
            raise FloatingPointError(f"on made-up text {result.verdict.bad}{_remedy(config)}")
    tokens = config.data.batch_size * config.data.context
    yield (
        f"one step on made-up text: loss {result.loss:.3f}, gradient norm {result.grad_norm:.3g}, {seconds:.2f} s "
        f"({tokens / seconds:,.0f} tokens/s), memory at most {peak_bytes(mesh.device) / 2**20:,.0f} MiB "
        f"({before / 2**20:,.0f} before)"
    )
    yield (
        f"all {config.steps:,} steps at this pace: {_duration(seconds * config.steps)}, plus evaluation; nothing was written"
    )


def _remedy(config: TrainConfig) -> str:
    return f"; lower optim.lr (it is {config.optim.lr:g}) or optim.weight_decay ({config.optim.weight_decay:g})"


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
