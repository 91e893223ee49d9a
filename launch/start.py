"""From a training configuration and a job's description to a run: what each verb of ``race-dist launch`` does."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from race_dist.launch import kubernetes, slurm
from race_dist.launch.command import Run, deepspeed_command, in_container, python, show, torchrun_command
from race_dist.launch.job import JobConfig, load_job
from race_dist.launch.local import supervise
from race_dist.launch.records import Record, recall
from race_dist.launch.sbatch import render
from race_dist.strict_config import shown
from race_dist.training.config import load_config
from race_dist.training.presets import find_config


def describe(config: Path, overrides: Iterable[str], job: str | None, changes: Iterable[str]) -> tuple[JobConfig, Run]:
    """The job and the run, checked together before anything is asked for.

    Raises:
        ValueError: the configuration or the job's description is wrong, or their numbers of ranks do not fit.
        FileNotFoundError: there is no such file.
    """
    description, words = load_job(job, changes), tuple(overrides)
    settings = load_config(config, [*words, f"device={description.device}"])
    settings.parallel.mesh(description.ranks)
    return description, Run(find_config(config).absolute(), settings.name, Path(settings.runs).absolute(), words)


def variants(run: Run, array: Sequence[str]) -> list[Run]:
    """One run for each combination of ``key=value,value,...``, named after its values; the run itself where there is none.

    Raises:
        ValueError: an entry has no ``=`` or no values.
    """
    choices = []
    for entry in array:
        key, equals, values = entry.partition("=")
        found = [value.strip() for value in values.split(",")]
        if not equals or not key.strip() or not all(found):
            raise ValueError(f"--array {entry!r} is not of the form key=value,value,..., for example seed=0,1,2")
        choices.append([(key.strip(), value) for value in found])
    if not choices:
        return [run]
    runs = []
    for pick in itertools.product(*choices):
        name = "-".join([run.name, *(f"{key.split('.')[-1]}-{value}" for key, value in pick)])
        changes = (*run.overrides, *(f"{key}={value}" for key, value in pick), f"name={name}")
        runs.append(replace(run, name=load_config(run.config, changes).name, overrides=changes))
    return runs


def local(job: JobConfig, run: Run, *, dry_run: bool) -> int:
    """Run on this machine, under a supervisor. Returns its exit code."""
    if job.nodes > 1:
        raise ValueError(f"nodes is {job.nodes}, and race-dist launch local has one machine; use torchrun, slurm or kubernetes")
    environment, words = job.environment() | {"RACE_DIST_SUPERVISED": "1"}, run.arguments(job)
    if job.container is not None:
        inside = ["race-dist", *words, "--nproc", str(job.ranks_per_node)]
        return _do(in_container(job, inside, environment, Path.cwd()), environment, dry_run)
    if dry_run:
        return _do([python(job), "-m", "race_dist.launch.local", str(job.ranks_per_node), *words], environment, dry_run)
    folder = run.folder / run.name / "checkpoints"
    return supervise(words, job.ranks_per_node, restarts=job.restarts, environment=environment, python=python(job),
                     progress=lambda: sorted(p.name for p in folder.glob("*-step-*")))


def torchrun(job: JobConfig, run: Run, *, endpoint: str | None, node_rank: int | None, local_address: str | None,
             dry_run: bool) -> int:
    """Run torchrun for this node; every node gets the same command. Returns its exit code."""
    if endpoint is None and job.nodes > 1:
        raise ValueError(f"{job.nodes} nodes need a place to meet: --endpoint HOST:PORT, the same on each of them")
    if node_rank is not None and node_rank >= job.nodes:
        raise ValueError(f"--node-rank {node_rank} does not fit nodes = {job.nodes}: it counts from 0")
    run_id = run.name if job.nodes > 1 else uuid.uuid4().hex
    environment = job.environment()
    command = torchrun_command(job, run.arguments(job), endpoint=endpoint or "localhost:0", run_id=run_id,
                               node_rank=None if node_rank is None else str(node_rank), local_address=local_address)
    return _do(in_container(job, command, environment, Path.cwd()), environment, dry_run)


def deepspeed(job: JobConfig, run: Run, *, hostfile: Path | None, dry_run: bool) -> int:
    """Run DeepSpeed's launcher. Returns its exit code."""
    if hostfile is None and job.nodes > 1:
        raise ValueError(f"{job.nodes} nodes need --hostfile FILE with a line 'HOST slots={job.ranks_per_node}' for each")
    if hostfile is not None:
        _check_hostfile(hostfile)
    environment = job.environment()
    command = deepspeed_command(job, run.arguments(job), hostfile=hostfile)
    return _do(in_container(job, command, environment, Path.cwd()), environment, dry_run)


