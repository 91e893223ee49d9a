"""Finding and reading the text files of a folder. Files that are skipped are counted and named."""

from __future__ import annotations

import codecs
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

STDLIB = "python-stdlib"
_NOT_TEXT = frozenset({"site-packages", "dist-packages", "__pycache__"})  # folders of installed or compiled code
_NAMED = 3  # skipped files that are named; the rest is counted
_PIECE = 2**24


class Undecodable(ValueError):
    """A file is not UTF-8 text."""


@dataclass
class SkippedFiles:
    """Files and folders that were not read, with reasons."""

    names: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: Path, why: str) -> None:
        """Add a file or folder."""
        self.names.append((printable(path), why))

    def __bool__(self) -> bool:
        return bool(self.names)

    def describe(self, begin: str = "left out") -> str:
        """One line that names some files, ``"left out: NAME (REASON), ... and 5 more"``; empty if nothing was skipped."""
        if not self.names:
            return ""
        shown = ", ".join(f"{name} ({why})" for name, why in sorted(self.names)[:_NAMED])
        more = f" and {len(self.names) - _NAMED:,} more" if len(self.names) > _NAMED else ""
        return f"{begin}: {shown}{more}"


def printable(path: str | Path) -> str:
    """A path as UTF-8 text; other bytes are escaped (``caf\\xe9``)."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def expand_home(path: str, option: str = "data.path") -> Path:
    """Expand ``~`` or ``~USER``. Raises ValueError, naming ``option``, if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{option}: {path!r} begins with a home folder that is not there: write the whole path") from None


def check_pattern(path: str, pattern: str) -> None:
    """Raise ValueError for a pattern that matches no names, or that does not apply to ``path``."""
    if not pattern.strip("/."):
        raise ValueError(f'data.pattern = {pattern!r} names no files; give a pattern such as "*.txt", or "*" for all')
    if pattern == "*":
        return
    source = Path(path).expanduser()
    if path == STDLIB and pattern != "*.py":
        raise ValueError(f"data.pattern = {pattern!r} does not go with {STDLIB}, whose *.py files are read; leave it out")
    if path != STDLIB and source.is_file() and not source.match(pattern):
        raise ValueError(f"data.pattern = {pattern!r} does not match the file {source}; leave it out, or give the folder")


def find_texts(root: Path, pattern: str) -> tuple[list[Path], SkippedFiles]:
    """The files under ``root`` whose names match, in the order of their relative paths, which is the same on every machine.

    Symbolic links to folders are followed. Each folder is read once, by its own path rather than by a link. Hidden files and
    folders, folders of installed or compiled Python code, and special files are skipped.

    Args:
        root: a folder.
        pattern: of file names.

    Returns:
        The files, and what was skipped although its name matches.

    Raises:
        PermissionError: a folder cannot be listed; the message names it.
        ValueError: no file's name matches.
    """
    skipped = SkippedFiles()
    files = []
    for file in _entries(root, pattern, skipped):
        why = _unusable(file)
        if why is None:
            files.append(file)
        else:
            skipped.add(file, why)
    if not files:
        none = (
            f"no file in {printable(root)} matches the pattern {pattern!r}"
            if pattern != "*"
            else f"there is no file in {printable(root)}"
        )
        raise ValueError(
            f"no text was found: {none}{skipped.describe('; left out')}; give a text file, or a folder and a pattern"
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), skipped


def _entries(root: Path, pattern: str, skipped: SkippedFiles) -> Iterator[Path]:
    """Matching entries that are not folders, in ``root`` and the folders below it; linked folders come last."""
    seen, folders, links = set[tuple[int, int]](), [root], list[Path]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        state = folder.stat()
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in _listing(folder):
            path = folder / entry.name
            is_folder = _is_folder(entry)
            if not is_folder and not path.match(pattern) and not (entry.is_symlink() and not os.path.exists(path)):
                continue  # a dangling link may have been a folder: report it whatever its name
            if entry.name.startswith("."):
                skipped.add(path, "hidden")
            elif not is_folder:
                yield path
            elif entry.name in _NOT_TEXT:
                skipped.add(path, "installed or compiled code")
            else:
                (links if entry.is_symlink() else folders).append(path)


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            return list(listing)
    except OSError as error:
        raise PermissionError(
            f"the folder {printable(folder)} cannot be listed ({error.strerror}); make it readable, or "
            "move it out of the text's folder"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _unusable(file: Path) -> str | None:
    """Why a directory entry cannot be read as a file; None if it can."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        return str(error.strerror)
    return None if stat.S_ISREG(mode) else "no regular file"


def stdlib_texts() -> list[Path]:
    """The source files of the running Python's standard library, in order."""
    return find_texts(Path(sysconfig.get_paths()["stdlib"]), "*.py")[0]


def utf8_pieces(source: Path, piece: int = _PIECE) -> Iterator[bytes]:
    """The file's bytes in pieces. Raises Undecodable, naming the file and the position, if they are not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(source) as file:
        while True:
            data, pending = _read(source, file, piece), len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise Undecodable(
                    f"{printable(source)} is not UTF-8 text (near byte {start - pending + error.start}): "
                    "convert it, for example with iconv"
                ) from None
            if not data:
                return
            start += len(data)
            yield data


def _open(source: Path) -> IO[bytes]:
    try:
        return source.open("rb")
    except OSError as error:
        raise type(error)(f"{printable(source)} cannot be read: {error.strerror}") from None


def _read(source: Path, file: IO[bytes], count: int = -1) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise type(error)(f"{printable(source)} cannot be read: {error.strerror}") from None


def read_utf8(source: Path) -> bytes | None:
    """The file's bytes; None if they are not UTF-8 text."""
    with _open(source) as file:
        text = _read(source, file)
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return text
