"""The description of a job: what it takes, what it refuses, and what each template makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from race_dist.launch.job import JobConfig, load_job, parse_time, slurm_time, template_names


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("24h", 86400),
        ("7d", 604800),
        ("45s", 45),
        ("30", 1800),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("1-00:00:00", 86400),
        ("2-03:30", 2 * 86400 + 3 * 3600 + 30 * 60),
        (60, 3600),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: object, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "0", "1h30m", "1:5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a time must"):
        parse_time(text)


@pytest.mark.parametrize(("seconds", "text"), [(60, "0-00:01:00"), (61, "0-00:02:00"), (90061, "1-01:02:00")])
def test_a_time_limit_is_never_shorter_than_asked_for(seconds: int, text: str) -> None:
    assert slurm_time(seconds) == text
    assert seconds <= parse_time(text) < seconds + 60


@pytest.mark.parametrize("name", template_names())
def test_every_template_is_complete_and_says_how_far_it_was_tested(name: str) -> None:
    job = load_job(name)
    assert job.tested
    assert job.environment()
    assert job.ranks == job.nodes * job.ranks_per_node


def test_gh200_templates_have_one_rank_per_superchip_and_local_caches() -> None:
    for name in ("alps", "isambard-ai", "jupiter"):
        job = load_job(name)
        assert (job.ranks_per_node, job.cpus_per_rank, job.numa) == (4, 72, True)
        assert job.environment()["RACE_DIST_CACHE"].startswith(("/tmp", "/dev/shm"))
    assert load_job("jupiter").tested.startswith("untested")


def test_a_jobs_variables_override_those_of_its_fabric_profile() -> None:
    alps, isambard = load_job("alps").environment(), load_job("isambard-ai").environment()
    assert (alps["FI_CXI_DEFAULT_TX_SIZE"], isambard["FI_CXI_DEFAULT_TX_SIZE"]) == ("32768", "2048")
    assert (alps["FI_CXI_RX_MATCH_MODE"], isambard["FI_CXI_RX_MATCH_MODE"]) == ("software", "hybrid")
    assert "NCCL_SOCKET_IFNAME" not in alps
    changed = load_job("alps", ["env.NCCL_CROSS_NIC=2", "env.MINE=a b"]).environment()
    assert (changed["NCCL_CROSS_NIC"], changed["MINE"]) == ("2", "a b")


def test_a_file_and_changes_make_a_job(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('nodes = 3\ntime = "2h"\n[slurm]\naccount = "abc"\n')
    job = load_job(file, ["ranks_per_node=2", "slurm.partition=gpu", 'container.image="a/b:c"', "mounts=['/a:/b:ro']"])
    assert (job.ranks, job.time, job.slurm.account, job.slurm.partition) == (6, 7200, "abc", "gpu")
    assert job.container is not None
    assert job.mounts == ("/a:/b:ro",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["node=2"], "unknown key node; did you mean nodes"),
        (["slurm.acount=x"], "unknown key slurm.acount; did you mean slurm.account"),
        (["nodes=0"], "nodes must be at least 1; got 0"),
        (["time=later"], "a time must look like"),
        (["time=2m"], "leaves nothing of the time limit"),
        (["fabric=token-ring"], "fabric 'token-ring' is not known; known are none, "),
        (["env.a-b=1"], "a-b"),
        (['env.A="x\\ny"'], "control characters"),
        (['slurm.partition="a b"'], "slurm.partition"),
        (['slurm.directives.comment="a\\n#SBATCH --account=other"'], "control characters"),
        (["mounts=['/a:/b']"], "mounts are for a container"),
        (["mounts=['a:b']", "container.image=x"], "a mount must be"),
        (["venv=/v", "container.image=x"], "one of them"),
        (["nodes"], "not of the form key=value"),
        (["nodes.x=1", "nodes.x.y=2"], "is a value, not a table"),
    ],
)
def test_invalid_keys_and_values_are_named(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_job(None, changes)


def test_an_unknown_template_is_answered_with_a_similar_one() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean alps"):
        load_job("alp")


def test_the_defaults_are_a_job() -> None:
    assert load_job(None) == JobConfig()
