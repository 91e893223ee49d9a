"""Collectives without gradients: asynchronous, counted by bytes, with failures that name the rank; packed buffers.

The differentiable ones are in :mod:`race_dist.distributed.collectives`. Nothing synchronizes the host with the device on CUDA.
A group of None is one rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from race_dist import checks
from race_dist.distributed.watchdog import name_failed_rank

_ALIGN = 16  # bytes; tensors of any dtype can be viewed in place inside a packed buffer
_all_gather_single: Callable[..., Work | None] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def check_group(group: Any, name: str = "group") -> None:
    """Raise TypeError unless ``group`` is a process group or None."""
    if group is None or isinstance(group, ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    fix = ': give mesh["sp"].get_group()' if type(group).__name__ == "DeviceMesh" else ""
    raise TypeError(f"{name} must be a torch.distributed.ProcessGroup, or None (one rank); got {checks.typed_repr(group)}{fix}")


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks; 1 for None. TypeError for anything but a group."""
    if group is None:
        return 1
    check_group(group)
    return dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This process's rank within the group; 0 for None. ValueError when it is not a member."""
    if group is None:
        return 0
    check_group(group)
    rank = dist.get_rank(group)
    if rank < 0:
        ranks = f" (ranks {dist.get_process_group_ranks(group)})" if isinstance(group, ProcessGroup) else ""
        raise ValueError(f"rank {dist.get_rank()} is not a member of the group it was given{ranks}")
    return rank


@dataclass
class ByteCount:
    """What this rank sent: ``bytes`` of the collectives' input buffers and number of ``calls``, in total and by collective."""

    bytes: int = 0
    calls: int = 0
    by_op: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, op: str, size: int) -> None:
        self.bytes += size
        self.calls += 1
        calls, total = self.by_op.get(op, (0, 0))
        self.by_op[op] = (calls + 1, total + size)


_counters: list[ByteCount] = []  # not a context variable: backward passes run on autograd's threads


@contextmanager
def count_bytes() -> Iterator[ByteCount]:
    """Count the bytes that this rank passes to this package's collectives inside the block.

    with count_bytes() as count:
        step()
    print(count.bytes, count.calls, count.by_op)     # by_op: {collective: (calls, bytes)}
    """
    counter = ByteCount()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [c for c in _counters if c is not counter]


class PendingCollective:
    """A collective that has been started. :meth:`wait` returns its result; the buffers live until then."""

    def __init__(
        self, op: str, group: ProcessGroup, works: Sequence[Work | None], result: Tensor, inputs: Sequence[Tensor] = ()
    ) -> None:
        self._op, self._group, self._works, self._result, self._inputs = op, group, works, result, inputs

    def wait(self) -> Tensor:
        """Wait (on CUDA: make the current stream wait) and return the result."""
        with name_failed_rank(self._group, self._op, count=False):
            for work in self._works:
                if work is not None:
                    work.wait()
        self._works, self._inputs = (), ()
        return self._result


def _record(op: str, sent: Tensor) -> None:
    for counter in _counters:
        counter.add(op, sent.numel() * sent.element_size())


def start_all_gather(x: Tensor, group: ProcessGroup) -> PendingCollective:
    """``[W, *x.shape]``: every rank's x, in rank order."""
    x = x.contiguous()
    _record("all_gather", x)
    out = x.new_empty((group_size(group), *x.shape))
    with name_failed_rank(group, "all_gather"):
        work = _all_gather_single(out.view(-1), x.view(-1), group=group, async_op=True) if x.numel() else None
    return PendingCollective("all_gather", group, [work], out, [x])


def start_all_to_all(x: Tensor, group: ProcessGroup) -> PendingCollective:
    """Row d of x ``[W, ...]`` goes to rank d; row s of the result came from rank s."""
    x = x.contiguous()
    _record("all_to_all", x)
    out = torch.empty_like(x)
    with name_failed_rank(group, "all_to_all"):
        work = dist.all_to_all_single(out, x, group=group, async_op=True) if x.numel() else None
    return PendingCollective("all_to_all", group, [work], out, [x])


def start_all_reduce(x: Tensor, group: ProcessGroup, *, op: str = "sum") -> PendingCollective:
    """The sum (or "max", "min") over the ranks, in a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    _record("all_reduce", out)
    reduce = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
    with name_failed_rank(group, "all_reduce"):
        work = dist.all_reduce(out, op=reduce, group=group, async_op=True) if out.numel() else None
    return PendingCollective("all_reduce", group, [work], out)


def start_broadcast(x: Tensor, source: int, group: ProcessGroup) -> PendingCollective:
    """Group rank ``source``'s x, on every rank, in a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    _record("broadcast", out)
    with name_failed_rank(group, "broadcast"):
        work = dist.broadcast(out, group=group, group_src=source, async_op=True) if out.numel() else None
    return PendingCollective("broadcast", group, [work], out)


