"""The manager of a run's checkpoints: save in the background, find the latest intact checkpoint, load it.

A checkpoint is a folder ``000012-step-00003000`` with the files of the engine's state and ``manifest.json``: the step, the
position in the data, configuration, versions, and a checksum of every file. It is written under another name, flushed to disk
and then renamed, so a crash at any moment leaves the earlier checkpoints intact. Any number of ranks reads what any other
number has written. :mod:`race_dist.checkpoint_files` has the layout on disk, :mod:`race_dist.training.checkpoint_state` the
format of the state.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from race_dist.checkpoint_files import MANIFEST, CheckpointFolder, Manifest, parse_name
from race_dist.files import file_digest
from race_dist.parallel import gather_objects, group_rank, group_size, new_gloo_group
from race_dist.training.checkpoint_state import CheckpointError, CheckpointState, SavedCheckpoint

__all__ = ["MANIFEST", "CheckpointError", "CheckpointManager", "OtherRunError", "SavedCheckpoint"]
FORMAT = 1
_TYPES = {"format": int, "serial": int, "step": int, "facts": dict}


class OtherRunError(CheckpointError):
    """A checkpoint belongs to a run with another model, text or optimizer. The user can correct the configuration; a restart
    with the same one fails again."""


class CheckpointManager:
    """Writes, finds and reads the checkpoints of a run. Every rank makes one and calls the same methods in the same order.

    Args:
        folder: of all checkpoints; the ranks share it.
        group: all ranks of the run; None for one.
        keep: how many of the newest checkpoints to keep.
        keep_every: older checkpoints whose step is a multiple of it are kept too; 0: none.
        read_only: leave the folder as it is, because the run that owns it may be active.
    """

    def __init__(
        self, folder: Path, group: ProcessGroup | None, *, keep: int = 3, keep_every: int = 0, read_only: bool = False
    ) -> None:
        self.folder, self.keep, self.keep_every = CheckpointFolder(folder), keep, keep_every
        self.rank, self.world_size = group_rank(group), group_size(group)
        self.problems: list[str] = []  # sentences for the user: checkpoints that were damaged or could not be written
        self._group = new_gloo_group(group)
        serial = 0 if read_only or self.rank else self._last_serial()
        self._nonce, self._serial = gather_objects((secrets.token_hex(4), serial), group)[0]
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, step: int, state: CheckpointState, facts: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; waits for the previous one first.

        Args:
            step: optimizer steps done.
            state: to write; it may change afterwards.
            facts: of JSON types, the same on every rank; stored in the manifest.
        """
        self.wait()
        self._serial += 1
        body = {"format": FORMAT, "serial": self._serial, "step": step, "facts": dict(facts)}
        partial = self.folder.partial(f"{self._nonce}-{self._serial}")
        future = state.write(partial, self._group)
        if not state.writes_in_background:
            self._finish(future, partial, body)
            return
        self._writer = threading.Thread(target=self._finish, args=(future, partial, body), name="race-dist-checkpoint")
        self._writer.start()

    def wait(self) -> bool:
        """Wait until the last checkpoint is on disk. False if it could not be written; the reason is then in ``problems``."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            self.problems.append(failure)
        return failure is None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._writer is not None and self._writer.is_alive()

    def latest(self, step: int | None = None, *, before: int | None = None) -> SavedCheckpoint | None:
        """The newest intact checkpoint, the same on every rank; None if there is no checkpoint.

        Damaged checkpoints are skipped and named in ``problems``.

        Args:
            step: only a checkpoint of this step.
            before: only checkpoints with a lower serial number.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
        """
        candidates = [
            str(path)
            for path in reversed(self.folder.complete())
            if step in (None, parse_name(path)[1]) and (before is None or parse_name(path)[0] < before)
        ]
        paths = gather_objects(candidates, self._group)[0]
        for path in map(Path, paths):
            try:
                saved, error = self._verify(path), None
            except (OSError, ValueError, KeyError, TypeError) as caught:
                saved, error = None, str(caught)
            errors = gather_objects(error, self._group)
            if saved is not None and not any(errors):
                return saved
            self.problems.append(f"checkpoint {path.name} is damaged ({next(e for e in errors if e)})")
        if paths:
            raise CheckpointError(f"no checkpoint in {self.folder.path} is whole: " + "; ".join(self.problems))
        return None

    def load(self, saved: SavedCheckpoint, state: CheckpointState) -> None:
        """Fill a state from a checkpoint, whichever ranks and shards wrote it.

        Raises:
            CheckpointError: a tensor is missing there or has another shape.
        """
        state.read(saved, self._group)

    # --- writing ---------------------------------------------------------------------------------------------------------

    def _finish(self, future: Future[Any], partial: Path, body: dict[str, Any]) -> None:
        """After the files: checksums, manifest, rename, pruning. Every rank learns whether it succeeded."""
        files: dict[str, Any] = {}
        error: str | None = None
        try:
            future.result()
            files = {name: file_digest(partial / name) for name in self._own_files(partial)}
        except BaseException as caught:  # torch wraps a failed write in a BaseException
            error = _reason(caught)
        try:
            gathered = gather_objects((files, error), self._group)
            error = next((e for _, e in gathered if e is not None), None)
            if error is None and self.rank == 0:
                error = self._publish(partial, body, {k: v for part, _ in gathered for k, v in part.items()})
            if error is not None and self.rank == 0:  # no rank writes any more, and a full disk needs the space
                shutil.rmtree(partial, ignore_errors=True)
            error = gather_objects(error, self._group)[0]
        except RuntimeError as caught:  # a rank has failed: the main thread will report it too
            error = _reason(caught)
        if error is not None:
            self._failure = f"the checkpoint of step {body['step']} could not be written: {error}"

    def _publish(self, partial: Path, body: dict[str, Any], files: dict[str, Any]) -> str | None:
        try:
            self.folder.publish(partial, body, files)
            self.folder.prune(self.keep, self.keep_every)
        except OSError as error:
            return _reason(error)
        return None

    # --- reading ---------------------------------------------------------------------------------------------------------

    def _last_serial(self) -> int:
        """Remove what a crash has left incomplete; returns the highest serial number in use. If the folder cannot be made or
        read, that is reported, as it is for every checkpoint that cannot be written."""
        try:
            self.folder.remove_leftovers()
        except OSError as error:
            self.problems.append(f"the folder of checkpoints {self.folder.path} cannot be used: {error}")
            return 0
        return max((parse_name(path)[0] for path in self.folder.complete()), default=0)

    def _own_files(self, path: Path) -> Iterator[str]:
        """The files of a checkpoint whose checksums this rank computes."""
        names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
        return iter(names[self.rank :: self.world_size])

    def _verify(self, path: Path) -> SavedCheckpoint:
        """Raise unless the manifest, and this rank's share of the files, are what was written."""
        manifest = Manifest.read(path / MANIFEST, _TYPES)
        body = manifest.body
        if body["format"] != FORMAT:
            raise ValueError(f"it has format {body['format']}, this version reads {FORMAT}")
        missing = set(manifest.files) - {file.name for file in path.iterdir()}
        if missing:
            raise ValueError(f"{min(missing)} is missing")
        manifest.verify(list(manifest.files)[self.rank :: self.world_size])
        return SavedCheckpoint(path, body["serial"], body["step"], body["facts"], tuple(manifest.files))


def _reason(error: BaseException) -> str:
    """The innermost message of an error that torch has wrapped, of the first rank that had one."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(sorted(error.failures.items())))
        return f"rank {rank}: {_reason(inner)}"
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
