"""Checkpoints: written beside the training, complete or not there at all, checked when they are read.

A checkpoint is a folder ``000012-step-00003000`` (the 12th that the run has written) of safetensors files, one a rank, in
the layout of ``torch.distributed.checkpoint``, and ``manifest.json``: the step, the position in the data, configuration,
versions, and a checksum of every file. It is written under another name, flushed to disk and then renamed, so that a crash
at any moment leaves the ones before it. Any number of ranks reads what any other number has written.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.files import file_digest, read_checksummed_json, verify_file, write_checksummed_json
from race_dist.parallel import gather_objects, group_rank, group_size, new_gloo_group

if TYPE_CHECKING:
    from concurrent.futures import Future

FORMAT = 1
_KINDS = {"format": int, "serial": int, "step": int, "facts": dict, "files": dict}
MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6,})-step-(\d{8,})")
# one rank is no mistake; said once here, since the warning comes from a thread
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_PARTIAL, _DOOMED = ".partial-", ".removed-"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        serial: how many the run had written, this one included.
        step: optimizer steps done.
        facts: what else :meth:`Checkpoints.save` was given.
        files: the names of its files; others in the folder are none of its own.
    """

    path: Path
    serial: int
    step: int
    facts: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read."""


class OtherRunError(CheckpointError):
    """A checkpoint is of a run with another model, text or optimizer than the one that would go on from it: whoever resumes can
    mend it, and starting again does not help."""


class CheckpointManager:
    """The checkpoints of a run. Every rank makes one and calls the same methods in the same order.

    Args:
        folder: where they are; ranks share it.
        group: all ranks of the run; None for one.
        keep: how many of the newest stay.
        keep_every: of the older ones, those whose step is a multiple of it stay too; 0: none.
        read_only: for looking into the folder of a run that may be going on: nothing in it is touched.
    """

    def __init__(
        self, folder: Path, group: ProcessGroup | None, *, keep: int = 3, keep_every: int = 0, read_only: bool = False
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.rank, self.world = group_rank(group), group_size(group)
        self.problems: list[str] = []  # sentences about checkpoints that were damaged or failed, for the user
        self._group = new_gloo_group(group)
        serial = 0 if read_only or self.rank else self._tidy()
        self._nonce, self._serial = gather_objects((secrets.token_hex(4), serial), group)[0]
        self._writing: threading.Thread | None = None
        self._failed: str | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copy the tensors and write them in the background; waits first for the one before.

        Args:
            step: optimizer steps done.
            tensors: by name; sharded ones (DTensors) are written by all ranks, others once.
            facts: of JSON types, the same on every rank; stored in the manifest.
        """
        try:
            from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
            from torch.distributed.checkpoint.state_dict_saver import async_save
        except ImportError:
            raise ImportError(
                "checkpoints need torch 2.9 or newer: pip install -U torch, or set checkpoint.every = 0 and "
                "checkpoint.minutes = 0"
            ) from None
        partial, body = self._begin(step, facts)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        future = async_save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._writing = threading.Thread(target=self._finish, args=(future, partial, body), name="race-dist-checkpoint")
        self._writing.start()

    def _begin(self, step: int, facts: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Wait for the one before; the folder in which the next is written, and its manifest so far."""
        self.wait()
        self._serial += 1
        partial = self.folder / f"{_PARTIAL}{self._nonce}-{self._serial}"
        return partial, {"format": FORMAT, "serial": self._serial, "step": step, "facts": dict(facts)}

    def wait(self) -> bool:
        """Wait until the last one is on disk. False, with a sentence in ``problems``, where it has failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failed, self._failed = self._failed, None
        if failed is not None:
            self.problems.append(failed)
        return failed is None

    @property
    def busy(self) -> bool:
        """Whether one is still being written by this rank."""
        return self._writing is not None and self._writing.is_alive()

    def latest(self, step: int | None = None, *, before: int | None = None) -> SavedCheckpoint | None:
        """The newest checkpoint whose files are whole, the same on every rank; None where there is none at all.

        With ``step``, that of this step only; with ``before``, one of a lower serial number.

        Damaged ones are passed over and told in ``problems``.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
        """
        wanted = [
            str(path)
            for path in reversed(self._complete())
            if step in (None, int(_parse(path)[1])) and (before is None or int(_parse(path)[0]) < before)
        ]
        paths = gather_objects(wanted, self._group)[0]
        for path in map(Path, paths):
            try:
                saved, bad = self._check(path), None
            except (OSError, ValueError, KeyError, TypeError) as error:
                saved, bad = None, str(error)
            verdicts = gather_objects(bad, self._group)
            if saved is not None and not any(verdicts):
                return saved
            self.problems.append(f"checkpoint {path.name} is damaged ({next(v for v in verdicts if v)})")
        if paths:
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: " + "; ".join(self.problems))
        return None

    def load(self, saved: SavedCheckpoint, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors in place from a checkpoint, whatever ranks and shards wrote it.

        Raises:
            CheckpointError: a tensor is missing or has another shape there.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader: Any = HuggingFaceStorageReader(str(saved.path))
        reader.fs = _OnlyFiles(reader.fs, saved.files)
        try:
            load(dict(tensors), storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(f"{saved.path} does not fit this run: {reason[-1] if reason else error!r}") from error

    # --- writing ---------------------------------------------------------------------------------------------------------

    def _finish(self, future: Future[Any], partial: Path, body: dict[str, Any]) -> None:
        """In the background: checksums, manifest, rename, pruning. Every rank learns whether it worked."""
        files: dict[str, Any] = {}
        error: str | None = None
        try:
            future.result()
            files = {name: file_digest(partial / name) for name in self._mine(partial)}
        except BaseException as caught:  # also what torch wraps a failed write in
            error = _reason(caught)
        try:
            parts = gather_objects((files, error), self._group)
            error = next((e for _, e in parts if e is not None), None)
            if error is None and self.rank == 0:
                error = self._publish(partial, body, {k: v for part, _ in parts for k, v in part.items()})
            if error is not None and self.rank == 0:  # no rank writes any more, and a full disk needs the room
                shutil.rmtree(partial, ignore_errors=True)
            error = gather_objects(error, self._group)[0]
        except RuntimeError as caught:  # a rank is gone: the main thread will meet it too
            error = _reason(caught)
        if error is not None:
            self._failed = f"the checkpoint of step {body['step']} could not be written: {error}"

    def _publish(self, partial: Path, body: dict[str, Any], files: dict[str, Any]) -> str | None:
        try:
            body = {**body, "files": dict(sorted(files.items()))}
            write_checksummed_json(partial / MANIFEST, body)
            _sync_folder(partial)
            partial.rename(self.folder / f"{body['serial']:06d}-step-{body['step']:08d}")
            _sync_folder(self.folder)
            self._prune()
        except OSError as error:
            return _reason(error)
        return None

    def _prune(self) -> None:
        for path in self._complete()[: -self.keep]:
            step = int(_parse(path)[1])
            if not (self.keep_every and step % self.keep_every == 0):
                _remove(path)

    # --- reading ---------------------------------------------------------------------------------------------------------

    def _tidy(self) -> int:
        """Remove what a crash has left half done; returns the highest serial number in use. A folder that cannot be made or
        read is told, as each checkpoint that cannot be written will be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.name.startswith((_PARTIAL, _DOOMED)):
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            self.problems.append(f"the folder of checkpoints {self.folder} cannot be used: {error}")
            return 0
        return max((int(_parse(path)[0]) for path in self._complete()), default=0)

    def _complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)] if self.folder.is_dir() else []
        return sorted(found, key=lambda path: int(_parse(path)[0]))

    def _mine(self, path: Path) -> Iterator[str]:
        """The files of a checkpoint that this rank reads for their checksums."""
        names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
        return iter(names[self.rank :: self.world])

    def _check(self, path: Path) -> SavedCheckpoint:
        """Raise unless the manifest and this rank's share of the files are what was written."""
        body = read_checksummed_json(path / MANIFEST, _KINDS)
        if body["format"] != FORMAT:
            raise ValueError(f"it has format {body['format']}, this version reads {FORMAT}")
        missing = set(body["files"]) - {file.name for file in path.iterdir()}
        if missing:
            raise ValueError(f"{min(missing)} is missing")
        for name in list(body["files"])[self.rank :: self.world]:
            verify_file(path / name, body["files"][name])
        return SavedCheckpoint(path, body["serial"], body["step"], body["facts"], tuple(body["files"]))


class _OnlyFiles:
    """The file system of a torch reader in which a checkpoint's folder holds the files of its manifest and nothing else:
    torch would read every safetensors file that it finds there."""

    def __init__(self, files: Any, names: Iterable[str]) -> None:
        self._files, self._names = files, frozenset(names)

    def ls(self, path: Any) -> list[str]:
        """What is in the folder."""
        return [file for file in self._files.ls(path) if Path(file).name in self._names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def _parse(path: Path) -> tuple[str, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[1], match[2]


def _remove(path: Path) -> None:
    """Rename, then delete: a crash in the middle leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(_DOOMED + path.name)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The innermost sentence of an error that torch has wrapped, of the first rank that met one."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(sorted(error.failures.items())))
        return f"rank {rank}: {_reason(inner)}"
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
