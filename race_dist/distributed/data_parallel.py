"""Parameters over many ranks, whole on each or sharded (FSDP2), with gradients that are sums and not means.

Each rank's loss is its share of the whole loss, so the gradient is the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.communication import PendingCollective, group_size, start_all_reduce
from race_dist.distributed.watchdog import RankFailure, watched

BUCKET_BYTES = 32 * 2**20


class GradientReducer:
    """Sums gradients over the ranks, bucket by bucket, while the backward pass still runs.

    As PyTorch's DDP does, but its buckets are re-ordered after the first step, and then round otherwise: a run that is
    resumed would not repeat the one that was not interrupted. Here their order is that of the parameters, backwards.

        with reducer.reduce_on_exit():           # gradients of every backward pass inside add up; at its end they are summed
            loss.backward()

    Args:
        parameters: those that are trained.
        group: the ranks; None for one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: ProcessGroup | None) -> None:
        if not isinstance(parameters, Iterable) or isinstance(parameters, (str, bytes, Tensor)):
            raise TypeError(f"parameters must be a list of parameters; got {checks.typed_repr(parameters)}")
        parameters = list(parameters)
        for parameter in parameters:
            checks.instance("each of parameters", parameter, Tensor)
        self.group = group if group_size(group) > 1 else None
        self._buckets: list[list[nn.Parameter]] = []
        self._eager = False  # whether buckets go as soon as they are full
        self._waiting: list[int] = []
        self._sent: list[PendingCollective] = []
        if self.group is None:
            return
        trained = [p for p in parameters if p.requires_grad]
        room = 0
        for p in reversed(trained):
            size = p.numel() * p.element_size()
            if size > room or p.dtype != self._buckets[-1][0].dtype:
                self._buckets.append([])
                room = max(size, BUCKET_BYTES)
            self._buckets[-1].append(p)
            room -= size
        for index, bucket in enumerate(self._buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(lambda _, index=index: self._ready(index))

    @contextmanager
    def reduce_on_exit(self, *, overlap: bool = True) -> Iterator[None]:
        """Around the backward pass (or passes) after which the gradients are to be summed.

        Args:
            overlap: send each bucket as soon as it is complete: right if this is one backward pass that reaches every
                parameter once. Otherwise all are sent at the end.
        """
        self._eager = overlap and self.group is not None
        self._waiting, self._sent = [len(bucket) for bucket in self._buckets], []
        try:
            with guarded(self.group, "the sum of gradients"):
                yield
                self._finish()
        finally:
            self._eager, self._sent = False, []

    def _ready(self, index: int) -> None:
        if self._eager:
            self._waiting[index] -= 1
            while len(self._sent) < len(self._buckets) and self._waiting[len(self._sent)] <= 0:  # in order on every rank
                self._send()

    def _send(self) -> None:
        assert self.group is not None
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        self._sent.append(start_all_reduce(flat, self.group))

    def _finish(self) -> None:
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, sent in zip(self._buckets, self._sent):
            for p, part in zip(bucket, sent.wait().split([p.numel() for p in bucket])):
                p.grad = part.view_as(p)


class DataParallelModel:
    """A model over a group of ranks. It is called like the module itself.

        replica = DataParallelModel.replicated(model, group)  # or fully_sharded(model, group, model.blocks, ...)
        for n, (inputs, labels) in enumerate(parts):
            with replica.backward(last=n == len(parts) - 1):     # after the last the gradients are those of all ranks
                replica(inputs, labels).backward()

    Attributes:
        model: the module that holds the parameters (DTensors, where they are sharded).
        group: the ranks that share the parameters; None for one.
        is_sharded: whether each rank holds a part of every parameter.
        sums: of the gradients of whole replicas.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup | None, *, is_sharded: bool) -> None:
        checks.instance("model", model, nn.Module)
        checks.flag("is_sharded", is_sharded)
        self.model, self.group, self.is_sharded = model, group if group_size(group) > 1 else None, is_sharded
        self.reducer = GradientReducer([] if is_sharded else model.parameters(), self.group)

    @classmethod
    def replicated(cls, model: nn.Module, group: ProcessGroup | None) -> DataParallelModel:
        """All parameters on every rank."""
        return cls(model, group, is_sharded=False)

    @classmethod
    def fully_sharded(
        cls, model: nn.Module, group: ProcessGroup | None, units: Iterable[nn.Module], *, device_type: str
    ) -> DataParallelModel:
        """Parameters, gradients and optimizer states divided over the ranks; each unit's are gathered while it runs.

        The model may be on the meta device: ``to_empty`` and initialisation come afterwards.

        Raises:
            ImportError: this PyTorch has no ``fully_shard`` that can sum.
        """
        if group is None or group_size(group) == 1:
            return cls(model, None, is_sharded=False)
        try:
            from torch.distributed.device_mesh import DeviceMesh
            from torch.distributed.fsdp import FSDPModule, fully_shard
        except ImportError:
            raise ImportError("sharded parameters need torch 2.9 or newer: pip install -U torch") from None
        mesh = DeviceMesh.from_group(group, device_type)
        for unit in units:
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return cls(model, group, is_sharded=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        with guarded(self.group if self.is_sharded else None, "the forward pass"):
            return self.model(*args, **kwargs)

    @contextmanager
    def backward(self, *, last: bool = True) -> Iterator[None]:
        """Around forward and backward of one part of a step: after the last one the gradients are those of all ranks."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            with guarded(self.group, "the backward pass"):
                yield
        elif last:
            with self.reducer.reduce_on_exit():
                yield
        else:
            yield

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole; a collective where they are sharded: all ranks go through to the end."""
        for name, parameter in self.model.named_parameters():
            yield name, full_tensor(parameter.detach())


@contextmanager
def guarded(group: ProcessGroup | None, op: str) -> Iterator[None]:
    """As :func:`watched`, but an error that no rank's failure explains stays what it was."""
    if group is None:
        yield
        return
    own: RuntimeError | None = None
    try:
        with watched(group, op):
            try:
                yield
            except RankFailure:
                raise
            except torch.OutOfMemoryError as error:  # nothing to ask the other ranks about
                own = error
            except RuntimeError as error:
                own = error
                raise
    except RankFailure as failure:
        if own is None or failure.ranks:
            raise
    if own is not None:
        raise own


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor, whole, on every rank (a collective); any other as it is."""
    from torch.distributed.tensor import DTensor

    checks.instance("x", x, Tensor)
    return x.full_tensor() if isinstance(x, DTensor) else x
