"""Signals that ask a run to save and leave: they set a flag, which the run's ranks agree on between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number is None:
            who = f"race-dist: rank {os.environ.get('RANK', '0')} got {signal.Signals(number).name}"
            os.write(2, f"{who}: the run saves after this step and stops\n".encode())  # print is not for handlers
        self._number = number
