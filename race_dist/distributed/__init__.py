"""Process groups, the mesh, collectives, consistency checks, the watchdog, data parallelism."""

from race_dist.distributed.communication import (
    ByteCount,
    all_gather_tensor,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_tensor,
    count_bytes,
    gather_objects,
    group_rank,
    group_size,
)
from race_dist.distributed.consistency import check_same_on_all_ranks
from race_dist.distributed.data_parallel import DataParallelModel, GradientReducer, full_tensor
from race_dist.distributed.mesh import build_mesh, init_distributed, new_gloo_group, shutdown
from race_dist.distributed.watchdog import RankFailure

__all__ = [
    "ByteCount",
    "DataParallelModel",
    "GradientReducer",
    "RankFailure",
    "all_gather_tensor",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_tensor",
    "build_mesh",
    "check_same_on_all_ranks",
    "count_bytes",
    "full_tensor",
    "gather_objects",
    "group_rank",
    "group_size",
    "init_distributed",
    "new_gloo_group",
    "shutdown",
]
