"""Signals that ask a run to save and leave: they set a flag, which the run's ranks agree on between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def stop_early(code: int) -> None:
    """Until a run listens to signals itself, end this process when one asks it to stop: there is nothing to save yet.

    A thread hears them, as the main one may wait in a call that lets no handler run. SIGUSR1 and SIGUSR2 come from a scheduler
    and end the process with ``code``; early or late, the file that RACE_DIST_STOP_FILE names is made, so that the script above
    knows that ranks were told to stop, however each has ended. SIGTERM also comes from launchers, beside a rank that failed.
    """
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    for number in SIGNALS[:-1]:
        signal.signal(number, _early)
    signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)

    def hear() -> None:
        while True:
            number = os.read(inlet, 1)[0]
            if number not in SIGNALS[:-1]:
                continue
            told = number != signal.SIGTERM
            if told and (mark := os.environ.get("RACE_DIST_STOP_FILE")):
                with contextlib.suppress(OSError):
                    os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
            if signal.getsignal(number) is _early:
                os._exit(code if told else 128 + number)

    threading.Thread(target=hear, name="race-dist-stop", daemon=True).start()


def _early(number: int, frame: FrameType | None) -> None:
    """Nothing: the thread has heard it."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or an interrupt while the block runs; a second interrupt interrupts.

        with StopFlag() as stop:
            run(trainer, directory, hooks=Hooks(stop_requested=stop.requested))

    Nothing is saved in the handler: a save needs all ranks, and they are somewhere else.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether one has come."""
        return self._number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number is None:
            who = f"race-dist: rank {os.environ.get('RANK', '0')} got {signal.Signals(number).name}"
            os.write(2, f"{who}: the run saves after this step and stops\n".encode())  # print is not for handlers
        self._number = number
