"""What the verbs of ``race-dist launch`` do: load the job and the run, then start, submit, list or cancel."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from race_dist.launch import kubernetes, slurm
from race_dist.launch.command import (
    Run,
    deepspeed_command,
    format_command,
    in_container,
    python,
    torchrun_command,
    working_folder,
)
from race_dist.launch.job import JobConfig, load_job
from race_dist.launch.job_store import JobRecord, recall
from race_dist.launch.local import supervise
from race_dist.launch.sbatch import render
from race_dist.messages import short_repr
from race_dist.output_paths import write_private
from race_dist.rank_environment import without_rank_variables
from race_dist.training.config import load_config
from race_dist.training.presets import find_config
from race_dist.training.run_directory import RunDirectory


def load_job_and_run(
    config: Path, overrides: Iterable[str], job: str | None, changes: Iterable[str], *, on_this_machine: bool = False
) -> tuple[JobConfig, Run]:
    """The job and the run, checked together before anything is requested or started.

    Args:
        config: the training TOML.
        overrides: changes of its keys.
        job: a template or a file.
        changes: changes of the job's keys.
        on_this_machine: the ranks run on this machine, so the default device is a GPU only if there is one.

    Raises:
        ValueError: the configuration or the job's description is wrong, or their numbers of ranks do not fit.
        FileNotFoundError: there is no such file.
    """
    given, words = load_job(job, changes), tuple(overrides)
    wanted = load_config(config, words).device
    description = _with_device(given, wanted, words, on_this_machine=on_this_machine)
    settings = load_config(config, [*words, f"device={description.device}"])
    settings.parallel.mesh(description.ranks)
    if on_this_machine and description.device == "cpu":
        _report_cpu_ranks(description, no_gpu=wanted == "auto" and "device" not in given.model_fields_set)
    return description, Run(find_config(config).absolute(), settings.name, Path(settings.runs).absolute(), words)


def _with_device(job: JobConfig, wanted: str, words: Sequence[str], *, on_this_machine: bool) -> JobConfig:
    """The job with its device: that of ``--override device=``, else the job's own, else the configuration's, else a GPU if
    there is one. ValueError where the first two differ."""
    overridden = any(word.partition("=")[0].strip() == "device" for word in words)
    if "device" in job.model_fields_set and not (overridden and wanted not in ("auto", job.device)):
        return job
    if "device" in job.model_fields_set:
        raise ValueError(
            f"--override device={wanted} and the job's device = {job.device!r} differ: change the job's with "
            f"--set device={wanted}, or leave one out"
        )
    if wanted == "auto":
        wanted = "cpu" if on_this_machine and not _has_gpu() else "cuda"
    return job.model_copy(update={"device": wanted})


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _report_cpu_ranks(job: JobConfig, *, no_gpu: bool) -> None:
    """Print one line if there is no GPU, or if the machine has fewer cores than the job has ranks."""
    ranks, cores = job.ranks_per_node, len(os.sched_getaffinity(0))
    if ranks > cores or (no_gpu and ranks > 1):
        print(
            f"race-dist: {'this machine has no GPU: ' if no_gpu else ''}the job's {ranks} ranks run on {cores} CPU "
            f"core{'s' if cores > 1 else ''}; --set ranks_per_node=N starts N ranks",
            file=sys.stderr,
        )


def _check_gpu_count(job: JobConfig) -> None:
    """ValueError if the machine has GPUs, but fewer than the job has ranks."""
    import torch

    gpus = torch.cuda.device_count() if job.device == "cuda" else 0
    if 0 < gpus < job.ranks_per_node:
        raise ValueError(
            f"ranks_per_node is {job.ranks_per_node}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: give "
            f"--set ranks_per_node={gpus}"
        )


def expand_array(run: Run, array: Sequence[str]) -> list[Run]:
    """One run per combination of ``key=value,value,...``, named after its values; the run itself if ``array`` is empty.

    Raises:
        ValueError: an entry has no ``=`` or no values.
    """
    choices = []
    for entry in array:
        key, equals, values = entry.partition("=")
        options = [value.strip() for value in values.split(",")]
        if not equals or not key.strip() or not all(options):
            raise ValueError(f"--array {entry!r} is not of the form key=value,value,..., for example seed=0,1,2")
        choices.append([(key.strip(), value) for value in options])
    keys = [pairs[0][0] for pairs in choices]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"--array names {twice} twice; give all its values in one --array {twice}=value,value,...")
    if not choices:
        return [run]
    runs = []
    for pick in itertools.product(*choices):
        name = "-".join([run.name, *(f"{key.split('.')[-1]}-{value}" for key, value in pick)])
        changes = (*run.overrides, *(f"{key}={value}" for key, value in pick), f"name={name}")
        runs.append(replace(run, name=load_config(run.config, changes).name, overrides=changes))
    names = [entry.name for entry in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--array makes two runs of the name {twice}; give each value once")
    return runs


def local(job: JobConfig, run: Run, *, dry_run: bool) -> int:
    """Run on this machine under a supervisor. Returns its exit code."""
    if job.nodes > 1:
        raise ValueError(f"nodes is {job.nodes}, and race-dist launch local has one machine; use torchrun, slurm or kubernetes")
    environment, words = job.environment() | {"RACE_DIST_SUPERVISED": "1"}, run.arguments(job)
    if job.container is not None:
        inside = ["race-dist", *words, "--nproc", str(job.ranks_per_node)]
        return _run_launcher(job, inside, environment, dry_run=dry_run)
    if dry_run:
        launcher = [python(job), "-m", "race_dist.launch.local", str(job.ranks_per_node), *words]
        print(format_command(launcher, environment, job.references()))
        return 0
    _check_gpu_count(job)
    RunDirectory(run.folder / run.name).check_not_in_use()
    folder = run.folder / run.name / "checkpoints"
    return supervise(
        words,
        job.ranks_per_node,
        restarts=job.restarts,
        environment=environment | job.secrets(os.environ),
        python=python(job),
        progress=lambda: sorted(p.name for p in folder.glob("*-step-*")),
    )


def torchrun(
    job: JobConfig, run: Run, *, endpoint: str | None, node_rank: int | None, local_address: str | None, dry_run: bool
) -> int:
    """Run torchrun on this node; all nodes run the same command. Returns its exit code."""
    if endpoint is None and job.nodes > 1:
        raise ValueError(f"{job.nodes} nodes need a rendezvous: --endpoint HOST:PORT, the same on each of them")
    if endpoint is not None:
        _check_endpoint(endpoint)
    if node_rank is not None and node_rank >= job.nodes:
        raise ValueError(f"--node-rank is {node_rank}, but counts from 0 and nodes is {job.nodes}")
    if local_address is not None and not re.fullmatch(r"[A-Za-z0-9._:%-]+", local_address):
        raise ValueError(f"--local-address must be a host's name or address; got {local_address!r}")
    run_id = run.name if job.nodes > 1 else uuid.uuid4().hex
    command = torchrun_command(
        job,
        run.arguments(job),
        endpoint=endpoint or "localhost:0",
        run_id=run_id,
        node_rank=None if node_rank is None else str(node_rank),
        local_address=local_address,
    )
    return _run_launcher(job, command, job.environment(), dry_run=dry_run)


def _check_endpoint(endpoint: str) -> None:
    host, colon, port = endpoint.rpartition(":")
    good = colon and re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]", host) and re.fullmatch(r"[0-9]{1,5}", port)
    if not good or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--endpoint must be HOST:PORT, with a port from 1 to 65535, for example node1:29400; got {endpoint!r}"
        )


def deepspeed(job: JobConfig, run: Run, *, hostfile: Path | None, dry_run: bool) -> int:
    """Run DeepSpeed's launcher. Returns its exit code."""
    if hostfile is None and job.nodes > 1:
        raise ValueError(f"{job.nodes} nodes need --hostfile FILE with a line 'HOST slots={job.ranks_per_node}' for each")
    if hostfile is not None:
        _check_hostfile(hostfile, job)
    command = deepspeed_command(job, run.arguments(job), hostfile=hostfile)
    return _run_launcher(job, command, job.environment(), dry_run=dry_run)


