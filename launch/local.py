"""Starting the ranks of a run on this machine, without a launcher in front of the command, and keeping them running."""

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
_GRACE = 10.0  # seconds in which the ranks beside one that failed may end by themselves, saying what they saw
_STOP_GRACE = 600.0  # seconds in which ranks that were told to stop may save
_LEAVE_GRACE = 30.0  # seconds in which the others leave after the first that has saved and left
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_PR_SET_CHILD_SUBREAPER = 36
_BACKLOG = 2048  # ranks that may knock before rank 0 answers


def under_launcher() -> bool:
    """Whether a launcher (torchrun or one like it) has already made this process one rank of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launch_ranks(arguments: Sequence[str], nproc: int, *, environment: Mapping[str, str] | None = None) -> int:
    """Run ``python ARGUMENTS`` as ``nproc`` ranks of this machine and wait for them.

    A rank that fails ends the others; which one it was is said on the error stream. SIGTERM, SIGUSR1, SIGUSR2 and an
    interrupt go on to the ranks, which save and stop. The ranks do not outlive this process, however it ends.

    Args:
        arguments: what follows ``python``, for example ``["-m", "race_dist.cli", "train", ...]``.
        nproc: number of ranks.
        environment: further variables for the ranks.

    Returns:
        0, or the exit code of the rank that failed first; 75 where the ranks saved and stopped because they were told to;
        130 where an interrupt ended them.
    """
    ranks = _start(arguments, nproc, environment or {})
    with _signals() as heard:
        try:
            return _wait(ranks, heard)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(arguments: Sequence[str], nproc: int, environment: Mapping[str, str]) -> list[subprocess.Popen[bytes]]:
    # Rank 0 takes over this socket: between choosing a port and rank 0's start nobody else can come to hold it.
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
        # One machine's cores are shared out: ranks that each start a thread per core only get in each other's way.
        common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
        ranks = []
        for rank in range(nproc):
            mine = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            held = {STORE_FD_VARIABLE: str(number)} if rank == 0 else {}
            ranks.append(_spawn([sys.executable, *arguments], mine | held, pass_fds=[number] if rank == 0 else []))
    return ranks


def _spawn(command: Sequence[str], environment: Mapping[str, str], *, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """A child with this environment that the kernel ends with this process, in a process group of its own: an interrupt from
    the keyboard reaches it by way of this process only, and so once. (preexec_fn is safe here: launchers start no threads.)"""
    parent = os.getpid()
    return subprocess.Popen(
        command,
        env=dict(environment),
        process_group=0,
        pass_fds=pass_fds,
        preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], heard: list[int]) -> int:
    """Until all have ended, or one has failed and the others had their time."""
    told, deadline, first = 0, float("inf"), None
    while any(process.poll() is None for process in ranks):
        for number in heard[told:]:
            told += 1
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
        return INTERRUPTED if heard and any(process.poll() is None for process in ranks) else 0
    code = ranks[first].returncode
    if code == STOPPED:
        return code
    if signal.SIGINT in heard:
        print("interrupted; the ranks were ended", file=sys.stderr)
        return INTERRUPTED
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    print(f"rank {first} failed ({how}); the other ranks were ended", file=sys.stderr)
    return code if code > 0 else 1


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Which rank failed; of several at once one that a signal ended, as that one took the others with it."""
    failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
    return min(failed, key=lambda rank: (ranks[rank].returncode > 0, rank)) if failed else None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that arrive while the block runs, instead of what they would do."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in _PASSED_ON}
    try:
        yield heard
    finally:
        for number, handler in before.items():
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
    """Keep a run going on this machine: start its launcher, and start it again when it or a rank of it fails.

    Args:
        words: what follows ``race-dist`` in each rank; it must find its own newest checkpoint.
        nproc: number of ranks.
        restarts: failures in a row without progress after which it gives up.
        environment: further variables for the ranks.
        progress: what changes when the run gets further, for example the name of its newest checkpoint.
        python: the interpreter of the ranks.

    Returns:
        0 when the run has ended well; 75 when it saved and stopped because this process was told to; 2 at once for a
        mistake of the user's, which starting again would not mend; else the last exit code.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # ranks whose launcher dies become children of this process
    before = frozenset(_children())
    command = [python, "-m", "race_dist.launch.local", str(nproc), *words]
    failures, seen = 0, progress()
    first = seen
    with _signals() as heard:
        while True:
            launcher = _spawn(command, {**os.environ, **environment})
            code = _attend(launcher, heard)
            _end_orphans(before)
            now = progress()
            mistaken = code == USER_ERROR and now == first  # later it is the machine's: a disk that is full or gone
            if code == 0 or mistaken:
                return code
            if heard:
                return INTERRUPTED if signal.SIGINT in heard and code != STOPPED else STOPPED
            failures, seen = (failures + 1 if now == seen else 1), now
            if failures > restarts:
                print(f"race-dist: {failures} failures without a new checkpoint; giving up", file=sys.stderr)
                return code if code > 0 else 128 - code
            how = "saved and stopped" if code == STOPPED else f"ended with {code}"
            print(f"race-dist: the run {how}; starting it again ({failures} of {restarts})", file=sys.stderr, flush=True)
            time.sleep(min(30.0, 2.0 ** (failures - 2)) if failures > 1 else 0.0)


def _attend(launcher: subprocess.Popen[bytes], heard: list[int]) -> int:
    told = 0
    while launcher.poll() is None:
        for number in heard[told:]:
            launcher.send_signal(number)
            told += 1
        time.sleep(_POLL)
    return launcher.returncode


def _end_orphans(before: frozenset[int]) -> None:
    """Wait for processes that a launcher left behind; the kernel has told them to end. Children of ``before`` are not ours."""
    deadline = time.monotonic() + _GRACE
    while orphans := [child for child in _children() if child not in before]:
        for child in orphans:
            with suppress(ChildProcessError, ProcessLookupError):
                if os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(_POLL)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def _main() -> None:
    """``python -m race_dist.launch.local N WORDS...``: the launcher that :func:`supervise` starts."""
    from race_dist.launch.command import RANK_MODULE

    sys.exit(launch_ranks(["-m", RANK_MODULE, *sys.argv[2:]], int(sys.argv[1])))


if __name__ == "__main__":
    _main()
