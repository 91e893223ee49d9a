"""Parameter gradients of one step, added up over its chunks, whoever holds the parameters: one rank, DDP or FSDP2."""

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
    """The model inside DDP; under FSDP2 the model itself, whose ``hidden`` gathers weights as its ``forward`` does."""
    if isinstance(model, DistributedDataParallel):
        return unwrap_model(model.module)
    if isinstance(model, FSDPModule) and not hasattr(model, "_race_dist_hidden"):
        register_fsdp_forward_method(model, "hidden")
        model._race_dist_hidden = True  # type: ignore[assignment]
    return model


class GradientAccumulator:
    """Added up over chunks in at least float32, and synchronised once, after the last.

    Entering sets aside what stands in ``.grad``; an exception puts it back as it was.

    Args:
        model: as the user has it.
        group: the ranks that share the sequence.
        reduce: "mean" or "sum" over replicas, or "none": each rank keeps its share.

    Raises:
        ValueError: no such ``reduce``.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup | None, reduce: Reduce) -> None:
        checks.choice("reduce", reduce, REDUCES)
        self._model, self._group, self._reduce = model, group if group_size(group) > 1 else None, reduce
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._held: list[Tensor | None] = []
        self._wide: dict[int, Tensor] = {}

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return any(isinstance(p, DTensor) for p in self._parameters)

    def __enter__(self) -> GradientAccumulator:
        self._held = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(True)
        if kind is not None:
            for p, held in zip(self._parameters, self._held):
                p.grad = held

    def begin_chunk(self, *, last: bool) -> None:
        """Before a chunk's backward pass: FSDP2 reduces gradients in the last one only."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last and self._reduce != "none")

    def collect(self) -> None:
        """Take the chunk's gradients of narrow parameters away; wide ones add up where they are."""
        for i, p in enumerate(self._parameters):
            if p.grad is None or p.dtype in (torch.float32, torch.float64):
                continue
            self._wide[i] = self._wide[i].add_(p.grad) if i in self._wide else p.grad.float()
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What has been added up, and what stood there before, to be stored."""
        result: dict[str, Tensor] = {}
        for i, (p, held) in enumerate(zip(self._parameters, self._held)):
            fresh = self._wide.get(i, p.grad)
            result |= {} if fresh is None else {f"gradient.{i}": fresh}
            result |= {} if held is None else {f"held.{i}": held}
        return result

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for i, p in enumerate(self._parameters):
            fresh, held = tensors.get(f"gradient.{i}"), tensors.get(f"held.{i}")
            self._held[i] = None if held is None else held.to(p.device)
            if fresh is None:
                continue
            if p.dtype in (torch.float32, torch.float64):
                p.grad = fresh.to(p.device)
            else:
                self._wide[i] = fresh.to(p.device)

    def finish(self) -> None:
        """Sum over the ranks of the sequence, average or sum over replicas, and add to what stood in ``.grad`` before."""
        for i, (p, held) in enumerate(zip(self._parameters, self._held)):
            fresh = self._wide.pop(i, p.grad)
            if fresh is None and self._reduce == "none" and self.sharded:
                p.grad = held  # FSDP2 keeps what has been added up until it reduces
                continue
            fresh = self._reduced(torch.zeros_like(p) if fresh is None else fresh)
            p.grad = (fresh if held is None else fresh + held).to(p.dtype)

    def _reduced(self, gradient: Tensor) -> Tensor:
        if self._reduce == "none":
            return gradient
        if isinstance(gradient, DTensor):
            return self._over_sequence(gradient)
        gradient = gradient if self._group is None else all_reduce_sum(gradient, self._group)
        if not isinstance(self._model, DistributedDataParallel):
            return gradient
        replicas = self._model.process_group  # those that share a sequence hold its sum alike
        return all_reduce_sum(gradient, replicas) / (group_size(replicas if self._reduce == "mean" else self._group))

    def _over_sequence(self, gradient: DTensor) -> DTensor:
        """FSDP2 has averaged (or, as it was told, summed) over the ranks of its mesh; those that share the sequence are to be
        summed."""
        if self._group is None:
            return gradient
        mesh, sharing = set(gradient.device_mesh.mesh.flatten().tolist()), set(dist.get_process_group_ranks(self._group))
        if sharing <= mesh:
            return cast(DTensor, gradient * len(sharing)) if self._reduce == "mean" else gradient
        local = all_reduce_sum(gradient.to_local(), self._group)
        return DTensor.from_local(
            local, gradient.device_mesh, gradient.placements, shape=gradient.shape, stride=gradient.stride()
        )
