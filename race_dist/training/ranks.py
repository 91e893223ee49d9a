"""This process's place among the ranks of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from race_dist.parallel import group_rank, group_size


@dataclass(frozen=True)
class Ranks:
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

    @property
    def rank(self) -> int:
        """Of this process; 0 writes and prints."""
        return group_rank(self.world)

    @property
    def sp(self) -> int:
        """Ranks that share a sequence."""
        return group_size(self.sp_group)

    @property
    def dp(self) -> int:
        """Groups of them."""
        return group_size(self.world) // self.sp

    @property
    def dp_rank(self) -> int:
        """Which group this rank is in."""
        return self.rank // self.sp
