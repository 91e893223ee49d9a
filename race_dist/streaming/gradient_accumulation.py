"""Gradient accumulation over the chunks of one step, for a plain model, DDP and FSDP2."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from race_dist import checks
from race_dist.parallel import all_reduce_sum, group_size

Reduce = Literal["mean", "sum", "none"]
REDUCES = ("mean", "sum", "none")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP; under FSDP2 the model itself, with ``hidden`` registered as a method that gathers weights."""
    if isinstance(model, DistributedDataParallel):
        return unwrap_model(model.module)
    if isinstance(model, FSDPModule) and not hasattr(model, "_race_dist_hidden"):
        register_fsdp_forward_method(model, "hidden")
        model._race_dist_hidden = True  # type: ignore[assignment]
    return model


class GradientAccumulator:
    """Accumulates gradients over chunks in at least float32, and synchronises them once, after the last chunk.

    Entering the context sets the present ``.grad`` aside; an exception restores it.

    Args:
        model: the user's model, with its wrapper.
        group: the ranks that share the sequence.
        reduce: "mean" or "sum" over replicas, or "none": each rank keeps its share.

    Raises:
        ValueError: ``reduce`` is unknown.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup | None, reduce: Reduce) -> None:
        checks.choice("reduce", reduce, REDUCES)
        self._model, self._group, self._reduce = model, group if group_size(group) > 1 else None, reduce
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._previous: list[Tensor | None] = []
        self._accumulated: dict[int, Tensor] = {}

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return any(isinstance(p, DTensor) for p in self._parameters)

    def __enter__(self) -> GradientAccumulator:
        self._previous = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(True)
        if kind is not None:
            for p, previous in zip(self._parameters, self._previous):
                p.grad = previous

    def begin_chunk(self, *, last: bool) -> None:
        """Call it before a chunk's backward pass: FSDP2 reduces gradients only in the last one."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last and self._reduce != "none")

    def collect(self) -> None:
        """Accumulate a chunk's gradients of bfloat16 and float16 parameters; the others accumulate in ``.grad``."""
        for i, p in enumerate(self._parameters):
            if p.grad is None or p.dtype in (torch.float32, torch.float64):
                continue
            self._accumulated[i] = self._accumulated[i].add_(p.grad) if i in self._accumulated else p.grad.float()
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The accumulated gradients and the previous ``.grad``, for a checkpoint."""
        result: dict[str, Tensor] = {}
        for i, (p, previous) in enumerate(zip(self._parameters, self._previous)):
            current = self._accumulated.get(i, p.grad)
            result |= {} if current is None else {f"gradient.{i}": current}
            result |= {} if previous is None else {f"held.{i}": previous}
        return result

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        for i, p in enumerate(self._parameters):
            current, previous = tensors.get(f"gradient.{i}"), tensors.get(f"held.{i}")
            self._previous[i] = None if previous is None else previous.to(p.device)
            if current is None:
                continue
            if p.dtype in (torch.float32, torch.float64):
                p.grad = current.to(p.device)
            else:
                self._accumulated[i] = current.to(p.device)

    def finish(self) -> None:
        """Sum over the ranks of the sequence, average or sum over replicas, and add to the previous ``.grad``."""
        for i, (p, previous) in enumerate(zip(self._parameters, self._previous)):
            current = self._accumulated.pop(i, p.grad)
            if current is None and self._reduce == "none" and self.sharded:
                p.grad = previous  # FSDP2 keeps accumulated gradients until it reduces them
                continue
            current = self._reduced(torch.zeros_like(p) if current is None else current)
            p.grad = (current if previous is None else current + previous).to(p.dtype)

    def _reduced(self, gradient: Tensor) -> Tensor:
        if self._reduce == "none":
            return gradient
        if isinstance(gradient, DTensor):
            return self._over_sequence(gradient)
        gradient = gradient if self._group is None else all_reduce_sum(gradient, self._group)
        if not isinstance(self._model, DistributedDataParallel):
            return gradient
        replicas = self._model.process_group  # ranks that share a sequence hold the same sum
        return all_reduce_sum(gradient, replicas) / (group_size(replicas if self._reduce == "mean" else self._group))

    def _over_sequence(self, gradient: DTensor) -> DTensor:
        """The sum over the ranks of the sequence of a gradient that FSDP2 has averaged (or summed) over its mesh."""
        if self._group is None:
            return gradient
        mesh, sharing = set(gradient.device_mesh.mesh.flatten().tolist()), set(dist.get_process_group_ranks(self._group))
        if sharing <= mesh:
            return cast(DTensor, gradient * len(sharing)) if self._reduce == "mean" else gradient
        local = all_reduce_sum(gradient.to_local(), self._group)
        return DTensor.from_local(
            local, gradient.device_mesh, gradient.placements, shape=gradient.shape, stride=gradient.stride()
        )
