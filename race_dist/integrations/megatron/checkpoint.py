"""The checkpoint state of the Megatron engine (CheckpointState): megatron-core's format, which any mesh of ranks reads."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.parallel import gather_objects, group_rank
from race_dist.training.checkpoint_state import SavedCheckpoint, state_mismatch


@without_cuda()
def save_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write a GPTModel (unwrapped) and its optimizer to an existing empty folder. Every rank calls it.

    megatron-core writes from child processes that it forks.
    """
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(folder))


@without_cuda()
def load_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Load what :func:`save_state` has written into both. Every rank calls it.

    Raises:
        RuntimeError: the weights are of another model, or were trained with other hyperplanes.
    """
    loaded = dist_checkpointing.load(_state(model, optimizer, loading=True), str(folder))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def _state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)}


class MegatronState:
    """A :class:`race_dist.training.checkpoint_state.CheckpointState` in megatron-core's format.

    It is written synchronously, because megatron-core reads the ranks' weights and optimizer states in place.

    Args:
        model: the GPTModel, unwrapped.
        optimizer: megatron-core's, over its parameters.
    """

    writes_in_background = False

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def write(self, folder: Path, group: ProcessGroup | None) -> Future[Any]:
        """See :class:`race_dist.training.checkpoint_state.CheckpointState`. Either all ranks write, or none."""
        done: Future[Any] = Future()
        problem = None
        if group_rank(group) == 0:
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        problem = gather_objects(problem, group)[0]
        try:
            if problem is not None:
                raise OSError(problem)
            save_state(folder, self.model, self.optimizer)
            done.set_result(None)
        except (OSError, RuntimeError, CheckpointingException) as error:
            done.set_exception(error)
        return done

    def read(self, saved: SavedCheckpoint, group: ProcessGroup | None) -> None:
        """See :class:`race_dist.training.checkpoint_state.CheckpointState`."""
        try:
            load_state(saved.path, self.model, self.optimizer)
        except (CheckpointingException, RuntimeError, KeyError, ValueError) as error:
            raise state_mismatch(saved, error) from error
