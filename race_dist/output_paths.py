"""Output paths: validation, atomic writes and private files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from race_dist.messages import short_repr


def check_output_file(file: Path, what: str = "the output", *, make_folder: bool = True) -> None:
    """Refuse a path that cannot be written as a regular file: a symbolic link, a folder, a device, or a path below something
    that is not a folder.

    Args:
        file: the file to create or replace.
        what: the option, named in the error. If empty, only the path is named.
        make_folder: whether the writer creates a missing parent folder.

    Raises:
        OSError: the path cannot be written; one sentence with the path.
    """
    _check(file, what, folder=False, make=make_folder)


def check_output_folder(folder: Path, what: str = "the output", *, follow: bool = False) -> None:
    """Refuse a path that cannot be a folder of output files: a symbolic link, or an existing file. OSError, one sentence.

    With ``follow`` a link to a folder is accepted: for folders in which files are stored but which are not replaced.
    """
    _check(folder.resolve() if follow and os.path.isdir(folder) else folder, what, folder=True, make=True)


def _check(path: Path, what: str, *, folder: bool, make: bool) -> None:
    obstacle = _obstacle(path, folder=folder, make=make)
    if obstacle is not None:
        raise type(obstacle)(f"{what} {short_repr(str(path))} {obstacle}".strip())


def _obstacle(path: Path, *, folder: bool, make: bool) -> OSError | None:
    """Why the path cannot be written, as words that follow its name; None if it can."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = 0
    except NotADirectoryError:
        return NotADirectoryError("lies in something that is no folder; choose another path")
    except (OSError, ValueError) as error:  # ValueError: a NUL
        return OSError(f"cannot be used: {getattr(error, 'strerror', None) or error}")
    if stat.S_ISLNK(mode):
        return FileExistsError(
            f"is a symbolic link to {short_repr(os.readlink(path))}: it is neither written through nor replaced; "
            "remove the link or name the file itself"
        )
    if mode and not folder and not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file but a device, pipe or socket"
        return FileExistsError(f"is {kind}; give the name of a file")
    if mode and folder and not stat.S_ISDIR(mode):
        return FileExistsError("is there and is no folder; choose another path")
    if mode and not os.access(path, os.W_OK):
        return PermissionError(f"may not be written: its mode is {stat.S_IMODE(mode):o}")
    parent = path.absolute().parent
    while make and not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return NotADirectoryError(
            f"lies in {short_repr(str(parent))}, which is no folder; choose another path"
            if os.path.lexists(parent)
            else f"lies in {short_repr(str(parent))}, which is not there; make the folder first"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        return PermissionError(f"lies in {short_repr(str(parent))}, which may not be written into")
    return None


@contextmanager
def atomic_write(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """A temporary path that replaces ``path`` when the block ends, after its bytes are on disk.

    After an error ``path`` is unchanged, and the temporary file is removed.

    Args:
        path: a file in an existing folder.
        mode: permissions that the temporary file is created with, empty, before the block writes into it. None: the block
            creates the file with default permissions.

    Raises:
        OSError: it cannot be written; the message names ``path``.
    """
    obstacle = _obstacle(path, folder=False, make=False)
    if obstacle is not None:
        raise type(obstacle)(f"{path} could not be written: it {obstacle}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if mode is not None:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode & 0o700))
            partial.chmod(mode)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        failed = OSError(f"{path} could not be written: {error.strerror or error}")
        failed.errno = error.errno
        raise failed from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_private(file: Path, text: str, *, executable: bool = False, what: str = "the output") -> Path:
    """Atomically write a text file that only its owner can read (mode 0600, or 0700).

    Raises:
        OSError: as :func:`check_output_file`, or the disk is full.
    """
    check_output_file(file, what)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file, mode=0o700 if executable else 0o600) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
