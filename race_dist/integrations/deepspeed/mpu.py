"""The process groups of sequence parallelism as a DeepSpeed ``mpu`` (model parallel unit)."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from race_dist.parallel import group_rank, group_size


class SequenceParallelMPU:
    """The ``mpu`` of a dp x sp mesh, as an object per engine.

    (``deepspeed.runtime.sequence_parallel.parallel_state_sp`` is a module and holds one mesh per process.) It has no
    get_data_parallel_group: DeepSpeed would reduce gradients over that group alone.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        world = dist.group.WORLD
        assert world is not None
        self._world: ProcessGroup = world

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """Do nothing. DeepSpeed recognizes an mpu with sequence parallelism by this method."""

    def get_sequence_parallel_group(self) -> ProcessGroup:
        return self._group

    def get_sequence_parallel_world_size(self) -> int:
        return group_size(self._group)

    def get_sequence_parallel_rank(self) -> int:
        return group_rank(self._group)

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        return self._world

    def get_sequence_data_parallel_world_size(self) -> int:
        return group_size(self._world)

    def get_sequence_data_parallel_rank(self) -> int:
        return group_rank(self._world)

    get_model_parallel_group = get_sequence_parallel_group
    get_model_parallel_world_size = get_sequence_parallel_world_size
    get_model_parallel_rank = get_sequence_parallel_rank
