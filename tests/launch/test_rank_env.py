"""A rank finds its place under every launcher, its cores, its caches; and the ranks' words reach it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from race_dist.launch.rank import take_local_rank
from race_dist.launch.rank_env import expand_hostlist, host_of_rank, numa_cores, rank_variables, split_cores, use_local_caches

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "nid[008-009]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("vm", ["vm"]),
        ("nid[001-003,007]", ["nid001", "nid002", "nid003", "nid007"]),
        ("a1,b[2-3]", ["a1", "b2", "b3"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("gpu-[9-11].x", ["gpu-9.x", "gpu-10.x", "gpu-11.x"]),
    ],
)
def test_host_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


def test_srun_variables_become_rank_variables() -> None:
    found = rank_variables(SLURM)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "nid008",
        "MASTER_PORT": str(20000 + 123456 % 8192),
    }
    assert rank_variables(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) == {}


def test_steps_of_one_allocation_use_different_ports() -> None:
    ports = {
        rank_variables(SLURM | {"SLURM_STEP_ID": str(step), "SLURM_JOB_ID": str(job)})["MASTER_PORT"]
        for step in range(4)
        for job in range(123456, 123466)
    }
    assert len(ports) == 40
    assert all(20000 <= int(port) < 28192 for port in ports)


def test_an_exported_rendezvous_is_used_unless_empty() -> None:
    exported = {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "4321"}
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(rank_variables(SLURM | exported))
    found = rank_variables(SLURM | {"MASTER_ADDR": "", "MASTER_PORT": " ", "RANK": "", "WORLD_SIZE": ""})
    assert (found["RANK"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("5", "nid008", str(20000 + 123456 % 8192))


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_JOB_ID"])
def test_missing_slurm_variables_are_named(missing: str) -> None:
    for value in (None, "x"):
        left = {k: v for k, v in SLURM.items() if k != missing} | ({} if value is None else {missing: value})
        with pytest.raises(ValueError, match=f"{missing} in the environment must be an integer"):
            rank_variables(left)


def test_rank_variables_left_over_in_the_shell_are_refused_under_srun() -> None:
    with pytest.raises(ValueError, match=r"RANK=0 and WORLD_SIZE=1 .* srun started 8 tasks: unset RANK and WORLD_SIZE"):
        rank_variables(SLURM | {"RANK": "0", "WORLD_SIZE": "1"})
    assert rank_variables(SLURM | {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}) == {}


def test_slurm_nodes_with_unequal_tasks_and_the_node_of_a_rank() -> None:
    uneven = SLURM | {"SLURM_STEP_NODELIST": "a[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}
    assert rank_variables(uneven)["LOCAL_WORLD_SIZE"] == "1"
    assert [host_of_rank(r, uneven) for r in range(6)] == ["a1", "a1", "a2", "a2", "a3", None]
    assert host_of_rank(0, {}) is None


def test_an_interactive_shell_inside_an_allocation_is_not_a_rank() -> None:
    assert rank_variables({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}) == {}


def test_under_torchrun_nothing_is_changed_and_deepspeed_gets_its_local_rank() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert rank_variables(torchrun | SLURM) == {}
    assert rank_variables({"RANK": "3", "WORLD_SIZE": "4"}, local_rank=1) == {"LOCAL_RANK": "1"}


def test_mpirun_needs_a_rendezvous() -> None:
    mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT is not set: pass -x"):
        rank_variables(mpi)
    assert rank_variables(mpi | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})["RANK"] == "1"


def test_a_plain_process_is_not_a_rank() -> None:
    assert rank_variables({}) == {}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--local_rank=3", "train", "x"], (3, ["train", "x"])),
        (["--local-rank", "2", "train"], (2, ["train"])),
        (["train", "x", "-o", "a=1"], (None, ["train", "x", "-o", "a=1"])),
    ],
)
def test_local_rank_is_split_off_the_arguments(words: list[str], found: tuple[int | None, list[str]]) -> None:
    assert take_local_rank(words) == found


def test_cores_near_a_gpu_come_from_sysfs(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0009:01:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    node = tmp_path / "devices/system/node/node1"
    node.mkdir(parents=True)
    (node / "cpulist").write_text("72-143,200\n")
    allowed = set(range(288))
    assert numa_cores("00000009:01:00.0", allowed, tmp_path) == {*range(72, 144), 200}
    assert numa_cores("0009:01:00.0", set(range(70, 80)), tmp_path) == set(range(72, 80))
    assert numa_cores("0009:01:00.0", {0, 1}, tmp_path) == {0, 1}  # none of them is near: all that it may use
    assert numa_cores("0000:99:00.0", allowed, tmp_path) == allowed
    (device / "numa_node").write_text("-1\n")
    assert numa_cores("0009:01:00.0", allowed, tmp_path) == allowed


def test_ranks_of_one_numa_node_share_its_cores() -> None:
    parts = [split_cores(list(range(10)), i, 4) for i in range(4)]
    assert sorted(c for part in parts for c in part) == list(range(10))
    assert all(len(part) in (2, 3) for part in parts)
    assert split_cores([1, 2], 0, 3) == {1, 2}


def test_caches_go_to_the_local_disk_unless_set(tmp_path: Path) -> None:
    environment = {"RACE_DIST_CACHE": str(tmp_path), "CUDA_CACHE_PATH": "/mine"}
    use_local_caches(environment)
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / str(os.getuid()) / "triton")
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    assert environment["CUDA_CACHE_PATH"] == "/mine"
    untouched: dict[str, str] = {}
    use_local_caches(untouched)
    assert untouched == {}


@pytest.mark.parametrize(
    "spoiled",
    ["open to all", "its part open to all", "a link", "its part a link", "a file", "a root that others may rename in"],
)
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str) -> None:
    """What lies in it is loaded as code."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    root, other = tmp_path / "cache", tmp_path / "other"
    mine = root / str(os.getuid())
    root.mkdir()
    other.mkdir()
    if spoiled == "a link":
        mine.symlink_to(other)
    elif spoiled == "a file":
        mine.write_text("")
    else:
        mine.mkdir(mode=0o700)
        part = mine / "triton"
        part.symlink_to(other) if spoiled == "its part a link" else part.mkdir(mode=0o700)
        for folder in {"open to all": [mine], "its part open to all": [part], "a root that others may rename in": [root]}.get(
            spoiled, []
        ):
            folder.chmod(0o777)
    environment = {"RACE_DIST_CACHE": str(root)}
    use_local_caches(environment)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        used = Path(environment[name])
        assert not used.is_relative_to(mine)
        assert str(os.getuid()) in used.parent.name
        for folder in (used, used.parent):
            found = folder.lstat()
            assert (stat.S_ISDIR(found.st_mode), found.st_uid, stat.S_IMODE(found.st_mode)) == (True, os.getuid(), 0o700)
    assert not list(other.iterdir())


def test_an_error_names_a_cache_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: os.mkdir(tmp_path / "file" / "x"))
    with pytest.raises(ValueError, match=r"no folder for compiled kernels can be made in RACE_DIST_CACHE=.*file/cache"):
        use_local_caches({"RACE_DIST_CACHE": str(tmp_path / "file" / "cache")})
