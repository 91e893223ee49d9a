"""Ranks that die, leave, or stay away: the others end within the timeout, with the rank's name."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from harness import spawn_ranks

from race_dist.parallel import RankFailure, exclusive_scan
from race_dist.sketch import SketchState


def steps(group, victim: int, how: str, timeout: float):
    """Scan again and again; one rank stops in the middle. Survivors return what they caught, and after how long."""
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
                time.sleep(timeout + 6)  # "sleep": lives, but does not come
            exclusive_scan(carry, group)
    except RankFailure as failure:
        return str(failure), failure.ranks, time.monotonic() - began
    return None


@pytest.mark.parametrize(("victim", "how"), [(1, "kill"), (2, "exit"), (0, "kill"), (1, "sleep")])
def test_survivors_name_the_rank(victim: int, how: str) -> None:
    timeout = 5.0
    outcomes = spawn_ranks(3, steps, victim, how, timeout, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            if how != "sleep":
                assert "ended with exit code" in outcome.error
            continue
        assert outcome.error is None, outcome.error
        message, ranks, seconds = outcome.value
        assert ranks == (victim,), message
        assert f"rank {victim}" in message
        assert message.startswith(f"rank {rank}: ")
        assert seconds < timeout + 7.0, message
