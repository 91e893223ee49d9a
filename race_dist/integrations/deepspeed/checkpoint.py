"""The checkpoint state of the DeepSpeed engine (CheckpointState): named tensors, in the same files as the native engine's."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.training.checkpoint_state import SavedCheckpoint, TensorState

if TYPE_CHECKING:
    from race_dist.integrations.deepspeed.training import DeepSpeedEngine

STATES = ("exp_avg", "exp_avg_sq")


class DeepSpeedState:
    """A :class:`race_dist.training.checkpoint_state.CheckpointState`: full tensors, written by rank 0, read at any ZeRO stage.

    Args:
        engine: whose state it is.
    """

    writes_in_background = True

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine

    def write(self, folder: Path, group: ProcessGroup | None) -> Future[Any]:
        """See :class:`race_dist.training.checkpoint_state.CheckpointState`."""
        return TensorState(self._gather()).write(folder, group)

    def read(self, saved: SavedCheckpoint, group: ProcessGroup | None) -> None:
        """See :class:`race_dist.training.checkpoint_state.CheckpointState`. One parameter is in memory at a time."""
        engine = self.engine
        if saved.step:
            engine.make_states()
        steps = torch.zeros(())  # of AdamW: fewer than the run's where the guard has skipped some
        for name, p in engine.model.named_parameters():
            shape = getattr(p, "ds_shape", p.shape)
            kinds = ("step", *STATES) if p.requires_grad else ()
            read = {f"model.{name}": torch.empty(shape)}
            read |= {f"optim.{name}.{kind}": torch.empty(shape if kind in STATES else ()) for kind in kinds}
            TensorState(read).read(saved, group)
            steps = read.get(f"optim.{name}.step", steps)
            states = {kind: read[f"optim.{name}.{kind}"] for kind in kinds} if saved.step else {}
            self._put(p, read[f"model.{name}"], states)
        if saved.step:
            for state in engine.adamw.state.values():
                state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(steps))

    def _gather(self) -> dict[str, Tensor]:
        """Full tensors on rank 0, nothing on the other ranks: a checkpoint is written once. A collective."""
        engine = self.engine
        steps = next((s["step"] for s in engine.adamw.state.values() if "step" in s), 0.0)
        link_states(engine.engine.optimizer)
        tensors: dict[str, Tensor] = {}
        for name, p in engine.model.named_parameters():
            found = {f"model.{name}": full_weight(p)}
            found |= {f"optim.{name}.{kind}": self._full_state(p, kind) for kind in STATES if p.requires_grad}
            if engine.mesh.rank == 0:
                tensors |= {key: value.to("cpu", copy=True) for key, value in found.items()}
                tensors |= {f"optim.{name}.step": torch.tensor(float(steps))} if p.requires_grad else {}
        return tensors

    def _full_state(self, p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        engine = self.engine
        if not engine.has_states:
            return torch.zeros(getattr(p, "ds_shape", p.shape))
        state: Tensor = engine.adamw.state[p][kind] if engine.is_plain else safe_get_full_optimizer_state(p, kind)
        return state

    def _put(self, p: nn.Parameter, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Hand a parameter's full weight and states to DeepSpeed."""
        import deepspeed
        from deepspeed import utils

        engine = self.engine
        device, sharded = engine.mesh.device, hasattr(p, "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=sharded):
            p.copy_(weight)
        if sharded:
            utils.safe_set_local_fp32_param(p, zero3_partition(p, weight).to(device))
        elif not engine.is_plain:
            utils.safe_set_full_fp32_param(p, weight.to(device))
        for kind in (kind for kind in STATES if kind in states):
            if engine.is_plain:
                engine.adamw.state[p][kind].copy_(states[kind])
            elif sharded:
                utils.safe_set_local_optimizer_state(p, zero3_partition(p, states[kind]).to(device), kind)
            else:
                utils.safe_set_full_optimizer_state(p, states[kind].to(device), kind)


def zero3_partition(p: Any, full: Tensor) -> Tensor:
    """This rank's partition of a parameter under ZeRO-3, which splits the flat parameter into equal parts and pads the last.

    (``safe_set_full_fp32_param`` of DeepSpeed 0.19.8 does not pad, and fails for parameters that do not divide evenly.)
    """
    size = p.ds_tensor.numel()
    rank, world = dist.get_rank(p.ds_process_group), dist.get_world_size(p.ds_process_group)
    flat = torch.zeros(size * world)
    flat[: full.numel()] = full.flatten()
    return flat[rank * size : (rank + 1) * size]


def link_states(optimizer: Any) -> None:
    """Link the parameters to their optimizer states again under ZeRO-1 and 2: DeepSpeed 0.19.8 does so after the step of the
    first group, when the states of later groups do not exist yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)


def full_weight(p: nn.Parameter) -> Tensor:
    """A full parameter in float32 on every rank. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(p)
    return (p if full is None else full).detach().float()
