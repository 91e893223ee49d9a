"""Jobs on a real Slurm that the tests start: submitted, interrupted and requeued, with the results of an uninterrupted run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Slurm
from training_job import RACE_DIST, TrainingJob, wait_for

from race_dist.launch.command import Run
from race_dist.launch.job import load_job, template_names
from race_dist.launch.sbatch import render

REASON = slurm_cluster.missing()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(400)]

STEPS = 150
JOB = ["ranks_per_node=2", "device=cpu", "slurm.exclusive=false", "slurm.gpu_request=none"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A run without interruptions."""
    job = TrainingJob(tmp_path_factory.mktemp("uninterrupted"), "run", steps=STEPS)
    done = subprocess.run([*RACE_DIST, "train", str(job.config), "--nproc", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return job


def race_dist(slurm: Slurm, job: TrainingJob, *words: str) -> str:
    done = subprocess.run(
        [*RACE_DIST, *words], env=slurm.environment, cwd=job.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Slurm, job: TrainingJob, *words: str, changes: tuple[str, ...] = ()) -> str:
    """Submit the job and return its id."""
    settings = [w for change in [*JOB, *changes] for w in ("--set", change)]
    printed = race_dist(slurm, job, "launch", "slurm", str(job.config), *settings, *words)
    return str(re.search(r"submitted: (\S+)", printed)[1])  # type: ignore[index]


def output(slurm: Slurm, job: TrainingJob, job_id: str) -> str:
    return race_dist(slurm, job, "launch", "logs", job_id, "--runs", str(job.runs), "-n", "400")


def same(job: TrainingJob, uninterrupted: TrainingJob) -> None:
    assert job.losses() == uninterrupted.losses()
    assert job.weights() == uninterrupted.weights()


@pytest.mark.parametrize("way", ["--plain", "submitit"])
def test_interrupted_jobs_have_the_results_of_uninterrupted_ones(
    slurm: Slurm, uninterrupted: TrainingJob, tmp_path: Path, way: str
) -> None:
    """A signal to the ranks saves and requeues; a requeue by the operator kills; both resume to the same results."""
    job = TrainingJob(tmp_path, "run", steps=STEPS)
    job_id = submit(slurm, job, *([way] if way == "--plain" else []))
    wait_for(lambda: job.step() >= 5, f"training begins\n{slurm.job(job_id)}")
    slurm.run("scancel", "--signal=USR1", job_id)  # as a preempting scheduler warns
    wait_for(lambda: slurm.job(job_id)["Restarts"] == "1", "the job is requeued")
    step = job.step()
    assert job.saved_step() == step < STEPS
    wait_for(lambda: slurm.job(job_id)["JobState"] == "RUNNING" and job.step() > step, "it goes on")
    slurm.run("scontrol", "requeue", job_id)  # no warning: ranks are killed
    wait_for(lambda: slurm.job(job_id)["Restarts"] == "2", "the job is requeued again")
    slurm.wait(job_id, "COMPLETED", timeout=180)
    same(job, uninterrupted)
    text = output(slurm, job, job_id)
    assert f"saved after step {step}" in text
    assert f"resuming {job.run} after step {step}" in text
    status = race_dist(slurm, job, "launch", "status", "run", "--runs", str(job.runs))
    assert re.search(rf"{job_id} +run +COMPLETED +step {STEPS}, .*2 requeues", status), status


@pytest.mark.slow
def test_a_job_saves_and_is_requeued_at_its_time_limit(slurm: Slurm, uninterrupted: TrainingJob, tmp_path: Path) -> None:
    """Slurm's shortest limit is one minute: a longer run is requeued until it is finished."""
    job = TrainingJob(tmp_path, "run", steps=20000)
    job_id = submit(slurm, job, "--plain", changes=("time=1m", "stop_before=25s"))
    wait_for(lambda: slurm.job(job_id)["Restarts"] == "1", "its time is up", 120)
    step = job.step()
    assert job.saved_step() == step
    wait_for(lambda: job.step() > step, "it goes on")
    assert "saved after step" in output(slurm, job, job_id)
    race_dist(slurm, job, "launch", "cancel", "run", "--runs", str(job.runs))
    slurm.wait(job_id, "CANCELLED")


@pytest.mark.parametrize("way", ["--plain", pytest.param("submitit", marks=pytest.mark.slow)])
def test_a_cancelled_job_saves_and_is_not_requeued(slurm: Slurm, tmp_path: Path, way: str) -> None:
    job = TrainingJob(tmp_path, "run", steps=20000)
    job_id = submit(slurm, job, *([way] if way == "--plain" else []))
    wait_for(lambda: job.step() >= 5, "training begins")
    assert "cancelled" in race_dist(slurm, job, "launch", "cancel", "run", "--runs", str(job.runs))
    slurm.wait(job_id, "CANCELLED")
    wait_for(lambda: not job.processes(), "the ranks end", 60)
    assert job.saved_step() == job.step() < 20000
    assert slurm.job(job_id)["JobState"] == "CANCELLED"
    assert slurm.job(job_id)["Restarts"] == "0"
    status = race_dist(slurm, job, "launch", "status", job_id, "--runs", str(job.runs))
    assert "CANCELLED" in status
    assert "nothing to cancel" in race_dist(slurm, job, "launch", "cancel", job_id, "--runs", str(job.runs))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--plain", "submitit"])
def test_a_killed_rank_is_restarted(slurm: Slurm, uninterrupted: TrainingJob, tmp_path: Path, way: str) -> None:
    """The plain file restarts in place, submitit requeues; preflight has checked the machine before."""
    job = TrainingJob(tmp_path, "run", steps=STEPS)
    job_id = submit(slurm, job, *([way] if way == "--plain" else []), changes=("preflight=true",))
    wait_for(lambda: job.saved() and len(job.ranks()) == 2, "a checkpoint")
    os.kill(job.ranks()[0], 9)
    slurm.wait(job_id, "COMPLETED", timeout=180)
    same(job, uninterrupted)
    printed = output(slurm, job, job_id)
    assert "fit: 2 ranks on" in printed
    if way == "--plain":
        assert slurm.job(job_id)["Restarts"] == "0"
        assert "starting them again in place (1 of 3)" in printed
    else:
        assert slurm.job(job_id)["Restarts"] == "1"
    assert (job.runs / ".jobs" / "run" / "preflight.json").is_file()


def test_a_user_error_ends_the_job_without_a_restart(slurm: Slurm, tmp_path: Path) -> None:
    job = TrainingJob(tmp_path, "run", steps=STEPS)
    job_id = submit(slurm, job, "--plain", "-o", f"data.path={tmp_path / 'nothing'}")
    slurm.wait(job_id, "FAILED")
    assert slurm.job(job_id)["Restarts"] == "0"
    assert "there is no file or folder" in output(slurm, job, job_id)


@pytest.mark.slow
def test_an_array_is_one_run_per_value(slurm: Slurm, tmp_path: Path) -> None:
    job = TrainingJob(tmp_path, "run", steps=6)
    printed = race_dist(
        slurm,
        job,
        "launch",
        "slurm",
        str(job.config),
        "--array",
        "seed=3,4",
        *(w for change in ["ranks_per_node=1", *JOB[1:]] for w in ("--set", change)),
    )
    ids = re.findall(r"submitted: (\d+_\d+) \((\S+)\)", printed)
    assert [name for _, name in ids] == ["run-seed-3", "run-seed-4"]
    for job_id, name in ids:
        slurm.wait(job_id, "COMPLETED")
        assert (job.runs / name / "model.safetensors").is_file()
    losses = {TrainingJob(tmp_path, name, steps=6).losses()[6] for _, name in ids}
    assert len(losses) == 2


TEMPLATES = [name for name in template_names() if name not in ("kubernetes", "single-node")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_passes_shellcheck_and_the_real_sbatch(slurm: Slurm, tmp_path: Path, name: str) -> None:
    job = load_job(name, ["nodes=4", "slurm.partition=far"])
    script = tmp_path / "job.sbatch"
    script.write_text(render(job, Run(tmp_path / "a b.toml", "run", tmp_path, ("data.path=it's here; rm -rf x",)), tmp_path))
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    planned = subprocess.run(
        ["sbatch", "--test-only", str(script)], env=slurm.environment, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"to start at .* on nodes far\[", planned.stderr), planned.stderr


def test_the_check_of_templates_can_fail(slurm: Slurm, tmp_path: Path) -> None:
    too_much = load_job("dgx-h100", ["nodes=4", "ranks_per_node=9", "slurm.partition=far"])
    script = tmp_path / "job.sbatch"
    script.write_text(render(too_much, Run(tmp_path / "x.toml", "run", tmp_path), tmp_path))
    planned = subprocess.run(
        ["sbatch", "--test-only", str(script)], env=slurm.environment, capture_output=True, text=True, check=False
    )
    assert planned.returncode != 0
    assert "not available" in planned.stderr
