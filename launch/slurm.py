"""Jobs in Slurm: submission through submitit or as a plain sbatch file, state, logs and cancellation."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from race_dist.exit_codes import STOPPED, USER_ERROR
from race_dist.launch.command import Run, format_command, in_container, python, rank_command, srun_container, working_folder
from race_dist.launch.environment import one_line
from race_dist.launch.job import JobConfig
from race_dist.launch.job_store import JobRecord, job_folder, remember
from race_dist.launch.rank_env import rank_variables
from race_dist.launch.sbatch import directives, preflight_words, render
from race_dist.output_paths import write_private
from race_dist.rank_environment import without_rank_variables

_ENDED = "ENDED"


def slurm(command: Sequence[str], secrets: Mapping[str, str] | None = None) -> str:
    """Run a Slurm command and return its standard output.

    Args:
        command: the command and its arguments.
        secrets: added to its environment, which sbatch passes on to the job.

    Raises:
        OSError: it is not installed, or it failed; the message contains its output.
    """
    if shutil.which(command[0]) is None:
        raise OSError(
            f"{command[0]} is not found: race-dist launch slurm is for a machine that submits to Slurm "
            "(--dry-run works anywhere)"
        )
    done = subprocess.run(command, env={**os.environ, **(secrets or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{format_command(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def write_script(job: JobConfig, run: Run, file: Path, *, what: str = "the job's script") -> Path:
    """Write the sbatch file of a job, readable only by its user."""
    logs = logs_folder(job, run)
    text = render(job, run, logs)
    logs.mkdir(parents=True, exist_ok=True)
    return write_private(file, text, executable=True, what=what)


def logs_folder(job: JobConfig, run: Run) -> Path:
    """The folder of the job's logs."""
    return (Path(job.logs) if job.logs is not None else job_folder(run.folder, run.name)).absolute()


def submit_script(job: JobConfig, run: Run) -> JobRecord:
    """Submit as a plain sbatch file, which is kept in the job's folder."""
    file = write_script(job, run, job_folder(run.folder, run.name) / "job.sbatch")
    secrets = job.secrets(os.environ)
    job_id = slurm(["sbatch", "--parsable", str(file)], secrets).strip().split(";")[0]
    return remember(run.folder, job_id=job_id, name=run.name, scheduler="slurm", logs=f"{logs_folder(job, run)}/{job_id}.log")


