"""The commands of a job, as lists of arguments: none of them is run through a shell."""

from __future__ import annotations

import shlex
import socket
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from race_dist.launch.environment import EnvironmentReference, one_line
from race_dist.launch.job import JobConfig

RANK_MODULE = "race_dist.launch.rank"
STOP_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


@dataclass(frozen=True)
class Run:
    """What every rank runs: ``race-dist train CONFIG`` with overrides.

    Attributes:
        config: the training TOML, as an absolute path.
        name: name of the run.
        folder: the folder of all runs.
        overrides: ``a.b=value``, applied to the configuration.
        resume: continue from the newest valid checkpoint; start from the beginning if there is none.

    Raises:
        ValueError: one of them has a line break or another control character; they are written into scripts and manifests.
    """

    config: Path
    name: str
    folder: Path
    overrides: tuple[str, ...] = ()
    resume: bool = True

    def __post_init__(self) -> None:
        for what, text in (
            ("the configuration's path", str(self.config)),
            ("name", self.name),
            ("runs", str(self.folder)),
            *(("--override", override) for override in self.overrides),
        ):
            one_line(text, what)

    def arguments(self, job: JobConfig) -> list[str]:
        """The arguments of ``race-dist``."""
        changes = [*self.overrides, f"device={job.device}"]
        if job.timeout is not None:
            changes.append(f"parallel.timeout={job.timeout:g}")
        words = ["train", str(self.config)]
        for change in changes:
            words += ["--override", change]
        return [*words, "--resume"] if self.resume else words


def working_folder() -> Path:
    """The current folder, in which the ranks run. ValueError if its name has control characters."""
    return Path(one_line(str(Path.cwd()), "the working folder"))


def python(job: JobConfig) -> str:
    """The Python interpreter of the ranks: that of the container, of the virtual environment, or this one."""
    if job.container is not None:
        return "python3"
    return sys.executable if job.venv is None else str(Path(job.venv) / "bin" / "python")


def rank_command(job: JobConfig, words: Sequence[str]) -> list[str]:
    """The command of one rank, for a launcher that starts one process per rank (srun)."""
    return [python(job), "-m", RANK_MODULE, *words]


def torchrun_command(
    job: JobConfig,
    words: Sequence[str],
    *,
    endpoint: str,
    run_id: str,
    node_rank: str | None = None,
    local_address: str | None = None,
) -> list[str]:
    """torchrun on one of the job's nodes, with the rendezvous at ``endpoint``.

    Args:
        job: sets the numbers of nodes, ranks and restarts.
        words: the arguments of ``race-dist``.
        endpoint: ``host:port`` of the first node.
        run_id: identifies the job at the rendezvous, so that two jobs cannot join each other.
        node_rank: rank of this node; None lets the rendezvous choose.
        local_address: address of this node for the others; None is its host name.
    """
    nodes = f"{job.min_nodes}:{job.nodes}" if job.min_nodes is not None else str(job.nodes)
    command = [
        python(job),
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={job.ranks_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={run_id}",
        f"--max-restarts={job.restarts}",
        "--monitor-interval=1",
    ]
    if node_rank is not None:
        command.append(f"--node-rank={node_rank}")
    if local_address is not None:
        command.append(f"--local-addr={local_address}")
    first = _hosts_rendezvous(endpoint, node_rank, local_address)
    if first is not None:
        command.append(f"--rdzv-conf=is_host={str(first).lower()}")
    for option, value in (("--signals-to-handle", STOP_SIGNALS), ("--shutdown-timeout", str(job.stop_before))):
        if option in _torchrun_options():
            command.append(f"{option}={value}")
    return [*command, "-m", RANK_MODULE, *words]


def _hosts_rendezvous(endpoint: str, node_rank: str | None, local_address: str | None) -> bool | None:
    """Whether this node hosts the rendezvous; None if torchrun must find out, which it does by host name only."""
    if node_rank is not None and node_rank.isdecimal():
        return node_rank == "0"
    if local_address is not None and "$" not in local_address:
        return endpoint.rpartition(":")[0] == local_address
    return None


def deepspeed_command(
    job: JobConfig, words: Sequence[str], *, hostfile: Path | None = None, master_address: str | None = None
) -> list[str]:
    """DeepSpeed's launcher. It passes ``--local_rank`` to each rank, which :mod:`race_dist.launch.rank` reads."""
    port = free_port_from(zlib.crc32(" ".join(words).encode()))  # its default port is the same for all jobs of a machine
    command = [python(job), "-m", "deepspeed.launcher.runner", f"--num_gpus={job.ranks_per_node}", f"--master_port={port}"]
    if hostfile is not None:
        command += [f"--hostfile={hostfile}", f"--num_nodes={job.nodes}"]
    if master_address is not None:
        command.append(f"--master_addr={master_address}")
    return [*command, "--module", RANK_MODULE, *words]


def free_port_from(seed: int) -> int:
    """A free port from 20000 to 28191: the first at or after the one that ``seed`` selects."""
    for offset in range(8192):
        port = 20000 + (seed + offset) % 8192
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
    raise OSError("no port from 20000 to 28191 is free on this machine")


def in_container(job: JobConfig, command: Sequence[str], environment: Iterable[str], folder: Path) -> list[str]:
    """The command inside the job's container, if the runtime wraps commands (pyxis and edf are options of srun instead)."""
    container = job.container
    if container is None or container.runtime in ("pyxis", "edf"):
        return list(command)
    workdir = container.workdir or str(folder)
    if container.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if job.device == "cuda" else []), "--pwd", workdir]
        for mount in job.mounts:
            words += ["--bind", mount]
        return [*words, container.image, *command]
    words = [container.runtime, "run", "--rm", "--network=host", "--ipc=host", f"--workdir={workdir}", "--ulimit=memlock=-1"]
    if job.device == "cuda":
        words += ["--gpus=all"] if container.runtime == "docker" else ["--device=nvidia.com/gpu=all"]
    for mount in job.mounts:
        words.append(f"--volume={mount}")
    for name in environment:
        words.append(f"--env={name}")
    return [*words, container.image, *command]


def srun_container(job: JobConfig, folder: Path) -> list[str]:
    """The options of srun that start the ranks in the job's container."""
    container = job.container
    if container is None or container.runtime not in ("pyxis", "edf"):
        return []
    if container.runtime == "edf":
        return [f"--environment={container.image}"]
    words = [f"--container-image={container.image}", f"--container-workdir={container.workdir or folder}"]
    if job.mounts:
        words.append(f"--container-mounts={','.join(job.mounts)}")
    return words


def format_command(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    references: Mapping[str, EnvironmentReference] | None = None,
) -> str:
    """The command as a shell line, with its environment in front; variables passed by reference are ``NAME="$OTHER"``."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    settings += [f'{name}="${r.from_env or name}"' for name, r in (references or {}).items()]
    return " ".join([*settings, shlex.join(command)])


@cache
def _torchrun_options() -> frozenset[str]:
    """The options of the installed torchrun: ``--signals-to-handle`` was added in a release of 2.x."""
    from torch.distributed.run import get_args_parser

    return frozenset(option for action in get_args_parser()._actions for option in action.option_strings)
