"""Output to standard output that cannot fail the run: on a closed pipe, a full disk or an ASCII terminal."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import IO, cast

from rich.console import Console

_UNWRITABLE = (OSError, ValueError)  # ValueError: the stream is closed
_reported: set[int] = set()  # ids of the streams whose failure was reported


class TolerantStream:
    """A text stream whose write errors are reported once on standard error and then ignored.

    Characters that its encoding lacks are written as escapes (``\\u0101``). A closed pipe is replaced by the null device, so
    that the interpreter's flush at exit does not fail.

    Args:
        stream: None if the process was started without this stream.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        """Encoding of the stream; UTF-8 if it has none."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except _UNWRITABLE:
            return False

    def fileno(self) -> int:
        """File descriptor of the stream. Raises OSError if there is none."""
        if self._stream is None:
            raise OSError("there is no stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write the text; errors are reported once."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except _UNWRITABLE as error:
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; errors are reported once."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except _UNWRITABLE as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        assert self._stream is not None
        if isinstance(error, BrokenPipeError):
            _discard(self._stream)
        if id(self._stream) not in _reported:
            _reported.add(id(self._stream))
            atexit.register(_flush_or_discard, self._stream)
            with suppress(*_UNWRITABLE, AttributeError):
                reason = getattr(error, "strerror", None) or error
                print(f"standard output could not be written ({reason}): going on without it", file=sys.stderr, flush=True)


def _flush_or_discard(stream: IO[str]) -> None:
    try:
        stream.flush()
    except _UNWRITABLE:
        _discard(stream)


def _discard(stream: IO[str]) -> None:
    """Redirect the stream, with its buffered text, to the null device."""
    with suppress(*_UNWRITABLE, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def print_line(line: str) -> None:
    """Print a line; an error does not raise."""
    stream = TolerantStream(sys.stdout)
    stream.write(line + "\n")
    stream.flush()


def plain_console() -> Console:
    """A console that prints text literally (no markup, no emoji names) to a tolerant standard output."""
    return Console(file=cast(IO[str], TolerantStream(sys.stdout)), markup=False, emoji=False, highlight=False)
