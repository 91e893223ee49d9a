"""How far a step is, and how a step is ended in its middle: by Ctrl-C or by whoever asks, at a chunk's edge on all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from race_dist.terminal import print_line

HOST_AHEAD = 2  # chunks whose kernels may wait on a device before the host waits for them


@dataclass(frozen=True)
class Progress:
    """How far one streamed step is: given to the ``progress`` callback after every chunk.

    On a device the last chunks may still be running: the host is at most two ahead.

    Attributes:
        phase: "forward" (carries only) or "backward" (activations again, and gradients).
        chunk: chunks done in this phase, of ``chunks``.
        tokens: tokens done in this phase, over all ranks of the sequence and rows.
        seconds: since the step began, or was resumed.
        remaining: seconds left, judged by the pace so far.
        tokens_per_second: the pace of this phase so far.
        memory: bytes allocated on the device, or resident in the process on a CPU, now.
    """

    phase: str
    chunk: int
    chunks: int
    tokens: int
    seconds: float
    remaining: float
    tokens_per_second: float
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.phase} {self.chunk}/{self.chunks}, {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.memory / 2**30:.2f} GiB, {self.seconds:.0f} s, {self.remaining:.0f} s left"
        )


class StepInterrupted(KeyboardInterrupt):
    """A step was ended in its middle, at a chunk's edge. The message says how far it was and how it goes on."""


class ProgressMeter:
    """Counts chunks and keeps the host at most :data:`HOST_AHEAD` of them before the device: what is reported has happened,
    and a key press is soon heard."""

    def __init__(self, device: torch.device, chunks: int, length: int, batch: int, step: int) -> None:
        self._device, self._chunks, self._length, self._batch, self._step = device, chunks, length, batch, step
        self._began = self._last = time.monotonic()
        self._phase, self._phase_began, self._phase_first = "", self._began, 0
        self._units = 0  # forward passes of a chunk since the beginning; a backward chunk counts as three
        self._running: deque[torch.cuda.Event] = deque()

    def chunk_done(self, phase: str, done: int) -> Progress:
        """Call it when ``done`` chunks of a phase have been queued."""
        self._wait()
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._phase_began, self._phase_first = phase, self._last, done - 1
        self._last = now
        self._units += 1 if phase == "forward" else 3
        seconds = now - self._began
        left = 3 * self._chunks + self._chunks - 1 - done if phase == "forward" else 3 * (self._chunks - done)
        pace = (self._tokens(phase, done) - self._tokens(phase, self._phase_first)) / max(now - self._phase_began, 1e-9)
        return Progress(
            phase,
            done,
            self._chunks,
            self._tokens(phase, done),
            seconds,
            seconds * left / self._units,
            pace,
            memory_in_use(self._device),
        )

    def _tokens(self, phase: str, done: int) -> int:
        """Tokens of the first ``done`` chunks, counted from the end in the backward phase, where the ragged one comes first."""
        whole = done * self._step
        if phase == "backward" and done:
            whole -= self._chunks * self._step - self._length
        return self._batch * min(whole, self._length)

    def _wait(self) -> None:
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._running.append(event)
        if len(self._running) > HOST_AHEAD:
            self._running.popleft().synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes allocated on a CUDA device; resident bytes of this process otherwise (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class InterruptHandler:
    """Within it, a first Ctrl-C is noted, to be asked for at a chunk's edge; a second one raises at once."""

    def __init__(self, stop: Callable[[], bool] | None) -> None:
        self._stop, self._heard = stop, False
        self._before: Any = None

    def wanted(self) -> bool:
        """Whether somebody has asked for the step to end."""
        return self._heard or (self._stop is not None and self._stop())

    def __enter__(self) -> InterruptHandler:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # somebody else's handler stays
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._heard and kind is None:
            signal.raise_signal(signal.SIGINT)  # the step came to its end first; the key press is for whoever called it

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            signal.default_int_handler(number, frame)
        self._heard = True
        print_line("\ninterrupted: ending at the chunk's edge (press Ctrl-C again to end at once)")
