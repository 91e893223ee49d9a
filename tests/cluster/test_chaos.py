"""A run that is disturbed again and again ends with the losses and weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest


@pytest.mark.timeout(600)
def test_six_faults_leave_the_results_unchanged(tmp_path: Path) -> None:
    report = chaos.run(tmp_path, 6, seed=1)
    print(chaos.table(report))
    assert {o["fault"] for o in report["faults"]} >= set(chaos.FIRST) - {"full disk"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_faults_leave_the_results_unchanged(tmp_path: Path) -> None:
    report = chaos.run(tmp_path, 50, seed=2)
    print(chaos.table(report))
    assert len({o["fault"] for o in report["faults"]}) >= len(chaos.FAULTS) - 1


def test_faults_are_planned_about_equally_often() -> None:
    plan = chaos.faults(50, seed=3)
    counts = [plan.count(name) for name in chaos.FAULTS]
    assert min(counts) >= 4
    assert max(counts) <= 5
    assert sorted(chaos.faults(6, seed=4)) == sorted(chaos.FIRST)
