"""The attention over many ranks: meshes, shard layouts, the exclusive scan. All the project's collectives live here."""

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
from race_dist.distributed.consistency import check_ranks_agree
from race_dist.distributed.data_parallel import GradientSum, Replica, full_tensor
from race_dist.distributed.mesh import build_mesh, init_distributed, shutdown, side_group
from race_dist.distributed.watchdog import RankFailure
from race_dist.parallel.scan import ScanHandle, carries_in, exclusive_scan, exclusive_total, fold, start_scan
from race_dist.parallel.sharding import (
    LAYOUTS,
    Layout,
    Segments,
    local_segments,
    shard_lengths,
    shard_offset,
    shard_positions,
    shard_rows,
    shard_sequence,
    unshard_sequence,
)

__all__ = [
    "LAYOUTS",
    "ByteCount",
    "GradientSum",
    "Layout",
    "RankFailure",
    "Replica",
    "ScanHandle",
    "Segments",
    "all_gather_tensor",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_tensor",
    "build_mesh",
    "carries_in",
    "check_ranks_agree",
    "count_bytes",
    "exclusive_scan",
    "exclusive_total",
    "fold",
    "full_tensor",
    "gather_objects",
    "group_rank",
    "group_size",
    "init_distributed",
    "local_segments",
    "shard_lengths",
    "shard_offset",
    "shard_positions",
    "shard_rows",
    "shard_sequence",
    "shutdown",
    "side_group",
    "start_scan",
    "unshard_sequence",
]
