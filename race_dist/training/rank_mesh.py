"""This process's place among the ranks of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from race_dist.distributed.mesh import build_mesh, init_distributed
from race_dist.parallel import group_rank, group_size
from race_dist.rank_environment import rank_environment
from race_dist.training.config import TrainConfig


@dataclass(frozen=True)
class RankMesh:
    """The mesh of a run as one rank sees it: ``dp`` groups of ``sp`` ranks each.

    Attributes:
        device: of this rank.
        world: all ranks of the mesh; None for one process.
        sp_group: the ranks that share this rank's sequences; None for one.
        layout: order of their shards.
    """

    device: torch.device
    world: ProcessGroup | None = None
    sp_group: ProcessGroup | None = None
    layout: str = "contiguous"

    @classmethod
    def join(cls, config: TrainConfig) -> RankMesh:
        """Join the job that the environment describes (none: this process alone) and take a place in its mesh.

        :func:`race_dist.parallel.shutdown` ends it.

        Raises:
            ValueError: the mesh of the configuration does not fit the number of ranks, or there is no such device.
        """
        dp, sp = config.parallel.mesh(rank_environment().world_size)
        device = init_distributed(device=None if config.device == "auto" else config.device, timeout=config.parallel.timeout)
        if dp * sp == 1:
            return cls(device)
        mesh = build_mesh(dp, sp)
        return cls(device, dist.group.WORLD, mesh["sp"].get_group() if sp > 1 else None, config.parallel.layout)

    @property
    def rank(self) -> int:
        """Of this process; 0 writes and prints."""
        return group_rank(self.world)

    @property
    def sp(self) -> int:
        """Ranks that share a sequence."""
        return group_size(self.sp_group)

    @property
    def sp_rank(self) -> int:
        """Which of them this is."""
        return group_rank(self.sp_group)

    @property
    def dp(self) -> int:
        """Groups of them."""
        return group_size(self.world) // self.sp

    @property
    def dp_rank(self) -> int:
        """Which group this rank is in."""
        return self.rank // self.sp
