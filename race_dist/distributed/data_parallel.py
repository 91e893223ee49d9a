"""Data parallelism: parameters replicated on every rank or sharded (FSDP2), with gradients that are sums and not means.

Each rank's loss is its share of the global loss, so the global gradient is the sum over the ranks.
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
from race_dist.distributed.watchdog import RankFailure, name_failed_rank

BUCKET_BYTES = 32 * 2**20


class GradientReducer:
    """All-reduce of gradients in buckets that overlaps the backward pass.

    PyTorch's DDP re-orders its buckets after the first step, which changes rounding: a resumed run would not repeat the
    uninterrupted one bit by bit. Here buckets have the reverse order of the parameters.

        with reducer.reduce_on_exit():  # gradients accumulate inside, and are all-reduced at the end
            loss.backward()

    Args:
        parameters: of the model.
        group: the ranks; None is one rank.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: ProcessGroup | None) -> None:
        if not isinstance(parameters, Iterable) or isinstance(parameters, (str, bytes, Tensor)):
            raise TypeError(f"parameters must be a list of parameters; got {checks.typed_repr(parameters)}")
        parameters = list(parameters)
        for parameter in parameters:
            checks.instance("each of parameters", parameter, Tensor)
        self.group = group if group_size(group) > 1 else None
        self._buckets: list[list[nn.Parameter]] = []
        self._overlap = False  # whether a bucket is reduced as soon as it is complete
        self._missing_grads: list[int] = []
        self._reductions: list[PendingCollective] = []
        if self.group is None:
            return
        trained = [p for p in parameters if p.requires_grad]
        free_bytes = 0
        for p in reversed(trained):
            size = p.numel() * p.element_size()
            if size > free_bytes or p.dtype != self._buckets[-1][0].dtype:
                self._buckets.append([])
                free_bytes = max(size, BUCKET_BYTES)
            self._buckets[-1].append(p)
            free_bytes -= size
        for index, bucket in enumerate(self._buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(lambda _, index=index: self._grad_ready(index))

    @contextmanager
    def reduce_on_exit(self, *, overlap: bool = True) -> Iterator[None]:
        """Context of the backward pass (or passes) after which gradients are summed over the ranks.

        Args:
            overlap: reduce each bucket as soon as it is complete. Correct for one backward pass that reaches every parameter
                once; otherwise all buckets are reduced at the end.
        """
        self._overlap = overlap and self.group is not None
        self._missing_grads, self._reductions = [len(bucket) for bucket in self._buckets], []
        try:
            with explain_failure(self.group, "the sum of gradients"):
                yield
                self._wait_and_store()
        finally:
            self._overlap, self._reductions = False, []

    def _grad_ready(self, index: int) -> None:
        if self._overlap:
            self._missing_grads[index] -= 1
            while (
                len(self._reductions) < len(self._buckets) and self._missing_grads[len(self._reductions)] <= 0
            ):  # in the same order on every rank
                self._reduce_next()

    def _reduce_next(self) -> None:
        assert self.group is not None
        bucket = self._buckets[len(self._reductions)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        self._reductions.append(start_all_reduce(flat, self.group))

    def _wait_and_store(self) -> None:
        while len(self._reductions) < len(self._buckets):
            self._reduce_next()
        for bucket, sent in zip(self._buckets, self._reductions):
            for p, part in zip(bucket, sent.wait().split([p.numel() for p in bucket])):
                p.grad = part.view_as(p)


class DataParallelModel:
    """A model whose parameters a group of ranks shares. It is called like the module itself.

        replica = DataParallelModel.replicated(model, group)  # or fully_sharded(model, group, model.blocks, ...)
        for n, (inputs, labels) in enumerate(parts):
            with replica.backward(last=n == len(parts) - 1):  # after the last part, gradients are summed over the ranks
                replica(inputs, labels).backward()

    Attributes:
        model: the module that holds the parameters (DTensors, where they are sharded).
        group: the ranks that share the parameters; None is one rank.
        is_sharded: whether each rank holds a shard of every parameter.
        reducer: all-reduce of the gradients of replicated parameters.
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
        """Parameters, gradients and optimizer states sharded over the ranks (FSDP2); each unit's parameters are gathered
        while it runs.

        The model may be on the meta device: ``to_empty`` and initialization follow.

        Raises:
            ImportError: this PyTorch has no ``fully_shard`` that can sum gradients.
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
        with explain_failure(self.group if self.is_sharded else None, "the forward pass"):
            return self.model(*args, **kwargs)

    @contextmanager
    def backward(self, *, last: bool = True) -> Iterator[None]:
        """Context of forward and backward of one micro-batch; after the last one, gradients are summed over the ranks."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            with explain_failure(self.group, "the backward pass"):
                yield
        elif last:
            with self.reducer.reduce_on_exit():
                yield
        else:
            yield

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every unsharded parameter by name. A collective where parameters are sharded: every rank must exhaust the
        iterator."""
        for name, parameter in self.model.named_parameters():
            yield name, full_tensor(parameter.detach())


@contextmanager
def explain_failure(group: ProcessGroup | None, op: str) -> Iterator[None]:
    """As :func:`name_failed_rank`, but an error that no rank's failure explains is raised unchanged."""
    if group is None:
        yield
        return
    own: RuntimeError | None = None
    try:
        with name_failed_rank(group, op):
            try:
                yield
            except RankFailure:
                raise
            except torch.OutOfMemoryError as error:  # the other ranks cannot explain it
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
    """The unsharded tensor of a DTensor, on every rank (a collective); any other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    checks.instance("x", x, Tensor)
    return x.full_tensor() if isinstance(x, DTensor) else x
