"""Context parallelism: sharding and the exclusive scan, with the public names of ``race_dist.distributed``."""

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
from race_dist.parallel.scan import ScanHandle, exclusive_scan, exclusive_scan_pieces, exclusive_sum, fold, start_scan
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
from race_dist.renamed_modules import renamed_attribute

__all__ = [
    "LAYOUTS",
    "ByteCount",
    "DataParallelModel",
    "GradientReducer",
    "Layout",
    "RankFailure",
    "ScanHandle",
    "Segments",
    "all_gather_tensor",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_tensor",
    "build_mesh",
    "check_same_on_all_ranks",
    "count_bytes",
    "exclusive_scan",
    "exclusive_scan_pieces",
    "exclusive_sum",
    "fold",
    "full_tensor",
    "gather_objects",
    "group_rank",
    "group_size",
    "init_distributed",
    "local_segments",
    "new_gloo_group",
    "shard_lengths",
    "shard_offset",
    "shard_positions",
    "shard_rows",
    "shard_sequence",
    "shutdown",
    "start_scan",
    "unshard_sequence",
]

RENAMED = {
    "GradientSum": "GradientReducer",
    "Replica": "DataParallelModel",
    "carries_in": "exclusive_scan_pieces",
    "check_ranks_agree": "check_same_on_all_ranks",
    "exclusive_total": "exclusive_sum",
    "side_group": "new_gloo_group",
}


def __getattr__(name: str) -> object:
    return renamed_attribute(__name__, RENAMED, name)
