"""The mesh of a run: data-parallel groups of context-parallel ranks, and this rank's place in it."""

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
    """The mesh of a run as one rank sees it: ``dp`` data-parallel groups of ``sp`` context-parallel ranks each.

    Attributes:
        device: of this rank.
        world: all ranks of the mesh; None for one process.
        sp_group: the ranks that hold shards of this rank's sequences; None for one rank.
        layout: how a sequence is sharded over them, "contiguous" or "zigzag".
    """

    device: torch.device
    world: ProcessGroup | None = None
    sp_group: ProcessGroup | None = None
    layout: str = "contiguous"

    @classmethod
    def join(cls, config: TrainConfig) -> RankMesh:
        """Join the job that the environment describes (none: this process alone) and build the mesh.

        :func:`race_dist.parallel.shutdown` destroys the process groups.

        Raises:
            ValueError: the mesh of the configuration does not fit the number of ranks, or the device does not exist.
        """
        dp, sp = config.parallel.mesh(rank_environment().world_size)
        device = init_distributed(device=None if config.device == "auto" else config.device, timeout=config.parallel.timeout)
        if dp * sp == 1:
            return cls(device)
        mesh = build_mesh(dp, sp)
        return cls(device, dist.group.WORLD, mesh["sp"].get_group() if sp > 1 else None, config.parallel.layout)

    @property
    def rank(self) -> int:
        """This process's rank. Rank 0 writes and prints."""
        return group_rank(self.world)

    @property
    def sp(self) -> int:
        """Number of ranks that share a sequence."""
        return group_size(self.sp_group)

    @property
    def sp_rank(self) -> int:
        """This rank within ``sp_group``."""
        return group_rank(self.sp_group)

    @property
    def dp(self) -> int:
        """Number of data-parallel groups."""
        return group_size(self.world) // self.sp

    @property
    def dp_rank(self) -> int:
        """The data-parallel group that this rank belongs to."""
        return self.rank // self.sp
