"""The engine of a run: it holds the parameters and the optimizer, and it alone knows how they are stored.

:class:`race_dist.training.trainer.Trainer` has one and reaches parameters, gradients and optimizer states through it. This
module has the interface and the native engine (PyTorch: whole replicas, or FSDP2 shards). DeepSpeed and megatron-core
implement the same interface in :mod:`race_dist.integrations`; :mod:`race_dist.integrations.engines` chooses by
``config.engine``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from race_dist.models import DecoderLM
from race_dist.parallel import full_tensor
from race_dist.training.checkpoint_state import CheckpointState, TensorState
from race_dist.training.config import TrainConfig
from race_dist.training.optim import build_optimizer, optimizer_tensors, set_learning_rate
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.step import ForwardBackward, NativeForwardBackward
from race_dist.training.streamed_step import StreamedForwardBackward

CheckModel = Callable[[nn.Module], None]


class Engine(Protocol):
    """Holds a run's parameters and optimizer states on this rank. Every rank calls the same methods in the same order.

    Attributes:
        model: this rank's replica of the model, or its shards.
        optimizer: has ``param_groups``, as PyTorch's optimizers.
        forward_backward: computes losses and gradients of a batch.
        num_parameters: of the whole model.
    """

    model: Any
    optimizer: Any
    forward_backward: ForwardBackward
    num_parameters: int

    def zero_grad(self) -> None:
        """Discard the gradients of the last step, before ``forward_backward.gradients``."""
        ...

    def gradient_norm(self) -> Tensor | None:
        """The norm of the whole gradient, before clipping. None: this engine knows it only after :meth:`update`, so that a
        bad step cannot be skipped."""
        ...

    def update(self, learning_rate: float, norm: Tensor | None) -> Tensor:
        """Clip the gradients and change the weights by them.

        Args:
            learning_rate: of this step.
            norm: from :meth:`gradient_norm`.

        Returns:
            The norm of the whole gradient, before clipping.
        """
        ...

    def checkpoint_state(self) -> CheckpointState:
        """Parameters and optimizer states, to write to a checkpoint or to fill from one."""
        ...

    def describe(self) -> str:
        """Size, mesh and device in one line."""
        ...


class NativeEngine:
    """PyTorch's AdamW on whole replicas or, with ``parallel.sharding = "fsdp"``, on FSDP2 shards.

    Args:
        config: of the run.
        mesh: the process groups of the run and this rank's place in them.
        check_model: called with the model once it has its first weights; raises where ranks differ.
    """

    def __init__(self, config: TrainConfig, mesh: RankMesh, check_model: CheckModel) -> None:
        self.config, self.mesh = config, mesh
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.model: Any = DecoderLM(config.model, dtype=dtype, device="meta")
        self.forward_backward = build_forward_backward(config, self.model, mesh)
        self.optimizer: Any = build_optimizer(self.model, config.optim)
        check_model(self.model)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def zero_grad(self) -> None:
        """See :class:`Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor | None:
        """See :class:`Engine`."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return full_tensor(torch.nn.utils.get_total_norm(grads))

    def update(self, learning_rate: float, norm: Tensor | None) -> Tensor:
        """See :class:`Engine`."""
        assert norm is not None
        set_learning_rate(self.optimizer, learning_rate)
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        self.optimizer.step()
        return norm

    def checkpoint_state(self) -> CheckpointState:
        """See :class:`Engine`: ``model.NAME`` and ``optim.NAME.KIND``, on shards where the parameters are sharded."""
        named = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return TensorState(named | optimizer_tensors(self.model, self.optimizer))

    def describe(self) -> str:
        """See :class:`Engine`."""
        return describe_mesh(self.num_parameters, self.mesh, is_sharded=self.forward_backward.replica.is_sharded)


def build_forward_backward(config: TrainConfig, model: DecoderLM, mesh: RankMesh) -> ForwardBackward:
    """Streamed or full sequences, as the configuration says. ``model`` is on the meta device and gets its weights here."""
    if config.stream.chunk_size:
        return StreamedForwardBackward(config, model, mesh)
    return NativeForwardBackward(config, model, mesh)


def describe_mesh(num_parameters: int, mesh: RankMesh, *, is_sharded: bool) -> str:
    """Number of parameters, ranks and device in one line."""
    count = mesh.dp * mesh.sp
    sharded = ", parameters sharded" if is_sharded else ""
    return (
        f"{num_parameters:,} parameters, {count} rank{'s' if count > 1 else ''} (dp {mesh.dp} x sp {mesh.sp}{sharded}) "
        f"on {mesh.device.type}"
    )
