"""The launcher for one machine: starts the ranks of a run, forwards signals, and restarts the run when it fails."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from race_dist.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from race_dist.launch.rank_env import die_with_parent
from race_dist.rank_environment import LOOPBACK, STORE_FD_VARIABLE, without_rank_variables

_POLL = 0.05  # seconds
_GRACE = 10.0  # seconds after a rank failed in which the others may end by themselves and print their errors
_STOP_GRACE = 600.0  # seconds in which ranks that were signaled to stop may save
_LEAVE_GRACE = 30.0  # seconds in which the others end after the first rank that saved and ended
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_PR_SET_CHILD_SUBREAPER = 36
_BACKLOG = 2048  # connections that may wait before rank 0 accepts them


def under_launcher() -> bool:
    """Whether torchrun or another launcher started this process as a rank."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launch_ranks(arguments: Sequence[str], nproc: int, *, environment: Mapping[str, str] | None = None) -> int:
    """Run ``python ARGUMENTS`` as ``nproc`` ranks of this machine and wait for them.

    If a rank fails, the others are ended, and standard error names it. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C are forwarded to
    the ranks, which save and stop. The kernel ends the ranks with this process, however it ends.

    Args:
        arguments: of ``python``, for example ``["-m", "race_dist.cli", "train", ...]``.
        nproc: number of ranks.
        environment: further variables for the ranks.

    Returns:
        0, or the exit code of the first rank that failed; STOPPED (75) if the ranks were asked to stop and saved;
        INTERRUPTED (130) if Ctrl-C ended them.
    """
    ranks = _start(arguments, nproc, environment or {})
    with _received_signals() as received:
        try:
            return _wait(ranks, received)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(arguments: Sequence[str], nproc: int, environment: Mapping[str, str]) -> list[subprocess.Popen[bytes]]:
    # Rank 0 inherits this socket, so that no other process can take the port before rank 0 starts.
    with socket.create_server((LOOPBACK, 0), backlog=_BACKLOG) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        common = {
            **without_rank_variables(os.environ),
            **environment,
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
        }
        # The ranks share the cores: with one thread per core and rank they would slow each other down.
        common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
        ranks = []
        for rank in range(nproc):
            rank_environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            inherited = {STORE_FD_VARIABLE: str(number)} if rank == 0 else {}
            ranks.append(
                _spawn([sys.executable, *arguments], rank_environment | inherited, pass_fds=[number] if rank == 0 else [])
            )
    return ranks


def _spawn(command: Sequence[str], environment: Mapping[str, str], *, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a child process that the kernel ends with this one. It has its own process group, so that Ctrl-C reaches it once,
    forwarded by this process. (preexec_fn is safe here: launchers start no threads.)"""
    parent = os.getpid()
    return subprocess.Popen(
        command,
        env=dict(environment),
        process_group=0,
        pass_fds=pass_fds,
        preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait until all ranks have ended, or one has failed and the grace period of the others is over."""
    forwarded, deadline, first = 0, float("inf"), None
    while any(process.poll() is None for process in ranks):
        for number in received[forwarded:]:
            forwarded += 1
            deadline = min(deadline, time.monotonic() + _STOP_GRACE)
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)
        if first is None:
            first = _first_failure(ranks)
            if first is not None:
                deadline = time.monotonic() + (_LEAVE_GRACE if ranks[first].returncode == STOPPED else _GRACE)
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    first = _first_failure(ranks) if first is None else first
    if first is None:
        return INTERRUPTED if received and any(process.poll() is None for process in ranks) else 0
    code = ranks[first].returncode
    if code == STOPPED:
        return code
    if signal.SIGINT in received:
        print("interrupted; the ranks were ended", file=sys.stderr)
        return INTERRUPTED
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    print(f"rank {first} failed ({how}); the other ranks were ended", file=sys.stderr)
    return code if code > 0 else 1


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed first. Of several at once it is one that a signal ended, because that ended the others."""
    failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
    return min(failed, key=lambda rank: (ranks[rank].returncode > 0, rank)) if failed else None


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the signals that arrive while the block runs, instead of their default actions."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in _FORWARDED_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def supervise(
    words: Sequence[str],
    nproc: int,
    *,
    restarts: int,
    environment: Mapping[str, str],
    progress: Callable[[], object],
    python: str = sys.executable,
) -> int:
    """Run the launcher on this machine, and restart it when it or one of its ranks fails.

    Args:
        words: arguments of ``race-dist`` in each rank, which resumes from its newest checkpoint by itself.
        nproc: number of ranks.
        restarts: number of consecutive failures without progress after which to give up.
        environment: further variables for the ranks.
        progress: returns a value that changes when the run makes progress, for example the name of its newest checkpoint.
        python: the interpreter of the ranks.

    Returns:
        0 if the run succeeded; STOPPED (75) if this process was asked to stop and the run saved; USER_ERROR (2) at once for an
        error that the user must correct; otherwise the last exit code.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # ranks of a killed launcher become children of this process
    others = frozenset(_children())
    command = [python, "-m", "race_dist.launch.local", str(nproc), *words]
    failures, newest = 0, progress()
    first = newest
    with _received_signals() as received:
        while True:
            launcher = _spawn(command, {**os.environ, **environment})
            code = _wait_for_launcher(launcher, received)
            _end_orphans(others)
            now = progress()
            user_error = code == USER_ERROR and now == first  # after a checkpoint it is the machine: a full or missing disk
            if code == 0 or user_error:
                return code
            if received:
                return INTERRUPTED if signal.SIGINT in received and code != STOPPED else STOPPED
            failures, newest = (failures + 1 if now == newest else 1), now
            if failures > restarts:
                print(f"race-dist: {failures} failures without a new checkpoint; giving up", file=sys.stderr)
                return code if code > 0 else 128 - code
            how = "saved and stopped" if code == STOPPED else f"ended with {code}"
            print(f"race-dist: the run {how}; starting it again ({failures} of {restarts})", file=sys.stderr, flush=True)
            time.sleep(min(30.0, 2.0 ** (failures - 2)) if failures > 1 else 0.0)


def _wait_for_launcher(launcher: subprocess.Popen[bytes], received: list[int]) -> int:
    forwarded = 0
    while launcher.poll() is None:
        for number in received[forwarded:]:
            launcher.send_signal(number)
            forwarded += 1
        time.sleep(_POLL)
    return launcher.returncode


def _end_orphans(others: frozenset[int]) -> None:
    """Wait for ranks that a launcher left behind, which the kernel has killed. ``others`` are unrelated children."""
    deadline = time.monotonic() + _GRACE
    while orphans := [child for child in _children() if child not in others]:
        for child in orphans:
            with suppress(ChildProcessError, ProcessLookupError):
                if os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(_POLL)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def _main() -> None:
    """``python -m race_dist.launch.local N WORDS...``: the launcher that :func:`supervise` runs."""
    from race_dist.launch.command import RANK_MODULE

    sys.exit(launch_ranks(["-m", RANK_MODULE, *sys.argv[2:]], int(sys.argv[1])))


if __name__ == "__main__":
    _main()
