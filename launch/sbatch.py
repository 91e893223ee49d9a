"""A job as a plain sbatch file, which users can read and edit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from race_dist.exit_codes import STOPPED, USER_ERROR
from race_dist.launch.command import Run, in_container, rank_command, srun_container, working_folder
from race_dist.launch.environment import one_line
from race_dist.launch.job import JobConfig, slurm_time
from race_dist.launch.job_store import job_folder

_BODY = """\
# Variables of another job's ranks, inherited from the shell.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
{environment}

# Failed ranks are restarted in place, up to {restarts} times without a new checkpoint; then the job is requeued if there was a
# checkpoint. A run that was asked to stop (SIGUSR1, SIGUSR2 or SIGTERM to the ranks) saves and exits with {stopped}: the job is
# requeued. SIGTERM to this script comes from Slurm, which ends the job and decides whether to requeue it.
ended=0
export RACE_DIST_STOP_FILE={stop_file}-$SLURM_JOB_ID
rm -f "$RACE_DIST_STOP_FILE"
trap 'ended=1' TERM

run_ranks() {{
    srun --kill-on-bad-exit=1 --distribution=block{srun} \\
        "$@" &
    local pid=$! code
    while true; do
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break  # a signal interrupts wait before srun has ended
    done
    return "$code"
}}

requeue() {{
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {requeues} ]; then
        echo "requeued {requeues} times already; giving up with code $1" >&2
        exit "$1"
    fi
    rm -f "$RACE_DIST_STOP_FILE"
    echo "code $1: requeueing the job" >&2
    scontrol requeue "$SLURM_JOB_ID" || exit "$1"
    sleep 60  # Slurm ends this script
}}

newest() {{
    find {checkpoints} -maxdepth 1 -name '*-step-*' 2>/dev/null | sort | tail -n 1
}}
{preflight}
failures=0
first=$(newest)
seen=$first
while true; do
    run_ranks {command}
    code=$?
    if [ "$code" -eq 0 ] || [ "$code" -eq {user_error} ] || [ "$ended" -eq 1 ]; then
        exit "$code"
    fi
    # Slurm ends the other ranks when the first one exits, so a run that was asked to stop may end with another code
    [ -e "$RACE_DIST_STOP_FILE" ] && code={stopped}
    if [ "$code" -eq {stopped} ] || [ "$failures" -ge {restarts} ]; then
        break
    fi
    now=$(newest)
    [ "$now" = "$seen" ] || failures=0
    seen=$now
    failures=$((failures + 1))
    echo "ranks failed with code $code; starting them again in place ($failures of {restarts})" >&2
done
if [ "$code" -ne {stopped} ] && [ "$(newest)" = "$first" ]; then
    echo "no new checkpoint since the job began; giving up with code $code" >&2
    exit "$code"
fi
requeue "$code"
"""


def directives(job: JobConfig, name: str, logs: Path) -> Iterator[str]:
    """The options of sbatch, without ``#SBATCH``."""
    s = job.slurm
    yield f"--job-name={job.name or name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.ranks_per_node}"
    if job.cpus_per_rank is not None:
        yield f"--cpus-per-task={job.cpus_per_rank}"
    if job.device == "cuda" and s.gpu_request != "none":
        amount = 1 if s.gpu_request == "gpus-per-task" else job.ranks_per_node
        yield f"--gres=gpu:{amount}" if s.gpu_request == "gres" else f"--{s.gpu_request}={amount}"
    if job.memory is not None:
        yield f"--mem={job.memory}"
    if s.exclusive:
        yield "--exclusive"
    yield f"--time={slurm_time(job.time)}"
    yield f"--signal={s.signal}@{job.stop_before}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={slurm_pattern(logs)}/%j.log"
    for key in ("partition", "account", "qos", "constraint", "reservation"):
        value = getattr(s, key)
        if value is not None:
            yield f"--{key}={value}"
    for key, value in s.directives.items():
        yield f"--{key}={value}" if value else f"--{key}"


def slurm_pattern(path: Path) -> str:
    """Escape a path so that Slurm replaces nothing in it.

    Raises:
        ValueError: it contains a backslash, which makes Slurm replace nothing at all, not even the job's number.
    """
    if "\\" in str(path):
        raise ValueError(
            "Slurm takes a backslash in the path of a log as an escape, and the folder of the job's logs is "
            f"{path}: give logs = another folder"
        )
    return str(path).replace("%", "%%")


def render(job: JobConfig, run: Run, logs: Path) -> str:
    """The text of the file. Values from the user are quoted for the shell and checked to be one line; it contains no secrets.

    Raises:
        ValueError: the name of the current folder or of the log folder has control characters.
    """
    one_line(str(logs), "logs")
    environment, references, folder = job.environment(), job.references(), working_folder()
    # since Slurm 22.05 srun does not inherit --cpus-per-task
    exports = environment | ({"SRUN_CPUS_PER_TASK": str(job.cpus_per_rank)} if job.cpus_per_rank is not None else {})
    names = [*environment, *references]
    command = in_container(job, rank_command(job, run.arguments(job)), names, folder)
    check = in_container(job, rank_command(job, preflight_words(run, job)), names, folder)
    lines = [f"#SBATCH {_directive(d)}" for d in directives(job, run.name, logs)]
    body = _BODY.format(
        stop_file=shlex.quote(str(job_folder(run.folder, run.name) / "stop")),
        checkpoints=shlex.quote(str(run.folder / run.name / "checkpoints")),
        restarts=job.restarts,
        requeues=job.requeues,
        stopped=STOPPED,
        user_error=USER_ERROR,
        environment="\n".join(
            [
                *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
                *(_export_reference(name, r.from_env or name) for name, r in references.items()),
            ]
        ),
        srun="".join(f" \\\n        {shlex.quote(o)}" for o in [*srun_container(job, folder), *job.slurm.srun]),
        preflight=_PREFLIGHT.format(command=_shell(check), stopped=STOPPED) if job.preflight else "",
        command=_shell(command),
    )
    head = f"#!/bin/bash\n# {run.name}: {job.ranks} ranks on {job.nodes} nodes, written by race-dist launch slurm\n"
    return head + "\n".join(lines) + "\n\nset -uo pipefail\n\n" + body


def preflight_words(run: Run, job: JobConfig) -> list[str]:
    """Arguments of ``race-dist preflight`` for this run, with a JSON report in the job's folder."""
    words = [
        "preflight",
        str(run.config),
        "--device",
        job.device,
        "--json",
        str(job_folder(run.folder, run.name) / "preflight.json"),
    ]
    for change in run.overrides:
        words += ["--override", change]
    return words


_PREFLIGHT = """
if ! run_ranks {command}; then
    [ -e "$RACE_DIST_STOP_FILE" ] && requeue {stopped}
    echo "preflight refused these nodes; the job is not started on them" >&2
    exit 1
fi
"""


def _shell(command: Sequence[str]) -> str:
    return shlex.join(command)


def _directive(text: str) -> str:
    key, equals, value = one_line(text, "a directive of sbatch").partition("=")
    return f"{key}={shlex.quote(value)}" if equals else text


def _export_reference(name: str, source: str) -> str:
    """Export a variable from the environment of sbatch, which is where secrets stay."""
    return (
        f'export {name}="${{{source}:?is not in the job environment; set it where sbatch is called, '
        'and let sbatch pass it on (--export=ALL)}"'
    )
