"""Compute a value once for several test processes."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, compute: Callable[[], Any]) -> Any:
    """The result of ``compute()`` under ``name``: the first process of the test session computes it, the others wait."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    stored = root / f"{name}.pickle"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stored.exists():
            result = compute()
            stored.write_bytes(pickle.dumps(result))
        return pickle.loads(stored.read_bytes())  # noqa: S301
