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
from race_dist.parallel.watch import RankFailure

__all__ = [
    "LAYOUTS",
    "ByteCount",
    "Layout",
    "RankFailure",
    "Segments",
    "all_gather_tensor",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_tensor",
    "check_ranks_agree",
    "count_bytes",
    "group_rank",
    "group_size",
    "local_segments",
    "shard_lengths",
    "shard_offset",
    "shard_positions",
    "shard_rows",
    "shard_sequence",
    "unshard_sequence",
]
