"""The store of submitted jobs: one JSON file per job, in the folder of the runs."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from race_dist.files import read_json_object
from race_dist.output_paths import write_private

FOLDER = ".jobs"


@dataclass(frozen=True)
class JobRecord:
    """One submitted job.

    Attributes:
        id: the scheduler's: ``"123"``, ``"123_0"`` of an array, ``"namespace/name"`` in Kubernetes.
        name: name of the run.
        scheduler: ``"slurm"`` or ``"kubernetes"``.
        submitted: time of submission, ISO 8601.
        logs: path of its log files; the last component is a pattern, the folder is literal.
        run: the run's folder.
    """

    id: str
    name: str
    scheduler: str
    submitted: str
    logs: str
    run: str


def job_folder(runs: Path, name: str) -> Path:
    """The folder for the scripts, logs and records of a run's jobs."""
    return runs / FOLDER / name


def remember(runs: Path, *, job_id: str, name: str, scheduler: str, logs: str) -> JobRecord:
    """Store the record of a submitted job."""
    record = JobRecord(
        job_id, name, scheduler, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), logs, str(runs / name)
    )
    folder = job_folder(runs, name)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"job-{job_id.replace('/', '.')}.json"
    write_private(file, json.dumps(asdict(record), indent=1) + "\n")
    return record


def recall(runs: Path, which: str | None = None) -> list[JobRecord]:
    """The records of submitted jobs, oldest first; with ``which`` those of that name, id or array.

    Raises:
        ValueError: no job matches, or a record cannot be read.
    """
    records = sorted(_read(runs), key=lambda r: (r.submitted, r.id))
    if which is None:
        return records
    matches = [r for r in records if which in (r.id, r.name, r.id.split("_")[0])]
    if not matches:
        known = ", ".join(sorted({r.name for r in records})) or "none"
        raise ValueError(
            f"no job {which!r} was submitted with its runs in {runs}; known are {known} (--runs names another folder)"
        )
    return matches


def _read(runs: Path) -> Iterator[JobRecord]:
    for file in sorted((runs / FOLDER).glob("*/job-*.json")):
        try:
            yield JobRecord(**read_json_object(file, {entry.name: str for entry in fields(JobRecord)}))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{file} is not the record of a job: {error}") from None
