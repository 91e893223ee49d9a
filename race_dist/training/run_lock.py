"""The lock of a run's folder: one process writes there. The lock ends with its process, however that ends.

The kernel holds the lock (``flock``), so a killed process leaves no lock behind. The lock file names the process: host, process
id, start time. Most network file systems pass such locks on to other nodes. Some do not (Lustre and NFS mounted with local
locks): there the owner updates the file's modification time every few seconds (a heartbeat), and a lock without a heartbeat is
stale.
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
_HEARTBEAT = 5.0  # seconds between two heartbeats, where the kernel's lock does not reach other nodes
_RETRY = 1.0  # seconds: another process may just be checking whether the folder is in use
_EXIT_GRACE = 30.0  # seconds that the kernel may take to clean up a dead process of this host
_LEASE = 100.0  # seconds after which a file server releases the locks of a failed node
_LOCAL_LOCKS = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("local_lock=all", "local_lock=flock"),
    "lustre": ("localflock", "noflock"),
}


class RunInUse(OSError):
    """Another process uses the folder; the message names it."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host, boot, pids: the machine's name, its boot id and its PID namespace.
        pid, ticks: the process id, and the process's start time, because ids are reused.
        since: when it acquired the lock, ISO 8601.
    """

    host: str
    boot: str
    pids: str
    pid: int
    ticks: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """This process, from now on."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(platform.node(), *_machine(), os.getpid(), _ticks(os.getpid()), now)

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine and PID namespace."""
        return (self.boot, self.pids) == _machine()

    @property
    def alive(self) -> bool:
        """Whether the process is running, if it is one of this machine."""
        return bool(self.ticks) and _ticks(self.pid) == self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of a run's folder.

        with RunLock(folder):
            ...

    Args:
        folder: of the run; created if it does not exist.

    Raises:
        RunInUse: on entering, if another process holds the lock; the message names the folder and the process.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / LOCK
        self._fd: int | None = None
        self._stop = threading.Event()

    def acquire(self) -> RunLock:
        """Acquire the lock, unless this object holds it already."""
        if self._fd is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = _open(self._file, os.O_RDWR | os.O_CREAT)
        try:
            is_global = self._wait(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, (json.dumps(asdict(Owner.this_process())) + "\n").encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._stop.clear()
        if not is_global:
            threading.Thread(target=self._send_heartbeats, name="race-dist-run-lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Release the lock."""
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
        """Wait for the lock; returns whether it also excludes processes on other nodes."""
        start = time.monotonic()
        while (locked := _flock(fd, fcntl.LOCK_EX)) is False:
            owner, waited = _read(fd), time.monotonic() - start
            limit = _RETRY
            if owner is not None and not (owner.here and owner.alive):
                limit = _EXIT_GRACE if owner.here else _LEASE
            if waited > limit:
                raise RunInUse(_sentence(self.folder, owner))
            time.sleep(0.1)
        owner = _read(fd)
        is_global = bool(locked) and not _locks_are_local(self._file)
        if owner is None or is_global:
            return is_global
        if (owner.alive if owner.here else _has_heartbeat(fd)) and owner.pid != os.getpid():
            raise RunInUse(_sentence(self.folder, owner))
        return is_global

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            fd = self._fd
            if fd is None:
                return
            with contextlib.suppress(OSError):
                os.utime(fd)


def check_not_in_use(folder: Path) -> None:
    """Raise RunInUse if another process uses the folder. Changes nothing; a folder that does not exist is free."""
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
    """Whether this process got the lock; None if the file system has no locks."""
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


def _has_heartbeat(fd: int) -> bool:
    """Whether an owner on another node sends heartbeats: observed for some of them, by the file server's clock."""
    first, deadline = os.fstat(fd).st_mtime_ns, time.monotonic() + 4 * _HEARTBEAT
    while time.monotonic() < deadline:
        if os.fstat(fd).st_mtime_ns != first:
            return True
        time.sleep(_HEARTBEAT / 10)
    return False


def _locks_are_local(file: Path) -> bool:
    """Whether the file is on a network file system whose locks are local to a node."""
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
    """The boot id and the PID namespace; a container has its own namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return platform.node(), ""


def _ticks(pid: int) -> str:
    """Start time of a process; empty if it does not exist or is a zombie."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
