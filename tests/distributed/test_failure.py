"""Ranks that die, leave, or never join: the others end within the timeout and name the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import spawn_ranks

from race_dist.parallel import RankFailure, exclusive_scan
from race_dist.sketch import SketchState


def steps(group, victim: int, how: str, timeout: float):
    """Scan in a loop; one rank stops in the middle. Survivors return the caught exception and the time that it took."""
    carry = SketchState.empty(1, 2, 8, 4)
    exclusive_scan(carry, group)
    began = time.monotonic()
    try:
        for step in range(10**6):
            if step == 3 and dist.get_rank() == victim:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "exit":
                    os._exit(3)
                if how == "raise":
                    raise KeyError("a bug of this rank alone")
                if how == "stop":  # stopped, including the store, until long after the others have given up
                    subprocess.Popen(["sh", "-c", f"sleep {timeout + 30}; kill -CONT {os.getpid()}"])
                    os.kill(os.getpid(), signal.SIGSTOP)
                    return None
                time.sleep(timeout + 6)  # "sleep": alive, but does not join
            exclusive_scan(carry, group)
    except RankFailure as failure:
        return str(failure), failure.ranks, time.monotonic() - began
    return None


@pytest.mark.parametrize(
    ("victim", "how"), [(1, "kill"), (2, "exit"), (0, "kill"), (1, "sleep"), pytest.param(0, "stop", marks=pytest.mark.slow)]
)
def test_survivors_name_the_rank(victim: int, how: str) -> None:
    timeout = 5.0
    outcomes = spawn_ranks(3, steps, victim, how, timeout, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            if how not in ("sleep", "stop"):
                assert "ended with exit code" in outcome.error
            continue
        assert outcome.error is None, outcome.error
        message, ranks, seconds = outcome.value
        assert ranks == (victim,), message
        assert f"rank {victim}" in message
        assert message.startswith(f"rank {rank}: ")
        assert seconds < timeout + (30.0 if how == "stop" else 7.0), message


def silent(group, victim: int, folder: str):
    """One rank computes without end; no collective times out before the watchdog detects the stall."""
    from race_dist.distributed.watchdog import abort_on_stall

    os.dup2(os.open(f"{folder}/{dist.get_rank()}", os.O_WRONLY | os.O_CREAT), 2)
    carry = SketchState.empty(1, 2, 8, 4)
    exclusive_scan(carry, group)  # every rank has joined
    abort_on_stall(4.0)
    for step in range(3):
        if step == 2 and dist.get_rank() == victim:
            lost_in_thought()
        exclusive_scan(carry, group)


def lost_in_thought() -> None:
    time.sleep(600)


def test_a_stalled_job_names_the_rank_shows_its_stack_and_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    outcomes = spawn_ranks(3, silent, 1, str(tmp_path), timeout=300.0)
    assert all(outcome.error for outcome in outcomes)  # ended by the watchdog, or by the error of a rank that ended before
    assert time.monotonic() - began < 100.0  # less than the 300 and 600 of the collective and of the rank
    for rank in (0, 2):
        assert (
            f"rank {rank}: the job has stalled for 4 s: rank 1 did not come to the collective"
            in (tmp_path / str(rank)).read_text()
        )
    assert "in lost_in_thought" in (tmp_path / "1").read_text()
