"""A program's partitions, which take turns, what they share, and what happened before what."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.emulated.values import Hazard, Value


class Deadlock(AssertionError):
    """Every partition waits for another."""


class Clock(dict[str, int]):
    """How much of each agent's doing is known: agents are partitions, their copies and their products."""

    def join(self, other: Clock) -> None:
        for agent, time in other.items():
            if time > self.get(agent, 0):
                self[agent] = time


class Agent:
    """One that reads and writes: a partition, or what works for it meanwhile."""

    def __init__(self, name: str, known: Clock) -> None:
        self.name, self.clock = name, Clock(known)
        self.step()

    def step(self) -> None:
        """Begin what nobody knows of yet."""
        self.clock[self.name] = self.clock.get(self.name, 0) + 1

    def learn(self, known: Clock) -> None:
        self.clock.join(known)
        self.step()


class Partition:
    """A warp group (or the loader's warp) of a program."""

    def __init__(self, name: str, known: Clock) -> None:
        self.name = name
        self.agent, self.products, self.tma_stores = (
            Agent(name + what, known) for what in ("", "'s products", "'s TMA stores")
        )
        self.tma_loads = self.stored = 0  # copies in; when the last copy out was asked for
        self.issued: list[int] = []  # when each matrix product was asked for
        self.unfenced: list[Buffer] = []
        self.waits_for: Callable[[], bool] | None = None
        self.why = ""
        self.turn = threading.Semaphore(0)
        self.done = False

    def begin(self, helper: Agent) -> Agent:
        """Ask a helper for something: it knows what the partition knows."""
        helper.learn(self.agent.clock)
        self.agent.step()
        return helper

    def start_tma_load(self) -> Agent:
        """A copy into shared memory: each ends by itself, at its barrier."""
        self.tma_loads += 1
        return self.begin(Agent(f"{self.name}'s TMA load {self.tma_loads}", Clock()))

    def fence(self) -> None:
        """Show what this partition stored to TMA and wgmma."""
        for buffer in self.unfenced:
            if buffer.unfenced_by is self:
                buffer.unfenced_by = None
        self.unfenced = []


class Buffer:
    """One buffer of shared memory and who touched it last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: tuple[str, int] | None = None
        self.reads: dict[str, int] = {}
        self.unfenced_by: Partition | None = None

    def read(self, agent: Agent, *, by_hardware: bool) -> None:
        """``by_hardware``: TMA or wgmma, to which ordinary stores show behind a fence alone."""
        if self.written is None:
            raise Hazard(f"{agent.name} reads {self.name}, which nobody has written")
        if by_hardware and self.unfenced_by is not None:
            raise Hazard(f"{agent.name} reads {self.name}, which {self.unfenced_by.name} stored without a fence since")
        self._after(self.written, agent, "reads", "writes")
        self.reads[agent.name] = agent.clock[agent.name]

    def write(self, agent: Agent, unfenced_by: Partition | None) -> None:
        self._after(self.written, agent, "writes", "writes")
        for read in self.reads.items():
            self._after(read, agent, "writes", "reads")
        self.reads, self.written, self.unfenced_by = {}, (agent.name, agent.clock[agent.name]), unfenced_by

    def _after(self, access: tuple[str, int] | None, agent: Agent, verb: str, other: str) -> None:
        if access is not None and access[1] > agent.clock.get(access[0], 0):
            raise Hazard(f"{agent.name} {verb} {self.name} while {access[0]} {other} it: nothing says which comes first")


class Shared:
    """A buffer of shared memory as a kernel sees it, or the buffers of a ring, of which :meth:`index` gives one."""

    def __init__(self, x: Tensor, name: str, buffer: Buffer | None = None) -> None:
        self.x, self.name, self._buffer = x, name, buffer
        self._stages: dict[int, Shared] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def buffer(self) -> Buffer:
        assert not self._stages, f"{self.name} is used whole and in stages"
        if self._buffer is None:
            self._buffer = Buffer(self.name)
        return self._buffer

    def index(self, n: Any) -> Shared:
        n = int(n)
        assert self._buffer is None, f"{self.name} is used whole and in stages"
        assert 0 <= n < len(self.x), f"{self.name}: buffer {n} of {len(self.x)}"
        if n not in self._stages:
            self._stages[n] = Shared(self.x[n], f"{self.name}, buffer {n}")
        return self._stages[n]

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.x.permute(order), self.name, self.buffer)

    def load(self, layout: Any = None) -> Value:
        self.buffer.read(current().partition.agent, by_hardware=False)
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        partition = current().partition
        assert (value.shape, value.dtype) == (self.shape, self.x.dtype), (value.shape, value.dtype, self.shape, self.x.dtype)
        self.buffer.write(partition.agent, partition)
        partition.unfenced.append(self.buffer)
        self.x.copy_(value.read())


class Barrier:
    """An mbarrier: a phase ends when ``count`` arrived and all bytes that are expected are there."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.phase, self.missing, self.bytes = name, 0, 0, 0, 0
        self.arriving, self.passed, self.waits = Clock(), Clock(), 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, agent: Agent, count: int = 1, expected: int = 0) -> None:
        if self.missing < count:
            raise Hazard(f"{agent.name} arrives at {self.name} more often than its phase has arrivals ({self.count})")
        self.missing -= count
        self._bring(agent, -expected)

    def bring(self, agent: Agent, size: int) -> None:
        """Bytes that a copy has brought."""
        self._bring(agent, size)

    def _bring(self, agent: Agent, size: int) -> None:
        self.bytes += size
        self.arriving.join(agent.clock)
        agent.step()
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.passed.join(self.arriving)
            self.arriving = Clock()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended: the one before, if the parity is not the present one's."""
        self.waits += 1
        machine = current()
        partition = machine.partition
        if partition.issued and partition.issued[-1] > partition.agent.clock.get(partition.products.name, 0):
            raise Hazard(
                f"{partition.name} waits at {self.name} with products in flight: the compiler then runs them one by one"
            )
        machine.wait(lambda: self.phase & 1 != parity, f"{self.name} in phase {self.phase}")
        machine.partition.agent.learn(self.passed)


