"""The lock of a run's folder: another process is refused by name, and a killed process leaves no lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from race_dist.training import run_lock
from race_dist.training.config import parse_config
from race_dist.training.run_directory import RunDirectory, open_run
from race_dist.training.run_lock import LOCK, Owner, RunInUse, RunLock, check_not_in_use
from tests.distributed.harness import run_ranks

CONFIG = parse_config({"name": "r", "model": {"dim": 8, "num_layers": 1, "num_heads": 1}})
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom race_dist.training.run_lock import RunLock\n"
    "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = tmp_path / "r"
    for attempt in (
        lambda: RunLock(folder).acquire(),
        lambda: check_not_in_use(folder),
        RunDirectory(folder).check_not_in_use,
        lambda: open_run(RunDirectory(folder), CONFIG, None, resume=True, overwrite=False),
    ):
        with pytest.raises(OSError, match=rf"r is in use: .*process {holder.pid} on .*, since 20"):
            attempt()
    assert not (folder / "config.json").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    check_not_in_use(folder)
    with RunLock(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        check_not_in_use(folder)  # one's own
    assert (folder / LOCK).read_text() == ""


def test_restarted_ranks_wait_for_a_dying_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = tmp_path / "r"
    owner = json.loads((folder / LOCK).read_text()) | {"ticks": "1"}  # as if the process had died, its end not yet done
    (folder / LOCK).write_text(json.dumps(owner))
    end = threading.Timer(0.7, holder.kill)
    end.start()
    began = time.monotonic()
    RunLock(folder).acquire().release()
    assert 0.4 < time.monotonic() - began < 20.0
    end.join()


def test_heartbeats_replace_locks_that_are_local_to_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_locks_are_local", lambda file: True)
    monkeypatch.setattr(run_lock, "_HEARTBEAT", 0.05)
    elsewhere = replace(Owner.this_process(), host="other", boot="other", pid=1)
    tmp_path.joinpath(LOCK).write_text(json.dumps(asdict(elsewhere)))
    touch = subprocess.Popen(["sh", "-c", f"while sleep 0.03; do touch '{tmp_path / LOCK}'; done"])
    try:
        with pytest.raises(RunInUse, match="process 1 on other"):
            RunLock(tmp_path).acquire()
    finally:
        touch.kill()
        touch.wait()
    with RunLock(tmp_path):  # nobody touches it any more
        first = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / LOCK).stat().st_mtime_ns != first


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\x00" * 10])
def test_a_free_lock_is_acquired_whatever_the_file_contains(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    check_not_in_use(tmp_path)
    RunLock(tmp_path).acquire().release()


def test_a_symlinked_lock_is_refused_and_a_stale_lock_is_not_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / LOCK).write_text("")
    RunDirectory(folder).check_free(overwrite=False)
    RunDirectory(folder).check_resumable()
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(folder).acquire()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("part", ["checkpoints", "tensorboard", "metrics.jsonl", "model.safetensors", "."])
def test_overwriting_a_run_removes_nothing_behind_a_symlink(tmp_path: Path, part: str) -> None:
    directory, scratch = RunDirectory(tmp_path / "r"), tmp_path / "scratch"
    directory.create(CONFIG, overwrite=False)
    place = directory.path / part if part != "." else directory.path
    if part == ".":
        directory.path.rename(scratch)
    elif "." in part:
        scratch.write_text("kept")
    else:
        scratch.mkdir()
        (scratch / "kept").write_text("kept")
    place.symlink_to(scratch)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"is a symbolic link to .*scratch"):
        directory.create(CONFIG, overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def opened(group: dist.ProcessGroup, folder: str) -> list[str]:
    said = []
    for name, error in (("link", OSError), ("nul\x00", ValueError)):
        with pytest.raises(error) as refused:
            open_run(RunDirectory(Path(folder, name)), CONFIG, group, resume=True, overwrite=False)
        said.append(str(refused.value))
    with open_run(RunDirectory(Path(folder, "r")), CONFIG, group, resume=True, overwrite=False):
        return said


def test_an_error_of_rank_0_ends_every_rank_with_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    found = run_ranks(2, opened, str(tmp_path))
    assert found[0] == found[1]
    assert "link is a symbolic link to" in found[0][0]
    assert "which is not there" in found[0][0]
    assert (tmp_path / "r" / "config.json").is_file()


@pytest.mark.parametrize("resume", [True, False])
def test_a_dangling_link_is_not_the_folder_of_a_run(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(OSError, match=r"is a symbolic link to .*, which is not there; remove the link"):
        open_run(RunDirectory(tmp_path / "link"), CONFIG, None, resume=resume, overwrite=not resume)
    assert not (tmp_path / "none").exists()