def start_shift(x: Tensor, by: int, group: ProcessGroup, *, ring: bool = False) -> PendingCollective:
    """Point-to-point shift: x of rank ``rank - by``; where there is no such rank, zeros, or with ``ring`` x of rank
    ``(rank - by) % W``."""
    x = x.contiguous()
    rank, world = group_rank(group), group_size(group)
    received, works = torch.zeros_like(x), []
    with name_failed_rank(group, "shift"):
        ops = []
        to, source = ((rank + by) % world, (rank - by) % world) if ring else (rank + by, rank - by)
        if 0 <= to < world and x.numel():
            _record("shift", x)
            ops.append(dist.P2POp(dist.isend, x, group=group, group_peer=to))
        if 0 <= source < world and x.numel():
            ops.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
        if ops:
            works = dist.batch_isend_irecv(ops)
    return PendingCollective("shift", group, works, received, [x])


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks, in a new tensor, not differentiable: token counts, losses for a log, squared norms.

    Args:
        x: a tensor of the same shape and dtype on every rank.
        group: the ranks to sum over; None is one rank.
    """
    checks.tensor("x", x)
    if group_size(group) == 1:
        return x.detach().clone()
    assert group is not None
    return start_all_reduce(x.detach(), group).wait()


def all_reduce_max(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The maximum over the ranks, in a new tensor, not differentiable."""
    checks.tensor("x", x)
    if group_size(group) == 1:
        return x.detach().clone()
    assert group is not None
    return start_all_reduce(x.detach(), group, op="max").wait()


def broadcast_tensor(x: Tensor, group: ProcessGroup | None, *, source: int = 0) -> Tensor:
    """Group rank ``source``'s x on every rank, in a new tensor, not differentiable."""
    checks.tensor("x", x)
    checks.integer("source", source, minimum=0, maximum=group_size(group) - 1)
    if group_size(group) == 1:
        return x.detach().clone()
    assert group is not None
    return start_broadcast(x.detach(), source, group).wait()


def all_gather_tensor(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """``[W, *x.shape]``: every rank's x (same shape everywhere), not differentiable."""
    checks.tensor("x", x)
    if group_size(group) == 1:
        return x.detach().clone()[None]
    assert group is not None
    return start_all_gather(x.detach(), group).wait()


def gather_objects(value: object, group: ProcessGroup | None) -> list[Any]:
    """Every rank's value, in rank order: for decisions that all ranks must take alike. Not for data.

    Values travel as JSON and not as pickles, so that a rank cannot send code to another. Tuples arrive as lists and keys of
    mappings as text, also with one rank.

    Args:
        value: of JSON types: None, bool, int, float, str, lists and mappings of them.
        group: the ranks; None is one rank.

    Raises:
        TypeError: the value is of another type.
    """
    body = _to_json(value)
    if group_size(group) == 1:
        return [json.loads(body)]
    assert group is not None
    with name_failed_rank(group, "gather_objects"):
        device = group_device(group)
        local = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        sizes = torch.empty(group_size(group), dtype=torch.int64, device=device)
        _all_gather_into(sizes, torch.tensor([len(local)], device=device), group)
        longest = int(sizes.max())
        sent = torch.zeros(longest, dtype=torch.uint8, device=device)
        sent[: len(local)] = local.to(device)
        received = torch.empty(group_size(group), longest, dtype=torch.uint8, device=device)
        _all_gather_into(received.view(-1), sent, group)
    rows = received.cpu().numpy()
    return [json.loads(rows[rank, :size].tobytes()) for rank, size in enumerate(sizes.tolist())]


def _to_json(value: object) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"values between ranks must be of JSON types (None, bool, int, float, str, lists and mappings of "
            f"them); got a {type(value).__name__}: {error}"
        ) from None


def _all_gather_into(out: Tensor, x: Tensor, group: ProcessGroup) -> None:
    work = _all_gather_single(out, x, group=group, async_op=True)
    if work is not None:
        work.wait()


def group_device(group: ProcessGroup) -> torch.device:
    """Device of tensors for the group's collectives: the CPU where the group has a CPU backend, else this rank's GPU."""
    types = {device.type for device in group._device_types}
    return torch.device("cpu") if "cpu" in types else torch.device("cuda", torch.cuda.current_device())


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every rank of the group has called this."""
    if group_size(group) > 1:
        assert group is not None
        with name_failed_rank(group, "barrier"):
            dist.barrier(group)


def packed_size(tensors: Sequence[Tensor]) -> int:
    """Bytes of the packed buffer of these tensors."""
    return sum(_padded(t.numel() * t.element_size()) for t in tensors)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def pack(tensors: Sequence[Tensor], rows: int | None = None) -> Tensor:
    """The bytes of ``tensors`` in one uint8 buffer; with ``rows``, ``[rows, ...]`` tensors row by row."""
    count, lead = (1, ()) if rows is None else (rows, (rows,))
    device = tensors[0].device
    buffer = torch.empty((count, packed_size([t[0] if lead else t for t in tensors])), dtype=torch.uint8, device=device)
    start = 0
    for t in tensors:
        size = t.numel() * t.element_size() // count
        if not size:
            continue  # a view of an empty tensor has no valid stride
        buffer[:, start : start + size].view(t.dtype).copy_(t.detach().reshape(count, -1))
        start += _padded(size)
    return buffer if lead else buffer[0]


def unpack(buffer: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views into a packed buffer ``[..., bytes]``: ``[..., *t.shape]`` for each t of ``like``."""
    views, start = [], 0
    for t in like:
        size = math.prod(t.shape) * t.element_size()
        if not size:
            views.append(torch.empty((*buffer.shape[:-1], *t.shape), dtype=t.dtype, device=buffer.device))
            continue
        views.append(buffer[..., start : start + size].view(t.dtype).view((*buffer.shape[:-1], *t.shape)))
        start += _padded(size)
    return tuple(views)