class RankTask:
    """The task that submitit runs for every rank: a child process, and the requeue of the job.

    submitit would handle the signal itself, on rank 0 only and inside the handler, where a collective save is impossible. Here
    the ranks get the signal, save together and exit; the task of rank 0 then requeues the job. After a failure the first task
    that notices it does. SIGTERM comes from Slurm, which ends the job and decides itself whether to requeue it.

    Args:
        commands: run one after the other as one rank: preflight if the job has it, then training.
        environment: further variables.
        references: names of variables, and of those of the job's environment that contain their values. Secrets are not here.
        folder: working folder.
        records: the job's folder, where failures are counted.
        checkpoints: the run's folder of checkpoints.
        restarts: number of consecutive failures without a new checkpoint after which to give up.
        requeues: how often the job is requeued in total.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        folder: str,
        *,
        records: str,
        checkpoints: str,
        restarts: int,
        requeues: int,
        references: Mapping[str, str] | None = None,
    ) -> None:
        self.commands, self.environment, self.folder = [list(c) for c in commands], dict(environment), folder
        self.references = dict(references or {})
        self.records, self.checkpoints, self.restarts, self.requeues = records, checkpoints, restarts, requeues
        self.received: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the rank. Returns its exit code if the job is finished, raises if it failed."""
        self.received, self.process = [], None  # a queued job may have been stored by another version
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._forward)
        missing = [source for source in self.references.values() if source not in os.environ]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} is not in the job's environment: let sbatch pass it on (--export=ALL)")
        environment = {
            **without_rank_variables(os.environ),
            **self.environment,
            "RACE_DIST_CHILD": "1",
            **{name: os.environ[source] for name, source in self.references.items()},
        }
        environment |= rank_variables(environment)
        code, rank = 0, environment.get("RANK", "0")
        for command in self.commands:
            self.process = subprocess.Popen(command, env=environment, cwd=self.folder)
            code = self.process.wait()
            if code:
                break
        training = command is self.commands[-1]  # a failed preflight is not repeated on the same nodes
        if training and signal.SIGTERM not in self.received:
            if code == STOPPED or (code and self.received):
                self._requeue(ask=rank == "0")
            elif code not in (0, USER_ERROR) and self._count_failure():
                self._requeue(ask=True)
        if code not in (0, STOPPED):
            raise RuntimeError(f"rank {rank} ended with code {code}")
        return code

    def _forward(self, number: int, _: object) -> None:
        self.received.append(number)
        if self.process is not None:
            self.process.send_signal(number)

    def _count_failure(self) -> bool:
        """Count a failure, once for all tasks. False if too many failures had no new checkpoint between them."""
        start = f"{_own_job_id()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        failures_file = Path(self.records) / "failures.jsonl"
        newest = max((p.name for p in Path(self.checkpoints).glob("*-step-*")), default="")
        with failures_file.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            failures = [json.loads(line) for line in file]
            if not any(f["start"] == start for f in failures):
                failures.append({"start": start, "newest": newest})
                file.write(json.dumps(failures[-1]) + "\n")
        repeated = sum(1 for f in failures if f["newest"] == newest)
        if repeated > self.restarts:
            print(f"{repeated} failures without a new checkpoint; giving up", file=sys.stderr)
        return repeated <= self.restarts

    def _requeue(self, *, ask: bool) -> None:
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= self.requeues:
            print(f"requeued {self.requeues} times already; giving up", file=sys.stderr)
            return
        if ask:
            with contextlib.suppress(OSError):  # another task was first
                slurm(["scontrol", "requeue", _own_job_id()])
        time.sleep(60)  # Slurm ends this task


def _own_job_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def submit_submitit(job: JobConfig, runs: Sequence[Run]) -> list[JobRecord]:
    """Submit through submitit; several runs become one job array."""
    try:
        import submitit
    except ImportError:
        raise ImportError(
            "race-dist launch slurm submits through submitit, which is not installed: pip install "
            "'race-dist[slurm]', or give --plain for a plain sbatch file"
        ) from None
    first = runs[0]
    logs = Path(one_line(str(logs_folder(job, first)), "logs"))
    if any(c in str(logs) for c in "%\\"):
        raise ValueError(
            f"submitit lets Slurm fill in % and backslashes in the folder of the job's logs, {logs}: give logs = "
            "another folder, or --plain"
        )
    secrets = job.secrets(os.environ)
    logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(folder=str(logs / "%j"), max_num_timeout=job.requeues, python=_submitit_python(job))
    executor.update_parameters(**submitit_parameters(job, first.name, logs))
    environment = job.environment()
    tasks = [_task(job, run, environment) for run in runs]
    with _in_environment(secrets):  # of sbatch
        if len(tasks) == 1:
            jobs = [executor.submit(tasks[0])]
        else:
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
    for path in logs.rglob("*"):  # submitit's files contain the commands
        if path.suffix in (".pkl", ".sh") and path.is_file():
            path.chmod(0o600)
    return [
        remember(run.folder, job_id=j.job_id, name=run.name, scheduler="slurm", logs=f"{logs}/{j.job_id}/{j.job_id}_*_log.*")
        for run, j in zip(runs, jobs, strict=True)
    ]


def _task(job: JobConfig, run: Run, environment: Mapping[str, str]) -> RankTask:
    words = [*([preflight_words(run, job)] if job.preflight else []), run.arguments(job)]
    references = {name: r.from_env or name for name, r in job.references().items()}
    folder, names = working_folder(), [*environment, *references]
    commands = [in_container(job, rank_command(job, w), names, folder) for w in words]
    records = job_folder(run.folder, run.name)
    records.mkdir(parents=True, exist_ok=True)
    return RankTask(
        commands,
        environment,
        str(folder),
        records=str(records),
        restarts=job.restarts,
        requeues=job.requeues,
        checkpoints=str(run.folder / run.name / "checkpoints"),
        references=references,
    )