def _check_hostfile(file: Path) -> None:
    """Raise ValueError where it is not a list of hosts as DeepSpeed reads it."""
    if not file.is_file():
        raise FileNotFoundError(f"--hostfile: there is no file {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    hosts = [line for line in lines if line and not line.startswith("#")]
    wrong = next((line for line in hosts if not re.fullmatch(r"\S+\s+slots=[1-9][0-9]*(\s+#.*)?", line)), None)
    if wrong is not None or not hosts:
        raise ValueError(f"--hostfile {file} " + ("names no host" if wrong is None else f"has the line {shown(wrong)}")
                         + "; it wants a line 'HOST slots=N' for each host")


def submit_slurm(job: JobConfig, run: Run, *, array: Sequence[str], plain: bool, write: Path | None,
                 dry_run: bool) -> list[str]:
    """Submit to Slurm, write the file, or with ``dry_run`` show it. Returns the lines to print."""
    runs = variants(run, array)
    if dry_run:
        return [render(job, each, slurm.logs_folder(job, each)) for each in runs]
    if write is not None:
        if len(runs) > 1:
            raise ValueError("--write writes one job; leave out --array")
        return [f"written: {slurm.write_script(job, run, write)}", f"submit it with: sbatch {write}"]
    records = [slurm.submit_script(job, each) for each in runs] if plain else slurm.submit_submitit(job, runs)
    return [_submitted(record) for record in records]


def submit_kubernetes(job: JobConfig, run: Run, *, write: Path | None, dry_run: bool) -> list[str]:
    """Apply the manifest, write it, or with ``dry_run`` show it. Returns the lines to print."""
    text = kubernetes.to_text(kubernetes.manifest(job, run))
    if dry_run:
        return [text]
    if write is not None:
        write.write_text(text, encoding="utf-8")
        return [f"written: {write}", f"apply it with: kubectl apply -f {write}"]
    return [_submitted(kubernetes.submit(job, run))]


def status(runs: Path, which: str | None) -> list[tuple[Record, dict[str, str]]]:
    """The submitted jobs and how they stand: ``state``, ``reason``, ``nodes``, ``restarts``, ``progress``."""
    found = []
    for record in recall(runs, which):
        facts = kubernetes.state(record) if record.scheduler == "kubernetes" else slurm.state(record)
        found.append((record, facts | {"progress": slurm.progress(record)}))
    return found


def logs(runs: Path, which: str, lines: int) -> list[str]:
    """The last lines of what the newest job of that name or id printed."""
    record = recall(runs, which)[-1]
    if record.scheduler == "kubernetes":
        return kubernetes.logs(record, lines).splitlines()
    files = slurm.log_files(record)
    if not files:
        raise ValueError(f"job {record.id} ({record.name}) has printed nothing yet: there is no {record.logs}")
    return list(slurm.tail(files, lines))


def cancel(runs: Path, which: str) -> list[str]:
    """End all jobs of that name or id that Slurm or Kubernetes still has. Returns a line for each."""
    lines = []
    for record in recall(runs, which):
        part = kubernetes if record.scheduler == "kubernetes" else slurm
        if part.state(record)["state"] in ("PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "COMPLETING", "CONFIGURING"):
            part.cancel(record)
            lines.append(f"cancelled: {record.id} ({record.name})")
    return lines or [f"nothing to cancel: no job of {which} is waiting or running"]


def _submitted(record: Record) -> str:
    return f"submitted: {record.id} ({record.name}); race-dist launch status {record.name} --runs {Path(record.run).parent}"


def _do(command: Sequence[str], environment: dict[str, str], dry_run: bool) -> int:
    if dry_run:
        print(show(command, environment))
        return 0
    try:
        return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not found on this machine") from None
