"""Caches of compiled kernels: on the node's local disk, in a folder that only its user can write to."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


def use_local_caches(environment: MutableMapping[str, str]) -> None:
    """Set the cache variables of Triton, Inductor and CUDA to a folder per user under RACE_DIST_CACHE on the local disk.

    Variables that are already set are kept. Files in the cache are loaded as code, so the folder must belong to this user, and
    no other user may be able to write to it or to a folder above it. If the usual folder does not meet this, another folder
    is created and its path is printed.

    Raises:
        ValueError: no folder can be created.
    """
    root = environment.get("RACE_DIST_CACHE", "")
    wanted = [name for name in _CACHES if name not in environment]
    if not root or not wanted:
        return
    folder = private_folder(Path(root))
    for name in wanted:
        environment[name] = str(_make_private(folder / _CACHES[name]))


def private_folder(root: Path) -> Path:
    """``ROOT/UID``, or another folder if that one does not belong to this user alone or cannot be created.

    Raises:
        ValueError: no folder can be created.
    """
    root, user, reasons = root.absolute(), str(os.getuid()), []
    common = Path(tempfile.gettempdir()).absolute() / f"race-dist-cache-{user}"
    for candidate in (root / user, root.with_name(f"{root.name}-{user}"), common):
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            _check_above(candidate.parent)
            _make_private(candidate)
            for part in _CACHES.values():
                _make_private(candidate / part)
        except OSError as error:
            reasons.append(str(error))
            continue
        if reasons:
            _report(f"compiled kernels are kept in {candidate}: {reasons[0]}")
        return candidate
    try:
        made = Path(tempfile.mkdtemp(prefix=f"race-dist-cache-{user}-"))
    except OSError as error:
        raise ValueError(
            f"no folder for compiled kernels can be made in RACE_DIST_CACHE={root} ({'; '.join(reasons)}; "
            f"{error}): set the job's cache to a folder of your own"
        ) from None
    _report(f"compiled kernels are kept in {made} for this process alone: {reasons[0]}")
    return made


def _report(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node
        print(f"race-dist: {text}", file=sys.stderr)


def _make_private(folder: Path) -> Path:
    """Create a folder with mode 0700, or check that the existing one can be trusted. OSError if it cannot."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"the cache {folder} is {'a symbolic link' if stat.S_ISLNK(status.st_mode) else 'no folder'}")
    if status.st_uid != os.getuid():
        raise OSError(f"the cache {folder} belongs to another user ({status.st_uid})")
    if status.st_mode & 0o022:
        raise OSError(f"the cache {folder} may be written by others (mode {stat.S_IMODE(status.st_mode):o})")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"the cache {folder} cannot be written")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _check_above(folder: Path) -> None:
    """OSError if another user could replace this folder or one above it."""
    resolved = folder.resolve()
    for parent in (resolved, *resolved.parents):
        status = parent.stat()
        if status.st_uid not in (0, os.getuid(), _unmapped_user()):
            raise OSError(f"the cache's folder {parent} belongs to another user ({status.st_uid})")
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise OSError(f"others may write to the cache's folder {parent} (mode {stat.S_IMODE(status.st_mode):o})")


def _unmapped_user() -> int:
    """The user id that a container with mapped users shows for folders of the host's root; -1 if users are not mapped."""
    try:
        if Path("/proc/self/uid_map").read_text(encoding="ascii").split() == ["0", "0", "4294967295"]:
            return -1
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return -1
