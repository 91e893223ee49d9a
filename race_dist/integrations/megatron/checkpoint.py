"""Checkpoints in megatron-core's format: any layout of the ranks reads what any other has written."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.parallel import gather_objects
from race_dist.training.checkpoint import CheckpointError, CheckpointManager, SavedCheckpoint


@without_cuda()
def save_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write a GPTModel (unwrapped) and its optimizer to an empty folder that is there. Every rank calls it.

    megatron-core writes from child processes that it forks.
    """
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(folder))


@without_cuda()
def load_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Fill both from what :func:`save_state` has written. Every rank calls it.

    Raises:
        RuntimeError: the checkpoint's weights are of another model, or were trained with other hyperplanes.
    """
    loaded = dist_checkpointing.load(_state(model, optimizer, loading=True), str(folder))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def _state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)}


class MegatronCheckpointManager(CheckpointManager):
    """The checkpoints of a run (complete or not there, checked when they are read) whose insides are megatron-core's.

    They are written before the training goes on: the ranks' weights and states are read while they stand still.

    Args:
        folder, group, options: as for :class:`race_dist.training.checkpoint.CheckpointManager`.
        model: the GPTModel, unwrapped.
        optimizer: megatron-core's, over its parameters.
    """

    def __init__(self, folder: Path, group: ProcessGroup | None, model: nn.Module, optimizer: Any, **options: Any) -> None:
        super().__init__(folder, group, **options)
        self._model, self._optimizer, self._ranks = model, optimizer, group

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model and optimizer; ``tensors`` is not looked at."""
        partial, body = self._begin(step, facts)
        done: Future[None] = Future()
        problem = None
        if self.rank == 0:
            try:
                partial.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        problem = gather_objects(problem, self._ranks)[0]  # all write, or none
        try:
            if problem is not None:
                raise OSError(problem)
            save_state(partial, self._model, self._optimizer)
            done.set_result(None)
        except (OSError, RuntimeError, CheckpointingException) as error:
            done.set_exception(error)
        self._finish(done, partial, body)

    def load(self, saved: SavedCheckpoint, tensors: Mapping[str, Tensor]) -> None:
        """Fill model and optimizer. Raises CheckpointError where they do not fit."""
        try:
            load_state(saved.path, self._model, self._optimizer)
        except (CheckpointingException, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(f"{saved.path} does not fit this run: {reason[-1] if reason else error!r}") from error
