"""The rank of this process in its job, from the launcher's environment variables. Imports no torch: launchers use it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

LOOPBACK = "127.0.0.1"
STORE_FD_VARIABLE = "RACE_DIST_STORE_FD"  # file descriptor of a socket listening at MASTER_PORT, inherited by rank 0
RANK_VARIABLES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        STORE_FD_VARIABLE,
    }
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "OMPI_COMM_WORLD_")
RANKS_PER_NODE_VARIABLE = "RACE_DIST_RANKS_PER_NODE"
DEFAULT_RANKS_PER_NODE = 8  # an HGX or DGX node, where the launcher does not say


@dataclass(frozen=True)
class RankEnvironment:
    """The launcher's variables of this process.

    Attributes:
        rank, world_size: RANK and WORLD_SIZE; 0 and 1 without a launcher.
        local_rank, local_world_size: LOCAL_RANK and LOCAL_WORLD_SIZE, on this machine; None if they are not set.
        master_addr, master_port: MASTER_ADDR and MASTER_PORT of the rendezvous; None and 0 for a single rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    master_addr: str | None = None
    master_port: int = 0

    @property
    def single_node(self) -> bool:
        """Whether all ranks run on this machine, by the launcher's variables."""
        return self.world_size > 1 and self.local_world_size == self.world_size


def rank_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment:
    """Read and check RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        environment: of a process; None is this one's.

    Raises:
        ValueError: a variable is empty, not an integer, or inconsistent with the others; the message names it.
    """
    e = os.environ if environment is None else environment
    rank, world = _integer(e, "RANK"), _integer(e, "WORLD_SIZE")
    rank, world = 0 if rank is None else rank, 1 if world is None else world
    if not 0 <= rank < world:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit: RANK counts from 0; unset both "
            "for one process, or start the ranks with a launcher"
        )
    local, local_world = local_rank(e), _integer(e, "LOCAL_WORLD_SIZE")
    if local_world is not None and local_world < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE={local_world} in the environment must be at least 1")
    if world == 1:
        return RankEnvironment(0, 1, local, local_world)
    if local_world is not None and (local_world > world or (local or 0) >= local_world):
        raise ValueError(
            f"LOCAL_WORLD_SIZE={local_world} in the environment fits neither WORLD_SIZE={world} nor LOCAL_RANK="
            f"{local or 0}: start the ranks with one launcher, or unset it"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not e.get(name, "").strip():
            raise ValueError(
                f"RANK={rank} and WORLD_SIZE={world} but {name} is not set: start the ranks with torchrun, set "
                "it to the host and port at which they meet, or unset RANK and WORLD_SIZE for one process"
            )
    port = _integer(e, "MASTER_PORT") or 0
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} in the environment must be a port from 1 to 65535")
    return RankEnvironment(rank, world, local, local_world, e["MASTER_ADDR"].strip(), port)


def local_rank(environment: Mapping[str, str] | None = None) -> int | None:
    """LOCAL_RANK; None if it is not set. ValueError unless it is an integer of at least 0."""
    value = _integer(os.environ if environment is None else environment, "LOCAL_RANK")
    if value is not None and value < 0:
        raise ValueError(f"LOCAL_RANK={value} in the environment must not be negative")
    return value


def ranks_per_node(environment: Mapping[str, str] | None = None) -> int:
    """Number of ranks that share a node, from the launcher's variables; the same on every rank of the job.

    RACE_DIST_RANKS_PER_NODE where it is set. Otherwise the number of ranks divided by the number of nodes, rounded up, where
    the launcher sets both: WORLD_SIZE and GROUP_WORLD_SIZE (torchrun) or CROSS_SIZE (DeepSpeed), SLURM_STEP_NUM_TASKS and
    SLURM_STEP_NUM_NODES (srun). Otherwise SLURM_NTASKS_PER_NODE, and without it ``DEFAULT_RANKS_PER_NODE``. The ranks of the
    own node alone (LOCAL_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_SIZE) do not count unless they are all ranks: nodes may differ,
    and every rank needs the same number. Values that are not positive integers are skipped.

    Args:
        environment: of a process; None is this one's, which is read once.
    """
    return _own_ranks_per_node() if environment is None else _ranks_per_node(environment)


@cache
def _own_ranks_per_node() -> int:
    return _ranks_per_node(os.environ)


def _ranks_per_node(e: Mapping[str, str]) -> int:
    given = _positive(e, RANKS_PER_NODE_VARIABLE)
    if given is not None:
        return given
    world = _positive(e, "WORLD_SIZE")
    tasks, step_nodes = _positive(e, "SLURM_STEP_NUM_TASKS"), _positive(e, "SLURM_STEP_NUM_NODES")
    nodes = _positive(e, "GROUP_WORLD_SIZE") or _positive(e, "CROSS_SIZE")
    if nodes is None and tasks is not None and world in (None, tasks):  # srun started the ranks, not a launcher inside a task
        world, nodes = tasks, step_nodes
    if world is not None and _positive(e, "LOCAL_WORLD_SIZE") == world:
        return world
    if world is not None and nodes is not None and nodes <= world:
        return -(-world // nodes)
    return _positive(e, "SLURM_NTASKS_PER_NODE") or DEFAULT_RANKS_PER_NODE


def _positive(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "").strip()
    return int(value) if re.fullmatch(r"0*[1-9][0-9]{0,8}", value) else None


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value):
        raise ValueError(f"{name} in the environment must be an integer; got {value!r} (unset it for one process)")
    return int(value)


def without_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Remove a launcher's variables about its ranks (RANK, MASTER_PORT, torchrun's TORCHELASTIC_* and so on): a new job's ranks
    must not join that launcher's job."""
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
