"""The environment of a rank: its rank under any launcher, the cores near its GPU, and its caches."""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from race_dist.launch import caches

use_local_caches = caches.use_local_caches  # part of a rank's environment

_PR_SET_PDEATHSIG = 1
_STEP_STRIDE = (
    2749  # between the ports of two steps of a job: prime, so that steps and consecutive jobs seldom use the same port
)


def rank_variables(environment: Mapping[str, str], local_rank: int | None = None) -> dict[str, str]:
    """The variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT that the launcher did not set.

    Args:
        environment: of this process. An empty variable counts as not set.
        local_rank: the argument that DeepSpeed's launcher passes.

    Returns:
        The variables to set; none for a process without a launcher.

    Raises:
        ValueError: the launcher started several ranks without MASTER_ADDR and MASTER_PORT, or its variables are inconsistent.
    """
    e = {name: value for name, value in environment.items() if value.strip()}
    step = "SLURM_PROCID" in e and "SLURM_STEP_ID" in e and "SLURM_STEP_NODELIST" in e
    if "RANK" in e and "WORLD_SIZE" in e:  # torchrun, DeepSpeed
        if step and "TORCHELASTIC_RUN_ID" not in e:
            _check_against_step(e)
        variables = {}
        if local_rank is not None and "LOCAL_RANK" not in e:
            variables["LOCAL_RANK"] = str(local_rank)
        return variables
    if step:
        return _srun_variables(e)
    if "OMPI_COMM_WORLD_RANK" in e:
        variables = {
            "RANK": e["OMPI_COMM_WORLD_RANK"],
            "WORLD_SIZE": str(_integer(e, "OMPI_COMM_WORLD_SIZE")),
            "LOCAL_RANK": str(_integer(e, "OMPI_COMM_WORLD_LOCAL_RANK")),
            "LOCAL_WORLD_SIZE": str(_integer(e, "OMPI_COMM_WORLD_LOCAL_SIZE")),
        }
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in e]
        if missing and int(variables["WORLD_SIZE"]) > 1:
            raise ValueError(
                f"mpirun started {variables['WORLD_SIZE']} ranks, but {' and '.join(missing)} is not set: pass "
                "-x MASTER_ADDR=... -x MASTER_PORT=... with the first host and a free port"
            )
        return variables
    return {}


def _srun_variables(e: Mapping[str, str]) -> dict[str, str]:
    """The variables of one task of srun. MASTER_ADDR is the step's first node unless it was exported."""
    world = _integer(e, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in e else "SLURM_NTASKS")
    if world <= 1:
        return {}
    variables = {
        "RANK": str(_integer(e, "SLURM_PROCID")),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(_integer(e, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(e)),
    }
    if "MASTER_ADDR" not in e:
        variables["MASTER_ADDR"] = expand_hostlist(e["SLURM_STEP_NODELIST"])[0]
    if "MASTER_PORT" not in e:
        # one of 8192 ports, chosen by job and step: two jobs on a node and two steps of a job use different ports
        variables["MASTER_PORT"] = str(
            20000 + (_integer(e, "SLURM_JOB_ID") + _STEP_STRIDE * _integer(e, "SLURM_STEP_ID")) % 8192
        )
    return variables


def _check_against_step(e: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE left over in the shell, which would make every task of a step a job of one rank."""
    tasks = _integer(e, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in e else "SLURM_NTASKS")
    if _integer(e, "WORLD_SIZE") == 1 < tasks:
        raise ValueError(
            f"RANK={e['RANK']} and WORLD_SIZE={e['WORLD_SIZE']} are set in the environment, but srun started "
            f"{tasks} tasks: unset RANK and WORLD_SIZE, so that each task takes its rank from Slurm"
        )


def _integer(e: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,12}", e.get(name, "").strip()):
        found = f"got {e[name]!r}" if name in e else "it is not set"
        raise ValueError(f"{name} in the environment must be an integer; {found}")
    return int(e[name])


def _tasks_on_node(e: Mapping[str, str]) -> int:
    """The number of tasks on this node, from Slurm's ``4(x2),3``."""
    counts: list[int] = []
    for part in e.get("SLURM_STEP_TASKS_PER_NODE", e.get("SLURM_TASKS_PER_NODE", "1")).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE has {part!r}, which is not of the form 4 or 4(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(_integer({"SLURM_NODEID": "0", **e}, "SLURM_NODEID"), len(counts) - 1)]


def expand_hostlist(text: str) -> list[str]:
    """The host names of a Slurm host list: ``"nid[001-003,007],login"``. ValueError if it is malformed."""
    parts = re.findall(r"((?:[^,\[\]]|\[[^\]]*\])+)", text)
    hosts: list[str] = []
    for part in parts:
        hosts += _expand(part)
    if not hosts or any(c in host for host in hosts for c in "[]"):
        raise ValueError(f"{text!r} is not a list of hosts as Slurm writes them")
    return hosts


def _expand(part: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\]]+)\](.*)", part)
    if match is None:
        return [part]
    names = []
    for piece in match[2].split(","):
        first, dash, last = piece.partition("-")
        for number in range(int(first), int(last if dash else first) + 1):
            names.append(f"{match[1]}{number:0{len(first)}d}")
    return [name + end for name in names for end in _expand(match[3])]


