"""torchrun over several hosts, one of which is lost."""

from __future__ import annotations

import re
from pathlib import Path

import hosts
import pytest
from training_job import RACE_DIST, TrainingJob, wait_for

REASON = hosts.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TIMEOUT = 12.0
STEPS = 200


@pytest.mark.timeout(400)
def test_hosts_name_a_lost_host_and_continue_without_it(tmp_path: Path) -> None:
    """Three hosts, one rank each. One is disconnected during the run: the two others fail within the timeout and name its rank,
    meet at a new rendezvous, and finish from the newest checkpoint on two ranks."""
    job = TrainingJob(tmp_path, "run", steps=STEPS, timeout=TIMEOUT)
    with hosts.Hosts(3) as network:
        logs = [tmp_path / f"host{i}.log" for i in range(3)]
        words = [*RACE_DIST, "launch", "torchrun", str(job.config)]
        for change in ("nodes=3", "min_nodes=2", "device=cpu", "restarts=3"):
            words += ["--set", change]
        agents = [
            network.start(
                i, [*words, "--endpoint", f"{network.address(0)}:29400", "--local-address", network.address(i)], logs[i]
            )
            for i in range(3)
        ]

        def printed(index: int) -> str:
            return logs[index].read_text(errors="replace")

        wait_for(lambda: job.saved() or any(a.poll() is not None for a in agents), "\n".join(map(printed, range(3)))[-3000:])
        there = network.processes(2)
        lost = next(rank for rank, pid in job.places().items() if pid in there)
        network.cut(2)
        wait_for(
            lambda: all(f"rank {lost}" in refusal(printed(i)) for i in (0, 1)), f"hosts 0 and 1 name rank {lost}", TIMEOUT + 20
        )
        resumed = wait_for(lambda: re.search(r"resuming \S+ after step (\d+)", printed(0) + printed(1)), "the run goes on", 150)
        assert int(resumed[1]) >= 20
        assert [agent.wait(120) for agent in agents[:2]] == [0, 0], printed(0)[-3000:]
        assert "2 ranks" in printed(0) + printed(1)
    losses = job.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] / 2


def refusal(text: str) -> str:
    """The error of a rank."""
    return "\n".join(line for line in text.splitlines() if "failed" in line and "race-dist" in line)
