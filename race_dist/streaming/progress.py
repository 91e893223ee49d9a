"""Progress of a streamed step, and its interruption by Ctrl-C or a callback, at a chunk boundary on all ranks."""

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

MAX_QUEUED_CHUNKS = 2  # chunks queued on a device before the host waits


@dataclass(frozen=True)
class Progress:
    """The progress of a streamed step, given to the ``progress`` callback after every chunk.

    On a device the last chunks may still be running: the host is at most two chunks ahead.

    Attributes:
        phase: "forward" (carries only) or "backward" (recomputed activations, and gradients).
        chunk: the number of chunks done in this phase, out of ``chunks``.
        tokens: tokens done in this phase, over all ranks of the sequence and rows.
        seconds: since the step began or was resumed.
        remaining: estimated seconds left.
        tokens_per_second: the rate of this phase so far.
        memory: bytes allocated on the device now; on a CPU the resident bytes of the process.
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
    """A step was interrupted at a chunk boundary. The message says how far it was and how to resume it."""


class ProgressMeter:
    """Counts chunks, and keeps the host at most :data:`MAX_QUEUED_CHUNKS` ahead of the device, so that reports are current and
    Ctrl-C takes effect soon."""

    def __init__(self, device: torch.device, chunks: int, length: int, batch: int, step: int) -> None:
        self._device, self._chunks, self._length, self._batch, self._step = device, chunks, length, batch, step
        self._began = self._last = time.monotonic()
        self._phase, self._phase_began, self._phase_first = "", self._began, 0
        self._units = 0  # cost so far, in forward passes of one chunk; a backward chunk costs three
        self._running: deque[torch.cuda.Event] = deque()

    def chunk_done(self, phase: str, done: int) -> Progress:
        """The progress once ``done`` chunks of a phase have been queued."""
        self._wait()
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._phase_began, self._phase_first = phase, self._last, done - 1
        self._last = now
        self._units += 1 if phase == "forward" else 3
        seconds = now - self._began
        left = 3 * self._chunks + self._chunks - 1 - done if phase == "forward" else 3 * (self._chunks - done)
        rate = (self._tokens(phase, done) - self._tokens(phase, self._phase_first)) / max(now - self._phase_began, 1e-9)
        return Progress(
            phase,
            done,
            self._chunks,
            self._tokens(phase, done),
            seconds,
            seconds * left / self._units,
            rate,
            memory_in_use(self._device),
        )

    def _tokens(self, phase: str, done: int) -> int:
        """Tokens of the first ``done`` chunks of a phase. The backward phase starts with the last, perhaps shorter, chunk."""
        count = done * self._step
        if phase == "backward" and done:
            count -= self._chunks * self._step - self._length
        return self._batch * min(count, self._length)

    def _wait(self) -> None:
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._running.append(event)
        if len(self._running) > MAX_QUEUED_CHUNKS:
            self._running.popleft().synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes allocated on a CUDA device; resident bytes of this process otherwise (0 if the system does not report them)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class InterruptHandler:
    """A context in which the first Ctrl-C is recorded, to take effect at a chunk boundary; a second one raises at once."""

    def __init__(self, stop: Callable[[], bool] | None) -> None:
        self._stop, self._received = stop, False
        self._before: Any = None

    def requested(self) -> bool:
        """Whether the step should stop."""
        return self._received or (self._stop is not None and self._stop())

    def __enter__(self) -> InterruptHandler:
        ours = threading.current_thread() is threading.main_thread()
        if (
            ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # keep a handler that the caller has installed
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._received and kind is None:
            signal.raise_signal(signal.SIGINT)  # the step ended first: pass the signal on to the caller

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            signal.default_int_handler(number, frame)
        self._received = True
        print_line("\ninterrupted: ending at the next chunk boundary (press Ctrl-C again to end at once)")
