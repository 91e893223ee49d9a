"""Submitted jobs are found again, and repeated failures are counted once a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from race_dist.launch import slurm
from race_dist.launch.job_store import job_folder, recall, remember
from race_dist.launch.slurm import RankTask


def test_jobs_are_found_by_name_id_and_array(tmp_path: Path) -> None:
    for job_id, name in (("7", "a"), ("9_0", "b-0"), ("9_1", "b-1")):
        remember(tmp_path, job_id=job_id, name=name, scheduler="slurm", logs=f"{tmp_path}/{job_id}.log")
    (job_folder(tmp_path, "a") / "preflight.json").write_text("{}")  # lies there too and is no record
    assert [r.id for r in recall(tmp_path)] == ["7", "9_0", "9_1"]
    assert [r.id for r in recall(tmp_path, "9")] == ["9_0", "9_1"]
    assert [r.name for r in recall(tmp_path, "b-1")] == ["b-1"]
    with pytest.raises(ValueError, match=r"no job 'c' was submitted.*known are a, b-0, b-1"):
        recall(tmp_path, "c")
    (job_folder(tmp_path, "a") / "job-8.json").write_text("[")
    with pytest.raises(ValueError, match=r"job-8\.json is not the record of a job"):
        recall(tmp_path)


def test_failures_count_once_per_start_and_from_zero_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = RankTask([["x"]], {}, str(tmp_path), records=str(tmp_path), checkpoints=str(tmp_path / "c"), restarts=1, requeues=9)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert task._count_failure()
    assert task._count_failure()  # another task of the same start
    (tmp_path / "c" / "000001-step-00000010").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert task._count_failure()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not task._count_failure()


def test_commands_report_a_missing_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match=r"sbatch is not found: .*--dry-run works anywhere"):
        slurm.slurm(["sbatch", "x"])


def test_the_newest_step_of_a_run_is_its_progress(tmp_path: Path) -> None:
    record = remember(tmp_path, job_id="1", name="a", scheduler="slurm", logs="")
    assert slurm.progress(record) == ""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n{"kind": "train", "step": 4}\n{"kind": "tr')
    assert slurm.progress(record) == "step 4"


@pytest.mark.parametrize("content", ["[]", "5", "{", "", "{}", '{"id": 5}', "\0" * 9])
def test_an_invalid_record_is_named(content: str, tmp_path: Path) -> None:
    remember(tmp_path, job_id="1", name="a", scheduler="slurm", logs="")
    (file,) = tmp_path.rglob("job-1.json")
    file.write_text(content)
    with pytest.raises(ValueError, match=r"job-1\.json is not the record of a job: "):
        recall(tmp_path)
    tree = {"id": 5, "name": "a", "scheduler": "slurm", "submitted": "", "logs": "", "run": ""}
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="id is an integer, not a string"):
        recall(tmp_path)
