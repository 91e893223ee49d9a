"""What the launcher's variables say about the nodes of a job."""

from __future__ import annotations

import pytest

from race_dist.parallel.attention import splits_heads
from race_dist.rank_environment import DEFAULT_RANKS_PER_NODE, ranks_per_node

TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, DEFAULT_RANKS_PER_NODE),
        (TORCHRUN, 4),
        (TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, 4),  # torchrun as the one task of a node
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 3),  # launch local
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"} | SRUN, 4),  # launch local inside a step
        (SRUN, 4),
        (SRUN | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "8", "CROSS_SIZE": "2", "LOCAL_SIZE": "4"}, 4),  # DeepSpeed
        ({"WORLD_SIZE": "8", "RACE_DIST_RANKS_PER_NODE": "4"} | SRUN, 4),
        ({"WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "-1", "SLURM_NTASKS_PER_NODE": "4(x2)"}, DEFAULT_RANKS_PER_NODE),
    ],
)
def test_ranks_per_node_comes_from_the_launcher(environment: dict[str, str], expected: int) -> None:
    assert ranks_per_node(environment) == expected


def test_uneven_nodes_give_the_same_number_on_every_rank() -> None:
    uneven = {"WORLD_SIZE": "6", "GROUP_WORLD_SIZE": "2"}
    assert {ranks_per_node(uneven | {"LOCAL_WORLD_SIZE": local}) for local in ("4", "2")} == {3}
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):  # mpirun, and ranks that were started by hand
        assert {ranks_per_node({"WORLD_SIZE": "5", name: local}) for local in ("2", "1")} == {DEFAULT_RANKS_PER_NODE}


def test_heads_are_exchanged_at_once_inside_a_node_and_in_halves_between_nodes() -> None:
    assert not splits_heads(True, 4, ranks_per_node(TORCHRUN))
    assert splits_heads(True, 8, ranks_per_node(TORCHRUN))
    assert not splits_heads(True, 8, ranks_per_node({}))
    assert splits_heads(False, 2, ranks_per_node({}))
