"""Model FLOPs of a step and peak FLOPs of the devices, for the model FLOPs utilization (MFU); and the peak memory."""

from __future__ import annotations

import torch

from race_dist.machine import peak_resident_bytes
from race_dist.parallel import group_size
from race_dist.planning.clusters import match_gpu
from race_dist.planning.cost_model import useful_flops
from race_dist.planning.layout import Job
from race_dist.training.config import TrainConfig
from race_dist.training.rank_mesh import RankMesh


def step_flops(config: TrainConfig) -> float:
    """Model FLOPs of a step (:func:`race_dist.planning.cost_model.useful_flops`)."""
    return useful_flops(Job.checked(config.model, config.data.context, config.data.batch_size, config.precision))


def peak_flops(config: TrainConfig, mesh: RankMesh) -> float | None:
    """The vendor's FLOPs per second of all ranks' devices together; None if the device is unknown."""
    if mesh.device.type != "cuda":
        return None
    gpu = match_gpu(torch.cuda.get_device_name(mesh.device))
    return None if gpu is None else gpu.flops[config.precision] * group_size(mesh.world)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
