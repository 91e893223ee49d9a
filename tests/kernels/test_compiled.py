"""The kernels, compiled for GPUs that are not present: shared memory, register spills, serialized wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
from tests.kernels.compile_only import CALLS, PIPELINED


def figures(*arguments: object) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_only", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_pipelines_of_hopper_compile_and_fit() -> None:
    """They fit in shared memory, and ptxas does not serialize wgmma: it does where registers run short or a partition waits at
    an mbarrier while its products run."""
    found = figures(90, 232_448, *CALLS)
    assert {name.split(": ")[1] for name in found} == set(PIPELINED.values())
    for name, kernel in found.items():
        assert kernel["shared"] <= kernel["bound"], (name, kernel)
        assert not kernel.get("serialized"), (name, kernel)
        assert kernel.get("spills", 0) <= 512, (name, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "limit"), [(90, 232_448), (80, 166_912), (89, 101_376)])
def test_shared_memory_is_what_the_plan_says(capability: int, limit: int) -> None:
    for name, kernel in figures(capability, limit).items():
        assert kernel["shared"] <= kernel["bound"] <= limit, (name, kernel)
