"""The kernels, compiled for cards that are not here: what they take of shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "limit"), [(90, 232_448), (80, 166_912), (89, 101_376)])
def test_shared_memory_is_what_the_plan_says(capability: int, limit: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-m", "tests.kernels.compile_only", str(capability), str(limit)], env=environment,
                         capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for name, figures in json.loads(run.stdout.splitlines()[-1]).items():
        assert figures["shared"] <= figures["bound"] <= limit, (name, figures)
