"""Files that a command is asked to write: where they may go, and who may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def check_output_file(file: Path, what: str = "the output") -> None:
    """Refuse a place for a file where writing would do something else: a link (to whatever it points to), a folder, a device,
    or a folder above it that is none.

    Args:
        file: to be written, or written anew.
        what: the option, named in the error.

    Raises:
        OSError: it cannot be written as a file of its own; one sentence with the path.
    """
    _check(file, what, folder=False)


def check_output_folder(folder: Path, what: str = "the output") -> None:
    """The same for a folder of files: refuses a link and everything that is there and no folder. OSError, one sentence."""
    _check(folder, what, folder=True)


def _check(path: Path, what: str, *, folder: bool) -> None:
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        found = 0
    except NotADirectoryError:
        raise NotADirectoryError(f"{what} {path} lies in something that is no folder; choose another path") from None
    except OSError as error:
        raise OSError(f"{what} {str(path)[:200]} cannot be used: {error.strerror}") from None
    if stat.S_ISLNK(found):
        raise FileExistsError(f"{what} {path} is a symbolic link to {os.readlink(path)}: it is neither written through nor "
                              "replaced; remove the link or name the file itself")
    if found and not folder and not stat.S_ISREG(found):
        kind = "a folder" if stat.S_ISDIR(found) else "no ordinary file but a device, pipe or socket"
        raise FileExistsError(f"{what} {path} is {kind}; name a file")
    if found and folder and not stat.S_ISDIR(found):
        raise FileExistsError(f"{what} {path} is there and is no folder; choose another path")
    if found and not os.access(path, os.W_OK):
        raise PermissionError(f"{what} {path} cannot be written: its mode is {stat.S_IMODE(found):o}")
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{what} {path} lies in {parent}, which is no folder; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} {path} cannot be written: {parent} is not writable")


def write_private(file: Path, text: str, *, executable: bool = False, what: str = "the output") -> Path:
    """Write a text file that only its owner can read (mode 0600, or 0700); it appears when it is complete.

    Raises:
        OSError: as :func:`check_output_file`, or the disk is full.
    """
    check_output_file(file, what)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
        partial.chmod(0o700 if executable else 0o600)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file
