"""Process groups: joining and leaving a job, and the mesh of data-parallel (``dp``) and context-parallel (``sp``) ranks."""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from race_dist import checks
from race_dist.distributed.communication import group_size
from race_dist.distributed.rendezvous import check_timeout, join_store
from race_dist.distributed.watchdog import get_watchdog, stop_watchdog
from race_dist.rank_environment import RankEnvironment, local_rank, rank_environment

DEFAULT_TIMEOUT = 600.0  # seconds


def init_distributed(*, device: str | torch.device | None = None, timeout: float = DEFAULT_TIMEOUT) -> torch.device:
    """Initialize ``torch.distributed`` from the environment, and return this rank's device.

    Under a launcher (torchrun and others set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK) this process becomes one
    of its ranks. A process without these variables becomes a world of one, so that the same code runs. The backend is gloo on
    the CPU and NCCL on CUDA.

    Args:
        device: "cpu", "cuda" or None: CUDA where a GPU is available, else the CPU.
        timeout: seconds after which a collective fails that a rank does not join, in every group of the job.

    Raises:
        TypeError: the timeout is not a number, or the device is neither text nor a ``torch.device``.
        ValueError: an environment variable is invalid, or the device does not exist.
        RankFailure: a rank did not join within the timeout; the message names it.
    """
    seconds = check_timeout(timeout)
    ranks = RankEnvironment(local_rank=local_rank()) if dist.is_initialized() else rank_environment()
    target = _device(device, ranks)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if dist.is_initialized():
        return target
    store = join_store(ranks, seconds) if ranks.world_size > 1 else HashStore()
    if ranks.single_node and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo then listens on the loopback interface only
    backend = "gloo" if target.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        rank=ranks.rank,
        world_size=ranks.world_size,
        store=store,
        timeout=seconds,
        device_id=target if target.type == "cuda" else None,
    )
    if ranks.world_size > 1:
        get_watchdog()
    return target


def shutdown() -> None:
    """Leave the job: a barrier, so that no rank ends while another still works, then ``destroy_process_group``.

    Call it only after success: after a failure the other ranks may never reach the barrier.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        stop_watchdog()
        dist.destroy_process_group()


def build_mesh(dp: int, sp: int, *, timeout: float | None = None) -> DeviceMesh:
    """All ranks as a ``dp`` x ``sp`` mesh: the ranks of ``mesh["sp"]`` share a sequence (context parallelism), those of
    ``mesh["dp"]`` have different sequences (data parallelism).

        mesh = build_mesh(dp=2, sp=4)
        group = mesh["sp"].get_group()

    Neighbouring ranks share a sequence, so that a context-parallel group stays inside a node where possible.

    Args:
        dp: size of the data-parallel axis.
        sp: size of the context-parallel axis: ranks that share a sequence.
        timeout: seconds, for the groups of the mesh; None is the job's timeout.

    Raises:
        ValueError: ``dp * sp`` is not the number of ranks.
        RuntimeError: :func:`init_distributed` was not called.
    """
    if not dist.is_initialized():
        raise RuntimeError("build_mesh needs a job to build from: call race_dist.parallel.init_distributed() first")
    world = dist.get_world_size()
    for name, value in (("dp", dp), ("sp", sp)):
        checks.integer(name, value, minimum=1, maximum=2**31 - 1, words="an integer of at least 1")
    seconds = _job_timeout() if timeout is None else datetime.timedelta(seconds=checks.seconds("timeout", timeout))
    if dp * sp != world:
        raise ValueError(
            f"dp * sp must be the number of ranks: dp={dp} times sp={sp} is {dp * sp}, but there "
            f"{'is 1 rank' if world == 1 else f'are {world} ranks'}; start {dp * sp} or change dp or sp"
        )
    ranks, own_groups = torch.arange(world).view(dp, sp), {}
    for name, rows in (("dp", ranks.T), ("sp", ranks)):
        for row in rows.tolist():  # every rank creates every group; groups that DeviceMesh creates do not get the job's timeout
            group = dist.new_group(row, timeout=seconds)
            if dist.get_rank() in row:
                own_groups[name] = group
    device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return DeviceMesh.from_group([own_groups["dp"], own_groups["sp"]], device_type, mesh=ranks, mesh_dim_names=("dp", "sp"))


def new_gloo_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """A gloo group of the same ranks, for the collectives of a background thread; every rank of the job calls it.

    Two threads must not share a group: the order of their collectives would differ between ranks. None for one rank.
    """
    if group is None or group_size(group) == 1:
        return None
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", timeout=_job_timeout())


def _device(device: object, environment: RankEnvironment) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, bool) or not isinstance(device, str | torch.device):
        raise TypeError(f"device must be 'cpu', 'cuda' or None; got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {device!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {str(device)!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but PyTorch finds no GPU on this host: pass device='cpu'")
    local = (environment.local_rank or 0) if found.index is None else found.index
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local} asks for CUDA device {local}, but this host has {torch.cuda.device_count()}: "
            "start one rank a device, or pass device='cpu'"
        )
    return torch.device("cuda", local)


def _job_timeout() -> datetime.timedelta:
    group = dist.group.WORLD
    assert group is not None
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", datetime.timedelta(seconds=DEFAULT_TIMEOUT))
