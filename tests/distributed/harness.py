"""Run test functions on several ranks; the processes start once and run many cases.

    def case(group, factor):               # a function at the top of a test module; runs on every rank
        x = torch.full((), factor * (dist.get_rank(group) + 1.0))
        dist.all_reduce(x, group=group)
        return x

    def test_sum():
        assert run_ranks(3, case, 2.0)[0] == 12.0

``run_ranks`` uses one pool of processes (gloo, one thread each) that lives as long as the test process; a world of W
is its first W processes and a process group over them. ``spawn_ranks`` starts fresh processes, for tests in which one
dies.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import importlib
import multiprocessing as mp
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_WORLD = 5
GROUP_TIMEOUT = 60.0  # seconds: timeout of collectives
CASE_TIMEOUT = 240.0  # seconds: timeout of a case


class RankError(AssertionError):
    """A case raised on some rank. ``errors[rank]`` is the traceback's text, None where it returned."""

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {r} ---\n{e}" for r, e in enumerate(errors) if e is not None))


@dataclass
class Outcome:
    """The end of a process of :func:`spawn_ranks`: its return value, the text of its exception, its exit code."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """``[fn(group, *args, **kwargs) of each rank]``, or RankError if it raised on any.

    ``fn`` is a function at the top level of an importable module; arguments and results are pickled.
    """
    pool = _Pool.running()
    if not 1 <= world <= MAX_WORLD:
        raise ValueError(f"world must be 1 to {MAX_WORLD}; got {world}")
    outcomes = pool.run(world, fn, args, kwargs)
    errors = [o.error for o in outcomes]
    if any(errors):
        if not all(errors):
            pool.close()  # a rank may still be in a collective of this case
        raise RankError(errors)
    return [o.value for o in outcomes]


def spawn_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 20.0, cuda: bool = False) -> list[Outcome]:
    """Run ``fn(group, *args)`` in ``world`` fresh processes whose collectives time out after ``timeout`` seconds.

    With ``cuda`` each has a device of its own and groups talk over NCCL too.
    """
    pool = _Pool(world, timeout, cuda)
    try:
        return pool.run(world, fn, args, {})
    finally:
        pool.close(kill=True)


class _Pool:
    _instance: _Pool | None = None

    @classmethod
    def running(cls) -> _Pool:
        if cls._instance is None or cls._instance.closed:
            cls._instance = cls(MAX_WORLD, GROUP_TIMEOUT)
        return cls._instance

    def __init__(self, world: int, timeout: float, cuda: bool = False) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = mp.get_context("forkserver")  # imports once, then forks: processes start in milliseconds
        context.set_forkserver_preload(["torch", "torch.distributed", "race_dist.attention", "race_dist.parallel.attention"])
        port = _free_port()
        self.closed = False
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, rank, world, port, timeout, cuda), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.close)

    def run(self, world: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Outcome]:
        job = pickle.dumps((world, fn.__module__, fn.__qualname__, args, kwargs))
        for pipe in self.pipes:
            pipe.send(list(sys.path))
            pipe.send_bytes(job)
        outcomes = [Outcome() for _ in range(world)]
        pending = {self.pipes[r]: r for r in range(world)}
        while pending:
            ready = wait(list(pending), CASE_TIMEOUT)
            if not ready:
                for rank in pending.values():
                    outcomes[rank].error = f"no answer within {CASE_TIMEOUT} s"
                self.close(kill=True)
                break
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[call-overload]
                try:
                    outcomes[rank].value, outcomes[rank].error = pickle.loads(pipe.recv_bytes())  # noqa: S301
                except EOFError:
                    self.processes[rank].join(10)
                    outcomes[rank].exitcode = self.processes[rank].exitcode
                    outcomes[rank].error = f"the process ended with exit code {outcomes[rank].exitcode}"
        return outcomes

    def close(self, *, kill: bool = False) -> None:
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                if not kill:
                    pipe.send(None)
                pipe.close()
        for process in self.processes:
            process.join(0 if kill else 10)
            if process.is_alive():
                process.kill()
                process.join(10)


def _worker(pipe: Connection, rank: int, world: int, port: int, timeout: float, cuda: bool) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    seconds = datetime.timedelta(seconds=timeout)
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=seconds)
    groups = {w: dist.new_group(list(range(w)), timeout=seconds) for w in range(1, world)}
    groups[world] = dist.group.WORLD
    while (path := pipe.recv()) is not None:
        sys.path[:] = path
        size, module, name, args, kwargs = pickle.loads(pipe.recv_bytes())  # noqa: S301
        if rank >= size:
            continue
        try:
            torch.manual_seed(0)
            result = (getattr(importlib.import_module(module), name)(groups[size], *args, **kwargs), None)
        except BaseException:
            result = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))
    from race_dist.distributed.watchdog import stop_watchdog

    stop_watchdog()
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
