"""Lines on standard output that never end what they report on: a closed pipe, a full disk or an ASCII terminal."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import IO, cast

from rich.console import Console

_UNWRITABLE = (OSError, ValueError)  # ValueError: the stream is closed
_said: set[int] = set()  # ids of the streams whose failure was said


class TolerantStream:
    """A text stream that is written to as far as that goes.

    What its encoding lacks is written as an escape (``\\u0101``). A stream that fails is named once on standard error; a pipe
    that nobody reads any more is replaced by the null device, so that the interpreter's own flush at the end does not fail.

    Args:
        stream: None is a stream that the process was started without.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        """Of the stream; UTF-8 where it does not say."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except _UNWRITABLE:
            return False

    def fileno(self) -> int:
        """Of the stream. Raises OSError where it has none."""
        if self._stream is None:
            raise OSError("there is no stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, if it can be."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except _UNWRITABLE as error:
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except _UNWRITABLE as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        assert self._stream is not None
        if isinstance(error, BrokenPipeError):
            _discard(self._stream)
        if id(self._stream) not in _said:
            _said.add(id(self._stream))
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
    """Send what the stream still holds, and all that follows, to the null device."""
    with suppress(*_UNWRITABLE, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def print_line(line: str) -> None:
    """Print a line, if it can be printed."""
    stream = TolerantStream(sys.stdout)
    stream.write(line + "\n")
    stream.flush()


def plain_console() -> Console:
    """A console that shows words as they are (no markup, no emoji names) on a tolerant standard output."""
    return Console(file=cast(IO[str], TolerantStream(sys.stdout)), markup=False, emoji=False, highlight=False)
