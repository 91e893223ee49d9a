"""What a run writes about itself, none of which ever ends it: metrics.jsonl, TensorBoard, pictures, samples.

What cannot be written is said once, and tried again the next time.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
