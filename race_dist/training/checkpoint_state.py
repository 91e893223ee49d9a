"""The state in checkpoints: what an engine writes to a checkpoint's folder and reads back, in its own format.

:class:`race_dist.training.checkpoint.CheckpointManager` decides when, and adds the manifest; :mod:`race_dist.checkpoint_files`
has the layout on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

# one process is not a mistake; the filter is set here because the warning comes from a thread
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        serial: how many the run had written, this one included.
        step: optimizer steps done.
        facts: what else :meth:`race_dist.training.checkpoint.CheckpointManager.save` was given.
        files: the names of its files; other files in the folder are ignored.
    """

    path: Path
    serial: int
    step: int
    facts: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


class CheckpointState(Protocol):
    """Parameters and optimizer states, to write to a checkpoint or to fill from one. Every rank calls the same methods.

    Attributes:
        writes_in_background: whether :meth:`write` returns before the files are written.
    """

    writes_in_background: bool

    def write(self, folder: Path, group: ProcessGroup | None) -> Future[Any]:
        """Begin to write into a folder, which need not be there yet. The state may change once this has returned.

        Args:
            folder: the same on every rank.
            group: all ranks of the run, for collectives beside those of the training; None: one rank.

        Returns:
            Done when this rank has written its files; it holds the error if they could not be written.
        """
        ...

    def read(self, saved: SavedCheckpoint, group: ProcessGroup | None) -> None:
        """Fill the state from a checkpoint that any number of ranks has written.

        Args:
            saved: the checkpoint.
            group: as in :meth:`write`.

        Raises:
            CheckpointError: a tensor is missing there or has another shape.
        """
        ...


class TensorState:
    """Named tensors as safetensors files, one per rank, in the layout of ``torch.distributed.checkpoint`` (DCP).

    Args:
        tensors: sharded tensors (DTensors) are written by all ranks, others once. They are filled in place.
    """

    writes_in_background = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def write(self, folder: Path, group: ProcessGroup | None) -> Future[Any]:
        """See :class:`CheckpointState`. The tensors are copied first.

        Raises:
            ImportError: this PyTorch does not write safetensors.
        """
        try:
            from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
            from torch.distributed.checkpoint.state_dict_saver import async_save
        except ImportError:
            raise ImportError(
                "checkpoints need torch 2.9 or newer: pip install -U torch, or set checkpoint.every = 0 and "
                "checkpoint.minutes = 0"
            ) from None
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        future: Any = async_save(dict(self.tensors), storage_writer=writer, process_group=group, no_dist=group is None)
        return future

    def read(self, saved: SavedCheckpoint, group: ProcessGroup | None) -> None:
        """See :class:`CheckpointState`."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader: Any = HuggingFaceStorageReader(str(saved.path))
        reader.fs = _ListedFiles(reader.fs, saved.files)
        try:
            load(dict(self.tensors), storage_reader=reader, process_group=group, no_dist=group is None)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            raise state_mismatch(saved, error) from error


class _ListedFiles:
    """The file system of a DCP reader, restricted to the files of a manifest: DCP reads every safetensors file in a folder."""

    def __init__(self, files: Any, names: Iterable[str]) -> None:
        self._files, self._names = files, frozenset(names)

    def ls(self, path: Any) -> list[str]:
        """The files in a folder."""
        return [file for file in self._files.ls(path) if Path(file).name in self._names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def state_mismatch(saved: SavedCheckpoint, error: BaseException) -> CheckpointError:
    """What to raise when a checkpoint does not fit the state that is to be filled from it."""
    lines = str(error).strip().splitlines()
    return CheckpointError(f"{saved.path} does not fit this run: {lines[-1] if lines else repr(error)}")
