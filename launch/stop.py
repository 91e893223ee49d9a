"""Signals that ask a run to save and stop: they set a flag, which the ranks compare between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def stop_early(code: int) -> None:
    """End this process on a stop signal until the run handles signals itself: there is nothing to save yet.

    A thread receives the signals, because the main thread may block in a call that runs no handler. SIGUSR1 and SIGUSR2 come
    from a scheduler and end the process with ``code``. At any time they also create the file RACE_DIST_STOP_FILE, so that the
    job script knows that the ranks were asked to stop, however each of them ended. SIGTERM also comes from launchers after
    another rank failed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS[:-1]:
        signal.signal(number, _ignore)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch_signals() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in SIGNALS[:-1]:
                continue
            from_scheduler = number != signal.SIGTERM
            if from_scheduler and (stop_file := os.environ.get("RACE_DIST_STOP_FILE")):
                with contextlib.suppress(OSError):
                    os.close(os.open(stop_file, os.O_CREAT | os.O_WRONLY))
            if signal.getsignal(number) is _ignore:
                os._exit(code if from_scheduler else 128 + number)

    threading.Thread(target=watch_signals, name="race-dist-stop", daemon=True).start()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread handles the signal."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C while the block runs; a second Ctrl-C raises KeyboardInterrupt.

        with StopFlag() as stop:
            run(trainer, directory, hooks=Hooks(stop_requested=stop.requested))

    The handler does not save: saving is collective, and the other ranks are at another point.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # other threads cannot install handlers
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number is None:
            who = f"race-dist: rank {os.environ.get('RANK', '0')} got {signal.Signals(number).name}"
            os.write(2, f"{who}: the run saves after this step and stops\n".encode())  # print is not safe in handlers
        self._number = number
