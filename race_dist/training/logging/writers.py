"""Writers of metrics: metrics.jsonl and TensorBoard. A write error never ends a run.

What cannot be written is reported once, and tried again the next time.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LARGEST_BACKLOG = 100_000  # records that are kept while the disk is full


class WriteErrors:
    """Reports write errors, each file once, and lets the run continue.

    Args:
        say: called with a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._reported = say, set[str]()

    @contextmanager
    def suppress(self, what: str) -> Iterator[None]:
        """Context in which exceptions are reported as "``what`` could not be written" and suppressed; interrupts pass."""
        try:
            yield
        except Exception as error:
            self.report(what, error)

    def report(self, what: str, error: Exception) -> None:
        """Report that ``what`` could not be written, unless that was reported before."""
        if what not in self._reported:
            self._reported.add(what)
            reason = _reason(error).removeprefix(f"{what} could not be written: ")
            self._say(f"{what} could not be written ({reason}): the run goes on without it")

    def clear(self, what: str) -> None:
        """``what`` was written again: report its next failure."""
        self._reported.discard(what)


def _reason(error: BaseException) -> str:
    error = error.__cause__ if isinstance(error.__cause__, OSError) else error  # the message names the file already
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class JsonlWriter:
    """Appends JSON records to a file, one per line. A record that cannot be written waits for the next call of :meth:`write`.

    Args:
        path: created if it does not exist.
        write_errors: reports errors.
    """

    def __init__(self, path: Path, write_errors: WriteErrors) -> None:
        self._path, self._write_errors = path, write_errors
        self._handle: int | None = None
        self._backlog: list[bytes] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        if len(self._backlog) < _LARGEST_BACKLOG:
            self._backlog.append(json.dumps(record).encode() + b"\n")
        try:
            self._append(b"".join(self._backlog))
        except OSError as error:
            self._write_errors.report(str(self._path), error)
        else:
            self._backlog.clear()
            self._write_errors.clear(str(self._path))

    def _append(self, data: bytes) -> None:
        """Write all of it, or nothing."""
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
        """Try to write the waiting records, and close the file."""
        if self._backlog:
            with suppress(OSError):
                self._append(b"".join(self._backlog))
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)


class TensorBoardWriter:
    """Writes records as TensorBoard scalars and texts. After an error it writes nothing more.

    Args:
        folder: for the event files.
        after: TensorBoard ignores earlier events of later steps.
        write_errors: reports errors.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, after: int, write_errors: WriteErrors) -> None:
        self._folder, self._write_errors = folder, write_errors
        writer = import_summary_writer()
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._writer: Any = None
        self._attempt(lambda: setattr(self, "_writer", writer(str(folder), purge_step=after + 1)))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record."""
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
        """Write buffered events and close the files."""
        self._attempt(lambda: None if self._writer is None else self._writer.close())
        threading.excepthook = self._hook

    def _thread_failed(self, arguments: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread prints a traceback and raises its error in the next call, which reports it: print nothing."""
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            self._hook(arguments)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self._write_errors.report(str(self._folder), error)
            self._writer = None


def import_summary_writer() -> Any:
    """TensorBoard's ``SummaryWriter``. Raises ImportError, which says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard = true needs TensorBoard: pip install 'race-dist[tensorboard]'") from None
    return SummaryWriter
