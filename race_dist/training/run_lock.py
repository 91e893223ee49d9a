"""One owner of a run's folder: a lock that ends with its process, however that ends, and says who holds it.

The kernel holds the lock (``flock``), so a process that was killed leaves none behind. The file says which process has it:
host, process id, since when. Network file systems pass such locks on to other nodes, but for some (Lustre and NFS mounted
with local locks), where nodes see the file only: there its owner touches the file every few seconds, and one that nobody
touches any more is left over.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOCK = ".run.lock"
_BEAT = 5.0  # seconds between two touches where the kernel's lock does not reach other nodes
_RETRIES = 1.0  # seconds: somebody may just be looking whether the folder is in use
_DYING = 30.0  # seconds in which a process of this host that has died may still be taken down
_LEASE = 100.0  # seconds after which a file server lets go of what a node that is gone had locked
_LOCAL_LOCKS = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("local_lock=all", "local_lock=flock"),
    "lustre": ("localflock", "noflock"),
}


class RunInUse(OSError):
    """Another process works on the folder; the message names it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host, boot, pids: of the machine: its name, its start and its space of process ids.
        pid, ticks: of the process: its id and when the machine started it, as ids are used again.
        since: when it took the lock, ISO 8601.
    """

    host: str
    boot: str
    pids: str
    pid: int
    ticks: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """Of this process, from now on."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(platform.node(), *_machine(), os.getpid(), _ticks(os.getpid()), now)

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine, among those that this one sees."""
        return (self.boot, self.pids) == _machine()

    @property
    def alive(self) -> bool:
        """Of a process of this machine: whether it runs."""
        return bool(self.ticks) and _ticks(self.pid) == self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of a run's folder.

        with RunLock(folder):
            ...

    Args:
        folder: of the run; made where it is not there.

    Raises:
        RunInUse: on entering, another process has it; the message names the folder and the process.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / LOCK
        self._fd: int | None = None
        self._stop = threading.Event()

    def acquire(self) -> RunLock:
        """Take the lock; a lock of this object is taken once."""
        if self._fd is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = _open(self._file, os.O_RDWR | os.O_CREAT)
        try:
            reaches_others = self._wait(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, (json.dumps(asdict(Owner.this_process())) + "\n").encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._stop.clear()
        if not reaches_others:
            threading.Thread(target=self._touch, name="race-dist-run-lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Let go of it."""
        if self._fd is None:
            return
        self._stop.set()
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        os.close(fd)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _wait(self, fd: int) -> bool:
        """Until the lock is this process's; whether it holds on other nodes too."""
        began = time.monotonic()
        while (locked := _flock(fd, fcntl.LOCK_EX)) is False:
            owner, waited = _read(fd), time.monotonic() - began
            limit = _RETRIES
            if owner is not None and not (owner.here and owner.alive):
                limit = _DYING if owner.here else _LEASE
            if waited > limit:
                raise RunInUse(_sentence(self.folder, owner))
            time.sleep(0.1)
        owner = _read(fd)
        reaches_others = bool(locked) and not _locks_are_local(self._file)
        if owner is None or reaches_others:
            return reaches_others
        if (owner.alive if owner.here else _touched(fd)) and owner.pid != os.getpid():
            raise RunInUse(_sentence(self.folder, owner))
        return reaches_others

    def _touch(self) -> None:
        while not self._stop.wait(_BEAT):
            fd = self._fd
            if fd is None:
                return
            with contextlib.suppress(OSError):
                os.utime(fd)


def check_not_in_use(folder: Path) -> None:
    """Raise RunInUse where another process works on the folder now. Changes nothing; a folder that is not there is free."""
    try:
        fd = _open(folder / LOCK, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        owner = _read(fd)
        if owner is None or (owner.here and owner.pid == os.getpid()):
            return
        if _flock(fd, fcntl.LOCK_SH) is False or (owner.here and owner.alive):
            raise RunInUse(_sentence(folder, owner))
    finally:
        os.close(fd)


def _sentence(folder: Path, owner: Owner | None) -> str:
    who = str(owner) if owner is not None else "another process"
    return f"{folder} is in use: a run is going on there ({who}); wait for it, stop it, or choose another name"


def _open(file: Path, flags: int) -> int:
    try:
        return os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{file} is a symbolic link, and a run's lock must not be one: remove it") from None
        raise


def _flock(fd: int, kind: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def _read(fd: int) -> Owner | None:
    try:
        tree: dict[str, Any] = json.loads(os.pread(fd, 4096, 0))
        fields: dict[str, Any] = {n: (int if n == "pid" else str)(tree[n]) for n in Owner.__dataclass_fields__}
        return Owner(**fields)
    except (ValueError, KeyError, TypeError):
        return None


def _touched(fd: int) -> bool:
    """Whether its owner on another node still touches the file: looked at for some beats, by the file server's own clock."""
    first, deadline = os.fstat(fd).st_mtime_ns, time.monotonic() + 4 * _BEAT
    while time.monotonic() < deadline:
        if os.fstat(fd).st_mtime_ns != first:
            return True
        time.sleep(_BEAT / 10)
    return False


def _locks_are_local(file: Path) -> bool:
    """Whether the file lies on a network file system whose locks stay on one node."""
    best, kind, options = "", "", ""
    path = str(file.resolve())
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, where, this_kind, these, *_ = line.split()
            where = where.replace("\\040", " ")
            if (path == where or path.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
                best, kind, options = where, this_kind, these
    return not set(_LOCAL_LOCKS.get(kind, ())).isdisjoint(options.split(","))


def _machine() -> tuple[str, str]:
    """The machine's start and its space of process ids; a container has one of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node(), ""


def _ticks(pid: int) -> str:
    """When the machine started a process; empty where there is none, or one that has ended and waits to be taken away."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
