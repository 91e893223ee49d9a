"""The commands a job consists of, as lists of arguments: nothing here goes through a shell."""

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
    """What every rank is to do: ``race-dist train CONFIG`` with its changes.

    Attributes:
        config: the training TOML, as an absolute path.
        name: of the run.
        folder: of all runs.
        overrides: ``a.b=value``, applied to the configuration.
        resume: go on from the newest good checkpoint; start where there is none.

    Raises:
        ValueError: one of them has a line break or another control character: they stand in scripts and manifests.
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
        """What follows ``race-dist``."""
        changes = [*self.overrides, f"device={job.device}"]
        if job.timeout is not None:
            changes.append(f"parallel.timeout={job.timeout:g}")
        words = ["train", str(self.config)]
        for change in changes:
            words += ["--override", change]
        return [*words, "--resume"] if self.resume else words


def working_folder() -> Path:
    """Where the command was started, which is where the ranks run. ValueError where its name has control characters."""
    return Path(one_line(str(Path.cwd()), "the working folder"))


def python(job: JobConfig) -> str:
    """The interpreter that the ranks run: the container's, the virtual environment's, or this one."""
    if job.container is not None:
        return "python3"
    return sys.executable if job.venv is None else str(Path(job.venv) / "bin" / "python")


def rank_command(job: JobConfig, words: Sequence[str]) -> list[str]:
    """One rank, started by a launcher that starts one process a rank (srun)."""
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
    """torchrun on one node of ``job.nodes``, which meet at ``endpoint``.

    Args:
        job: its shape.
        words: what follows ``race-dist``.
        endpoint: ``host:port`` of the first node.
        run_id: names the job, so that two of them do not mix.
        node_rank: this node's place; None lets the rendezvous choose.
        local_address: the address under which the others reach this node; None is its host name.
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
    first = _is_first(endpoint, node_rank, local_address)
    if first is not None:
        command.append(f"--rdzv-conf=is_host={str(first).lower()}")
    for option, value in (("--signals-to-handle", STOP_SIGNALS), ("--shutdown-timeout", str(job.stop_before))):
        if option in _torchrun_options():
            command.append(f"{option}={value}")
    return [*command, "-m", RANK_MODULE, *words]


def _is_first(endpoint: str, node_rank: str | None, local_address: str | None) -> bool | None:
    """Whether the nodes meet at this one; None where torchrun has to find out, which it does by host name only."""
    if node_rank is not None and node_rank.isdecimal():
        return node_rank == "0"
    if local_address is not None and "$" not in local_address:
        return endpoint.rpartition(":")[0] == local_address
    return None


def deepspeed_command(
    job: JobConfig, words: Sequence[str], *, hostfile: Path | None = None, master_address: str | None = None
) -> list[str]:
    """DeepSpeed's launcher. It passes ``--local_rank`` to each rank, which :mod:`race_dist.launch.rank` takes."""
    port = free_port_from(zlib.crc32(" ".join(words).encode()))  # its default is one port for all jobs of a machine
    command = [python(job), "-m", "deepspeed.launcher.runner", f"--num_gpus={job.ranks_per_node}", f"--master_port={port}"]
    if hostfile is not None:
        command += [f"--hostfile={hostfile}", f"--num_nodes={job.nodes}"]
    if master_address is not None:
        command.append(f"--master_addr={master_address}")
    return [*command, "--module", RANK_MODULE, *words]


def free_port_from(seed: int) -> int:
    """A port from 20000 to 28191 that nobody listens at here, the first at or behind the one that ``seed`` picks."""
    for offset in range(8192):
        port = 20000 + (seed + offset) % 8192
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
    raise OSError("no port from 20000 to 28191 is free on this machine")


def in_container(job: JobConfig, command: Sequence[str], environment: Iterable[str], folder: Path) -> list[str]:
    """The command inside the job's container, where the runtime wraps it (pyxis and edf are options of srun instead)."""
    box = job.container
    if box is None or box.runtime in ("pyxis", "edf"):
        return list(command)
    workdir = box.workdir or str(folder)
    if box.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if job.device == "cuda" else []), "--pwd", workdir]
        for mount in job.mounts:
            words += ["--bind", mount]
        return [*words, box.image, *command]
    words = [box.runtime, "run", "--rm", "--network=host", "--ipc=host", f"--workdir={workdir}", "--ulimit=memlock=-1"]
    if job.device == "cuda":
        words += ["--gpus=all"] if box.runtime == "docker" else ["--device=nvidia.com/gpu=all"]
    for mount in job.mounts:
        words.append(f"--volume={mount}")
    for name in environment:
        words.append(f"--env={name}")
    return [*words, box.image, *command]


def srun_container(job: JobConfig, folder: Path) -> list[str]:
    """The options that make srun start the ranks in the job's container."""
    box = job.container
    if box is None or box.runtime not in ("pyxis", "edf"):
        return []
    if box.runtime == "edf":
        return [f"--environment={box.image}"]
    words = [f"--container-image={box.image}", f"--container-workdir={box.workdir or folder}"]
    if job.mounts:
        words.append(f"--container-mounts={','.join(job.mounts)}")
    return words


def format_command(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    references: Mapping[str, EnvironmentReference] | None = None,
) -> str:
    """The command as one could type it, its environment in front; variables passed by reference stand as ``NAME="$OTHER"``."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    settings += [f'{name}="${r.from_env or name}"' for name, r in (references or {}).items()]
    return " ".join([*settings, shlex.join(command)])


@cache
def _torchrun_options() -> frozenset[str]:
    """What the installed torchrun understands: the signals it passes on became an option in the course of 2.x."""
    from torch.distributed.run import get_args_parser

    return frozenset(option for action in get_args_parser()._actions for option in action.option_strings)
