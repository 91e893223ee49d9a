"""The ranks that share a sequence, in the form in which DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from race_dist.parallel import group_rank, group_size


class SequenceParallelMPU:
    """DeepSpeed's ``mpu`` of a dp x sp mesh: an object, where ``deepspeed.runtime.sequence_parallel.parallel_state_sp`` is a
    module that holds one mesh a process.

    It has no get_data_parallel_group: with one DeepSpeed would reduce gradients over that group alone.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        world = dist.group.WORLD
        assert world is not None
        self._world: ProcessGroup = world

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """Nothing is left to do. (By this name DeepSpeed knows an mpu of sequences.)"""

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
