"""What several test processes need is computed by one of them."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, compute: Callable[[], Any]) -> Any:
    """``compute()``, in the first process of this test session that asks for ``name``; the others wait for its result."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    stored = root / f"{name}.pickle"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stored.exists():
            result = compute()
            stored.write_bytes(pickle.dumps(result))
        return pickle.loads(stored.read_bytes())  # noqa: S301
