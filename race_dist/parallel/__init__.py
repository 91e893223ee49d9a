"""The attention over many ranks: meshes, shard layouts, the exclusive scan. All the project's collectives live here."""

from race_dist.parallel.agree import check_ranks_agree
from race_dist.parallel.comm import (
    ByteCount,
    all_gather_tensor,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_tensor,
    count_bytes,
    group_rank,
    group_size,
)
from race_dist.parallel.layout import (
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
from race_dist.parallel.mesh import build_mesh, init_distributed, shutdown
from race_dist.parallel.scan import ScanHandle, carries_in, exclusive_scan, exclusive_total, fold, start_scan
from race_dist.parallel.watch import RankFailure

__all__ = [
    "LAYOUTS",
    "ByteCount",
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
    "carries_in",
    "check_ranks_agree",
    "count_bytes",
    "exclusive_scan",
    "exclusive_total",
    "fold",
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
    "start_scan",
    "unshard_sequence",
]