def _check_hostfile(file: Path, job: JobConfig) -> None:
    """Refuse a file that DeepSpeed cannot read as a list of enough hosts."""
    if not file.is_file():
        raise FileNotFoundError(f"--hostfile: there is no file {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    hosts = [line for line in lines if line and not line.startswith("#")]
    wrong = next((line for line in hosts if not re.fullmatch(r"\S+\s+slots=[1-9][0-9]*(\s+#.*)?", line)), None)
    if wrong is not None or not hosts:
        raise ValueError(
            f"--hostfile {file} "
            + ("names no host" if wrong is None else f"has the line {short_repr(wrong)}")
            + "; it needs a line 'HOST slots=N' for each host"
        )
    if len(hosts) < job.nodes:
        raise ValueError(f"--hostfile {file} names {len(hosts)} hosts, and nodes is {job.nodes}")


def submit_slurm(
    job: JobConfig, run: Run, *, array: Sequence[str], plain: bool, write: Path | None, dry_run: bool
) -> list[str]:
    """Submit to Slurm, write the sbatch file, or with ``dry_run`` return it. Returns the lines to print."""
    runs = expand_array(run, array)
    if dry_run:
        return [render(job, entry, slurm.logs_folder(job, entry)) for entry in runs]
    if write is not None:
        if len(runs) > 1:
            raise ValueError("--write writes one job; leave out --array")
        needed = sorted({r.from_env or name for name, r in job.references().items()})
        slurm.write_script(job, run, write, what="--write")
        return [
            f"written: {write}",
            f"submit it with: {format_command(['sbatch', str(write)])}",
            *([f"it takes from the environment of sbatch: {', '.join(needed)}"] if needed else []),
        ]
    records = [slurm.submit_script(job, entry) for entry in runs] if plain else slurm.submit_submitit(job, runs)
    return [_submitted(record) for record in records]


def submit_kubernetes(job: JobConfig, run: Run, *, write: Path | None, dry_run: bool) -> list[str]:
    """Apply the manifest, write it, or with ``dry_run`` return it. Returns the lines to print."""
    text = kubernetes.to_text(kubernetes.manifest(job, run))
    if dry_run:
        return [text]
    if write is not None:
        secret = kubernetes.secret_command(job, run)
        write_private(write, text, what="--write")
        return [
            f"written: {write}",
            *([f"make its Secret with: {secret}"] if secret else []),
            f"apply it with: {format_command(['kubectl', 'apply', '-f', str(write)])}",
        ]
    return [_submitted(kubernetes.submit(job, run))]


def status(runs: Path, which: str | None) -> list[tuple[JobRecord, dict[str, str]]]:
    """The submitted jobs and their ``state``, ``reason``, ``nodes``, ``restarts`` and ``progress``."""
    jobs = []
    for record in recall(runs, which):
        facts = kubernetes.state(record) if record.scheduler == "kubernetes" else slurm.state(record)
        jobs.append((record, facts | {"progress": slurm.progress(record)}))
    return jobs


def logs(runs: Path, which: str, lines: int) -> list[str]:
    """The last log lines of the newest job of that name or id."""
    record = recall(runs, which)[-1]
    if record.scheduler == "kubernetes":
        return kubernetes.logs(record, lines).splitlines()
    files = slurm.log_files(record)
    if not files:
        raise ValueError(f"job {record.id} ({record.name}) has printed nothing yet: there is no {record.logs}")
    return list(slurm.tail(files, lines))


def cancel(runs: Path, which: str) -> list[str]:
    """Cancel all pending or running jobs of that name or id. Returns one line per job."""
    lines = []
    for record in recall(runs, which):
        scheduler = kubernetes if record.scheduler == "kubernetes" else slurm
        if scheduler.state(record)["state"] in ("PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "COMPLETING", "CONFIGURING"):
            scheduler.cancel(record)
            lines.append(f"cancelled: {record.id} ({record.name})")
    return lines or [f"nothing to cancel: no job of {which} is waiting or running"]


def _submitted(record: JobRecord) -> str:
    return f"submitted: {record.id} ({record.name}); race-dist launch status {record.name} --runs {Path(record.run).parent}"


def _run_launcher(job: JobConfig, command: Sequence[str], environment: dict[str, str], *, dry_run: bool) -> int:
    """Run a launcher's command, in the job's container if it has one; secrets are only in its environment."""
    references = job.references()
    command = in_container(job, command, [*environment, *references], working_folder())
    if dry_run:
        print(format_command(command, environment, references))
        return 0
    try:
        return subprocess.run(
            command, env={**without_rank_variables(os.environ), **environment, **job.secrets(os.environ)}, check=False
        ).returncode
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not found on this machine") from None
