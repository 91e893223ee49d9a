"""The files of checkpoints: manifests, checksums, atomic renames, and which checkpoints are kept.

A checkpoint is a set of files and a manifest, which is JSON with a checksum of itself and a checksum of every file. The
manifest is written last, so a checkpoint is complete or not there at all, and it is verified when it is read. Two kinds of
checkpoint are written this way: those of a run, one folder each (:mod:`race_dist.training.checkpoint`), and those of a
streamed step in progress, several in one folder (:mod:`race_dist.streaming.checkpoint`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from race_dist.files import JsonTypes, file_digest, read_checksummed_json, verify_file, write_checksummed_json
from race_dist.output_paths import atomic_write

MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6,})-step-(\d{8,})")
_PARTIAL, _REMOVED = ".partial-", ".removed-"


@dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint.

    Attributes:
        path: the JSON file; the files that it lists are in the same folder.
        body: its content, without the checksum of itself.
    """

    path: Path
    body: dict[str, Any]

    @classmethod
    def write(cls, path: Path, body: Mapping[str, Any], files: Mapping[str, Any]) -> Manifest:
        """Write a manifest.

        Args:
            path: the JSON file.
            body: what it says besides the files, of JSON types.
            files: what :func:`race_dist.files.file_digest` gives for each file, by name.
        """
        manifest = cls(path, {**body, "files": dict(files)})
        write_checksummed_json(path, manifest.body)
        return manifest

    @classmethod
    def read(cls, path: Path, types: JsonTypes) -> Manifest:
        """Read a manifest. The files that it lists are not read: see :meth:`verify`.

        Raises:
            FileNotFoundError: the file does not exist.
            DamagedFileError: its checksum is wrong, or a key is missing or has another type.
        """
        return cls(path, read_checksummed_json(path, {**types, "files": dict}))

    @property
    def files(self) -> dict[str, Any]:
        """Size and checksum of each file, by name."""
        return dict(self.body["files"])

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read the files (None: all of them) and compare size and checksum. Raises DamagedFileError, naming the file."""
        for name in self.files if names is None else names:
            verify_file(self.path.parent / name, self.files[name])


def save_tensors_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors as safetensors, atomically; returns size and checksum for a manifest. Raises OSError."""
    with atomic_write(path) as partial:
        try:
            save_file(dict(tensors), partial)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        return file_digest(partial)


def remove_unlisted(folder: Path, manifests: Iterable[Manifest], keep: Iterable[str] = ()) -> None:
    """Remove the files of a folder that none of the manifests needs, old manifests first. A file that cannot be removed stays.

    Args:
        folder: with several checkpoints.
        manifests: of those that are kept.
        keep: names of further files that stay.
    """
    needed = set(keep)
    for manifest in manifests:
        needed |= {manifest.path.name, *manifest.files}
    with suppress(OSError):
        files = [file for file in folder.iterdir() if file.name not in needed]
        for file in sorted(files, key=lambda file: file.suffix != ".json"):
            file.unlink()


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder of checkpoints, one folder each: ``000012-step-00003000`` is the 12th that a run has written, of step 3000.

    Attributes:
        path: the folder.
    """

    path: Path

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)] if self.path.is_dir() else []
        return sorted(found, key=lambda path: parse_name(path)[0])

    def partial(self, name: str) -> Path:
        """Where a checkpoint is written until it is complete."""
        return self.path / f"{_PARTIAL}{name}"

    def publish(self, partial: Path, body: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Make a checkpoint complete: write its manifest, flush its folder to disk and rename it. Raises OSError.

        Args:
            partial: from :meth:`partial`, with all files.
            body: of the manifest; ``serial`` and ``step`` make the name.
            files: their sizes and checksums.
        """
        Manifest.write(partial / MANIFEST, body, dict(sorted(files.items())))
        _sync(partial)
        partial.rename(self.path / f"{body['serial']:06d}-step-{body['step']:08d}")
        _sync(self.path)

    def prune(self, keep: int, keep_every: int) -> None:
        """Remove all checkpoints but the newest ``keep`` and those whose step is a multiple of ``keep_every`` (0: none)."""
        for path in self.complete()[:-keep]:
            if not (keep_every and parse_name(path)[1] % keep_every == 0):
                removed = path.with_name(_REMOVED + path.name)
                path.rename(removed)  # first: a crash while it is removed leaves nothing that looks like a checkpoint
                shutil.rmtree(removed, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Make the folder, and remove what a crash has left incomplete. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if path.name.startswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(path, ignore_errors=True)


def parse_name(path: Path) -> tuple[int, int]:
    """Serial number and step of a complete checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
