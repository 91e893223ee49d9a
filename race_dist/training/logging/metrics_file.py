"""Reading metrics.jsonl: the records that are complete; damaged lines are skipped and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from race_dist.output_paths import atomic_write
from race_dist.training.logging.writers import WriteErrors

LARGEST_STEP = 2**53  # the largest integer that a float, and so a plot, still represents


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact records of a metrics.jsonl, in order. Raises OSError if the file cannot be read.

    Skipped are lines that are truncated or not JSON, records with an unknown kind or an invalid step, and records whose values
    are not numbers. A value that is not finite is read as None.
    """
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The same, and the number of lines that were skipped."""
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("kind") not in ("train", "eval", "event"):
        return None
    step, rest = found.get("step"), {k: v for k, v in found.items() if k not in ("kind", "step")}
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < LARGEST_STEP:
        return None
    if found["kind"] == "event":
        return found if isinstance(rest.get("what"), str) and isinstance(rest.get("text", ""), str) else None
    if not all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in rest.values()):
        return None
    return {"kind": found["kind"], "step": step, **{k: _finite(v) for k, v in rest.items()}}


def _finite(value: float | None) -> float | None:
    """The value if a float can hold it; otherwise None."""
    if value is None or (isinstance(value, int) and abs(value) < 2**1023):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def truncate_metrics(path: Path, step: int, write_errors: WriteErrors) -> tuple[list[dict[str, Any]], int]:
    """Remove the records after a step from a metrics.jsonl, because a run that resumes there writes them again.

    Returns:
        The intact records that are kept, and the number of damaged lines.
    """
    kept: list[dict[str, Any]] = []
    damaged = 0
    with write_errors.suppress(str(path)):
        if path.exists():
            found, damaged = read_records(path)
            kept = [record for record in found if record["step"] <= step] if step else []
            with atomic_write(path) as partial:
                partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept, damaged