class Machine:
    """One program of a grid: partitions run one at a time, each until it waits. ``seed``: whose turn it is then."""

    def __init__(self, program: int, seed: int) -> None:
        self.program = program
        self.generator = torch.Generator().manual_seed(seed)
        self.partition = Partition("the program", Clock())
        self.partitions = [self.partition]
        self.barriers: list[Barrier] = []
        self.error: BaseException | None = None

    def run(self, kernel: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _running.append(self)
        try:
            kernel(*arguments)
            self._check_end()
        finally:
            _running.pop()

    def _check_end(self) -> None:
        for partition in self.partitions:
            if partition.stored > partition.agent.clock.get(partition.tma_stores.name, 0):
                raise Hazard(
                    f"{partition.name} ends while its last TMA store still reads shared memory: tma.store_wait is missing"
                )

    def specialize(self, jobs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the partitions to their ends, the first on the program's own warps."""
        program, (function, arguments) = self.partition, jobs[0]
        self.partition, *workers = self.partitions = [Partition(job[0].__name__, program.agent.clock) for job in jobs]
        threads = [
            threading.Thread(target=self._work, args=(partition, *job), daemon=True)
            for partition, job in zip(workers, jobs[1:])
        ]
        for thread in threads:
            thread.start()
        try:
            function(*arguments)
            self.wait(lambda: all(partition.done for partition in workers), "its end")
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            for partition in workers:  # those that an error left waiting
                partition.turn.release()
            for thread in threads:
                thread.join()

    def _work(self, partition: Partition, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        partition.turn.acquire()
        self.partition = partition
        try:
            if self.error is None:
                function(*arguments)
        except BaseException as error:
            self.error = self.error or error  # raised by the first partition, whose turn it is then
        partition.done = True
        self._next(partition).turn.release()

    def wait(self, ready: Callable[[], bool], why: str) -> None:
        """Let others go on until ``ready``."""
        partition = self.partition
        partition.waits_for, partition.why = ready, why
        chosen = self._next(partition)
        if chosen is not partition:
            chosen.turn.release()
            partition.turn.acquire()
            self.partition = partition
        if self.error is not None:
            raise self.error
        partition.waits_for = None

    def _next(self, partition: Partition) -> Partition:
        """Whose turn it is; after an error, the first partition's, who raises it."""
        able = [p for p in self.partitions if not p.done and (p.waits_for is None or p.waits_for())]
        if not able:
            waiting = "; ".join(f"{p.name} at {p.why}" for p in self.partitions if not p.done)
            self.error = self.error or Deadlock(f"every partition waits: {waiting}")
        if self.error is not None:
            return self.partitions[0]
        return able[int(torch.randint(len(able), (1,), generator=self.generator))]


_running: list[Machine] = []


def current() -> Machine:
    """The machine whose program is running."""
    return _running[-1]


def line_of_kernel() -> str:
    """The line of a kernel's file that runs now, as ``file:line``, followed by that of a helper in ``pipeline.py``."""
    frame, inner = sys._getframe(2), ""
    while frame.f_code.co_filename.endswith("/pipeline.py") and frame.f_back is not None:
        inner, frame = f" (pipeline.py:{frame.f_lineno})", frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}{inner}"