@contextlib.contextmanager
def _in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment while the block runs, for programs that it starts."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def submitit_parameters(job: JobConfig, name: str, logs: Path) -> dict[str, Any]:
    """The job's description as parameters of submitit; options without a parameter are passed as further directives."""
    taken = ("--job-name", "--nodes", "--ntasks-per-node", "--time", "--open-mode", "--output")
    extra: dict[str, Any] = {}
    for directive in directives(job, name, logs):
        key, equals, value = directive.partition("=")
        if key not in taken:
            extra[key.removeprefix("--")] = value if equals else True
    srun = ["--kill-on-bad-exit=1", "--distribution=block", *srun_container(job, working_folder()), *job.slurm.srun]
    setup = [] if job.cpus_per_rank is None else [f"export SRUN_CPUS_PER_TASK={job.cpus_per_rank}"]
    return {
        "job_name": job.name or name,
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks_per_node,
        "time": -(-job.time // 60),
        "additional_parameters": extra,
        "srun_args": srun,
        "setup": setup,
        "stderr_to_stdout": True,
    }


def _submitit_python(job: JobConfig) -> str | None:
    """The interpreter of submitit's tasks. None is this one, which also starts containers that are not options of srun."""
    wanted = job.venv is not None or srun_container(job, working_folder())
    return shlex.quote(python(job)) if wanted else None  # submitit inserts it into its script unquoted


def state(record: JobRecord) -> dict[str, str]:
    """A job's ``state`` as Slurm names it (``ENDED`` if Slurm has no record of it), ``reason``, ``nodes`` and ``restarts``."""
    for read in (_from_scontrol, _from_sacct):
        facts = read(record.id)
        if facts is not None:
            return facts
    return {"state": _ENDED, "reason": "Slurm does not know this job any more", "nodes": "", "restarts": ""}


def _from_scontrol(job_id: str) -> dict[str, str] | None:
    try:
        text = slurm(["scontrol", "show", "job", "--oneliner", job_id])
    except OSError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    facts = dict(part.split("=", 1) for part in text.split() if "=" in part)
    return {
        "state": facts.get("JobState", ""),
        "reason": "" if facts.get("Reason") == "None" else facts.get("Reason", ""),
        "nodes": "" if facts.get("NodeList") == "(null)" else facts.get("NodeList", ""),
        "restarts": facts.get("Restarts", ""),
    }


def _from_sacct(job_id: str) -> dict[str, str] | None:
    try:
        text = slurm(["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,Reason,NodeList"])
    except OSError:  # there is no accounting database
        return None
    for line in text.splitlines():
        state, reason, nodes = (*line.split("|"), "", "")[:3]
        return {"state": state.split()[0], "reason": reason, "nodes": nodes, "restarts": ""}
    return None


def cancel(record: JobRecord) -> None:
    """Cancel the job: its ranks get SIGTERM and save, then Slurm ends them. It is not requeued."""
    slurm(["scancel", record.id])


def log_files(record: JobRecord) -> list[Path]:
    """The job's log files, sorted. Only the last component of the record's path is a pattern; the folder is literal."""
    folder, pattern = os.path.split(record.logs)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    return [Path(folder, name) for name in names if fnmatch.fnmatchcase(name, pattern) and not name.endswith((".pkl", ".sh"))]


def tail(files: Sequence[Path], lines: int) -> Iterator[str]:
    """The last lines of each file, under its name if there are several files."""
    for file in files:
        if len(files) > 1:
            yield f"==> {file} <=="
        yield from file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]


def progress(record: JobRecord) -> str:
    """The latest step of the run, from its metrics."""
    try:
        with (Path(record.run) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            steps = [line for line in file.read().split(b"\n") if line.endswith(b"}")]
        return f"step {json.loads(steps[-1])['step']}"
    except (OSError, IndexError, KeyError, ValueError):
        return ""
