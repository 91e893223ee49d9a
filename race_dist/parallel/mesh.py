"""Starting and ending the processes' communication, and the mesh of data-parallel and sequence-parallel ranks."""

from __future__ import annotations

import datetime
import os
import secrets
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, ProcessGroup, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from race_dist import checks
from race_dist.parallel.comm import group_size
from race_dist.parallel.watch import RankFailure, name_ranks, stop_watch, watch

DEFAULT_TIMEOUT = 600.0  # seconds


def init_distributed(*, device: str | torch.device | None = None, timeout: float = DEFAULT_TIMEOUT) -> torch.device:
    """Join the job that the environment describes, and return this rank's device.

    Under a launcher (torchrun and its like set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK) this process
    becomes one of its ranks. A plain process becomes a world of one, so that the same code runs. Communication is gloo on
    the CPU and NCCL on CUDA.

    Args:
        device: "cpu", "cuda" or None, which is CUDA where there is a device.
        timeout: seconds after which a collective that a rank does not join fails, in every group of the job.

    Raises:
        ValueError: an environment variable does not make sense, or the device does not exist.
        RankFailure: a rank did not come within the timeout; the message names it.
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be a positive number of seconds; got {timeout}")
    place = _device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if dist.is_initialized():
        return place
    rank, world = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit: RANK counts from 0")
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"WORLD_SIZE={world} but {name} is not set: start the ranks with torchrun, or set it to "
                                 "the host and port at which they meet")
    seconds = datetime.timedelta(seconds=timeout)
    store = _meet(rank, world, seconds) if world > 1 else HashStore()
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=seconds,
                            device_id=place if place.type == "cuda" else None)
    if world > 1:
        watch()
    return place


def shutdown() -> None:
    """Leave the job: a barrier, so that no rank ends while another still works, then the end of communication.

    Call it only where the job went well: after a failure the other ranks may never come to the barrier.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        stop_watch()
        dist.destroy_process_group()


def build_mesh(dp: int, sp: int, *, timeout: float | None = None) -> DeviceMesh:
    """All ranks as ``dp`` rows of ``sp``: ``mesh["sp"]`` shares a sequence, ``mesh["dp"]`` holds different ones.

        mesh = build_mesh(dp=2, sp=4)
        group = mesh["sp"].get_group()

    Neighbouring ranks share a sequence, so that a node holds one where it can.

    Args:
        dp: data-parallel rows, each with its own sequences.
        sp: ranks that share a sequence.
        timeout: seconds, for the groups of the mesh; None is that of the job.

    Raises:
        ValueError: ``dp * sp`` is not the number of ranks.
        RuntimeError: :func:`init_distributed` was not called.
    """
    if not dist.is_initialized():
        raise RuntimeError("build_mesh needs a job to build from: call race_dist.parallel.init_distributed() first")
    world = dist.get_world_size()
    for name, value in (("dp", dp), ("sp", sp)):
        checks.integer(name, value, least=1, most=2**31 - 1, words="an integer of at least 1")
    seconds = _job_timeout() if timeout is None else datetime.timedelta(seconds=checks.seconds("timeout", timeout))
    if dp * sp != world:
        raise ValueError(f"dp * sp must be the number of ranks: dp={dp} times sp={sp} is {dp * sp}, but there "
                         f"{'is 1 rank' if world == 1 else f'are {world} ranks'}; start {dp * sp} or change dp or sp")
    ranks, mine = torch.arange(world).view(dp, sp), {}
    for name, rows in (("dp", ranks.T), ("sp", ranks)):
        for row in rows.tolist():  # every rank takes part in making every group; a mesh's own have no timeout of the job's
            group = dist.new_group(row, timeout=seconds)
            if dist.get_rank() in row:
                mine[name] = group
    device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return DeviceMesh.from_group([mine["dp"], mine["sp"]], device_type, mesh=ranks, mesh_dim_names=("dp", "sp"))


def side_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """A gloo group of the same ranks, for collectives of a background thread; every rank of the job calls it.

    Two threads must not share a group: their collectives would meet in any order. One rank needs none (None).
    """
    if group is None or group_size(group) == 1:
        return None
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", timeout=_job_timeout())


def _meet(rank: int, world: int, timeout: datetime.timedelta) -> Any:
    """The job's store, once every rank has come to it."""
    host, port, seconds = os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0), timeout.total_seconds()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher holds it
            store = next(iter(rendezvous("env://", rank, world, timeout=timeout)))[0]
        else:
            store = TCPStore(host, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RankFailure(f"rank {rank}: no job found at MASTER_ADDR={host}, MASTER_PORT={port} within {seconds:g} s; does "
                          f"rank 0 run there, and is the port free? [{error}]", [0] if rank else []) from error
    hall = PrefixStore("race_dist/job", store)
    job, missing = _enter(hall, rank, world, timeout)
    if missing:
        raise RankFailure(f"rank {rank}: {name_ranks(missing)} of {world} did not join the job at {host}:{port} within "
                          f"{seconds:g} s", missing)
    return job


def _enter(hall: Any, rank: int, world: int, timeout: datetime.timedelta) -> tuple[Any, list[int]]:
    """This start's own part of the store, and the ranks that did not come to it.

    A launcher that starts failed ranks again may keep its store, full of what the ranks before have left. So rank 0 makes a
    name for this start and gives it to every rank that says hello with a word never used before.
    """
    deadline, word = time.monotonic() + timeout.total_seconds(), secrets.token_hex(8)
    hall.set(f"hello/{rank}", word)
    if rank:
        try:
            hall.wait([f"welcome/{word}"], timeout)
        except RuntimeError:
            return None, [0]
    start = hall.get(f"welcome/{word}").decode() if rank else secrets.token_hex(8)
    job, keys = PrefixStore(start, hall), [f"here/{r}" for r in range(world)]
    job.set(keys[rank], "1")
    if rank:
        try:
            job.wait(keys, timeout)
        except RuntimeError:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        return job, []
    greeted: set[str] = set()
    while not job.check(keys):
        if time.monotonic() > deadline:
            return job, [r for r, key in enumerate(keys) if not job.check([key])]
        for r in range(1, world):
            if hall.check([f"hello/{r}"]) and (other := hall.get(f"hello/{r}").decode()) not in greeted:
                hall.set(f"welcome/{other}", start)
                greeted.add(other)
        time.sleep(0.01)
    return job, []


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {str(device)!r}")
    if place.type == "cpu":
        return place
    local = _environment("LOCAL_RANK", 0) if place.index is None else place.index
    if local >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK={local} asks for CUDA device {local}, but this host has {torch.cuda.device_count()}: "
                         "start one rank a device, or pass device='cpu'")
    return torch.device("cuda", local)


def _job_timeout() -> datetime.timedelta:
    group = dist.group.WORLD
    assert group is not None
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", datetime.timedelta(seconds=DEFAULT_TIMEOUT))


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} in the environment must be an integer; got {value!r}") from None
