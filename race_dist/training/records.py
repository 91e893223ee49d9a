"""What a run writes about itself, none of which ever ends it: metrics.jsonl, TensorBoard, pictures, samples.

What cannot be written is said once, and tried again the next time.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from race_dist.output_paths import atomic_write

LARGEST_STEP = 2**53  # what a float, and so a picture, still counts
_LARGEST_BACKLOG = 100_000  # records that wait for a disk that is full


class WriteErrors:
    """Writes that have failed: each kind is said once.

    Args:
        say: what takes a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said = say, set[str]()

    @contextmanager
    def suppress(self, what: str) -> Iterator[None]:
        """Within it no error but an interrupt goes through: it is said that ``what`` could not be written, and why."""
        try:
            yield
        except Exception as error:
            self.tell(what, error)

    def tell(self, what: str, error: Exception) -> None:
        """Say that ``what`` could not be written, unless that was said before."""
        if what not in self._said:
            self._said.add(what)
            reason = _reason(error).removeprefix(f"{what} could not be written: ")
            self._say(f"{what} could not be written ({reason}): the run goes on without it")

    def mended(self, what: str) -> None:
        """``what`` was written after all: another failure is said again."""
        self._said.discard(what)


def _reason(error: BaseException) -> str:
    error = error.__cause__ if isinstance(error.__cause__, OSError) else error  # the name of the file is told already
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class JsonlWriter:
    """A file of JSON records, one a line. A record is on its way to disk when :meth:`write` returns, or waits for the next.

    Args:
        path: made where it is missing.
        write_errors: told where it cannot be written.
    """

    def __init__(self, path: Path, write_errors: WriteErrors) -> None:
        self._path, self._troubles = path, write_errors
        self._handle: int | None = None
        self._backlog: list[bytes] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        if len(self._backlog) < _LARGEST_BACKLOG:
            self._backlog.append(json.dumps(record).encode() + b"\n")
        try:
            self._append(b"".join(self._backlog))
        except OSError as error:
            self._troubles.tell(str(self._path), error)
        else:
            self._backlog.clear()
            self._troubles.mended(str(self._path))

    def _append(self, data: bytes) -> None:
        """All of it, or nothing."""
        if self._handle is None:
            self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        before, written = os.fstat(self._handle).st_size, 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, before)
            raise

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        if self._backlog:
            with suppress(OSError):
                self._append(b"".join(self._backlog))
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)


class TensorBoardWriter:
    """TensorBoard's writer, as far as it can write.

    Args:
        folder: for its files.
        after: what it had of later steps is dropped when it is read.
        write_errors: told where it fails; nothing more is then given to it.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, after: int, write_errors: WriteErrors) -> None:
        self._folder, self._troubles = folder, write_errors
        writer = import_summary_writer()
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._writer: Any = None
        self._attempt(lambda: setattr(self, "_writer", writer(str(folder), purge_step=after + 1)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add what a record holds."""
        self._attempt(lambda: self._write(record))

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        kind, step = record["kind"], record["step"]
        if kind == "event":
            self._writer.add_text(record["what"], record.get("text", ""), step)
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write what it still holds."""
        self._attempt(lambda: None if self._writer is None else self._writer.close())
        threading.excepthook = self._hook

    def _thread_failed(self, arguments: threading.ExceptHookArgs) -> None:
        """Its thread prints a traceback and hands the error to the next call, which tells it."""
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            self._hook(arguments)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self._troubles.tell(str(self._folder), error)
            self._writer = None


def import_summary_writer() -> Any:
    """TensorBoard's class of writers. Raises ImportError, which says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard = true needs TensorBoard: pip install 'race-dist[tensorboard]'") from None
    return SummaryWriter


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
