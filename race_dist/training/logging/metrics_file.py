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
    """The records of a metrics.jsonl that are whole, in their order. Raises OSError where the file cannot be read.

    Left out is what no run has written: a line that is cut short or not JSON, a record whose kind or step is none, or whose
    values are not numbers. A number that is not finite is None.
    """
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The same, and how many lines were left out."""
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
    """A number that a float can hold; else None."""
    if value is None or (isinstance(value, int) and abs(value) < 2**1023):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def truncate_metrics(path: Path, step: int, write_errors: WriteErrors) -> tuple[list[dict[str, Any]], int]:
    """Keep the whole records up to a step in a metrics.jsonl, and return them and the number of lines that were damaged: a run
    that goes on from there writes the later ones again."""
    kept: list[dict[str, Any]] = []
    damaged = 0
    with write_errors.suppress(str(path)):
        if path.exists():
            found, damaged = read_records(path)
            kept = [record for record in found if record["step"] <= step] if step else []
            with atomic_write(path) as partial:
                partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept, damaged