def host_of_rank(rank: int, environment: Mapping[str, str]) -> str | None:
    """The node that Slurm gave to a rank (tasks in blocks, as the templates ask); None where it cannot be known."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        return None
    hosts, here = expand_hostlist(nodes), 0
    for index, host in enumerate(hosts):
        here += _tasks_on_node({**environment, "SLURM_NODEID": str(index)})
        if rank < here:
            return host
    return None


def numa_cores(bus_id: str, allowed: Sequence[int] | set[int], root: Path = Path("/sys")) -> set[int]:
    """The allowed cores of the NUMA node of a PCI device; all allowed cores if the node is unknown.

    Args:
        bus_id: ``"00000000:0F:00.0"`` or ``"0000:0f:00.0"``.
        allowed: cores that this process may use.
        root: the sysfs mount.
    """
    domain, _, rest = bus_id.lower().partition(":")
    folder = root / "bus/pci/devices" / f"{domain[-4:]}:{rest}"
    try:
        node = int((folder / "numa_node").read_text())
        text = (root / f"devices/system/node/node{node}/cpulist").read_text() if node >= 0 else ""
    except (OSError, ValueError):
        return set(allowed)
    return _cores(text) & set(allowed) or set(allowed)


def _cores(text: str) -> set[int]:
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cores |= set(range(int(first), int(last if dash else first) + 1))
    return cores


def bind_to_numa_node(local_rank: int, local_world: int) -> set[int] | None:
    """Bind this process to cores of its GPU's NUMA node, divided among the ranks of that NUMA node.

    Memory follows: Linux allocates it on the node of the core that first touches it.

    Returns:
        The cores, or None if there is no GPU or no choice.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    allowed = os.sched_getaffinity(0)
    count = torch.cuda.device_count()
    by_gpu = [numa_cores(_bus_id(i), allowed) for i in range(count)]
    own = by_gpu[local_rank % count]
    sharers = [r for r in range(local_world) if by_gpu[r % count] == own]
    cores = split_cores(sorted(own), sharers.index(local_rank), len(sharers))
    if cores == allowed:
        return None
    os.sched_setaffinity(0, cores)
    return cores


def split_cores(cores: Sequence[int], index: int, count: int) -> set[int]:
    """The ``index``-th of ``count`` equal parts; all cores if there are fewer cores than parts."""
    if len(cores) < count:
        return set(cores)
    return set(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def _bus_id(index: int) -> str:
    import torch

    p: Any = torch.cuda.get_device_properties(index)  # its type stubs lack the PCI numbers
    return f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the launcher that started it ends, so that no rank is left behind.

    Args:
        parent: process id of the launcher, read when this process started.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the launcher ended before the call
        os._exit(128 + signal.SIGKILL)
