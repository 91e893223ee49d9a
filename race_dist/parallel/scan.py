"""The exclusive scan over ranks: the initial carry of each rank's piece of the sequence, for any carry.

A carry is an element of a monoid (:mod:`race_dist.carry`), so the scan is written once for all carries, with two algorithms.
*all_gather* gives every carry to every rank, which combines the carries before its own in pairs. *recursive_doubling* takes
``ceil(log2 W)`` rounds; in round i each rank receives the combined carry of the rank ``2**i`` before it. Both are exact and
differentiable through ``combine``. The order of combination depends only on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Any, Generic, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.carry import Carry, CarryT
from race_dist.distributed import collectives
from race_dist.distributed.collectives import Tensors, attach, differentiable_sum_of_others
from race_dist.distributed.communication import (
    group_rank,
    group_size,
    pack,
    packed_size,
    start_all_gather,
    start_broadcast,
    start_shift,
    unpack,
)
from race_dist.distributed.consistency import check_same_call
from race_dist.distributed.eager import eager
from race_dist.parallel.sharding import Layout, check_layout
from race_dist.rank_environment import ranks_per_node

Algorithm = Literal["auto", "all_gather", "recursive_doubling"]
ALGORITHMS: tuple[Algorithm, ...] = ("auto", "all_gather", "recursive_doubling")

_SMALL_BUFFER = 2**20  # bytes of all ranks' carries, below which latency dominates


def fold(carries: Sequence[CarryT]) -> CarryT:
    """Combine one or more carries, earliest first, in pairs (a tree reduction), so that long sums lose few digits."""
    level = list(carries) if isinstance(carries, Sequence) else []
    if not level:
        raise ValueError(f"fold takes a list of one or more carries; got {checks.typed_repr(carries)}")
    for carry in level:
        _check_carry(carry, "carries")
    while len(level) > 1:
        pairs = [a.combine(b) for a, b in zip(level[0::2], level[1::2])]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


@eager
def exclusive_scan(carry: CarryT, group: ProcessGroup | None, *, reverse: bool = False, algorithm: str = "auto") -> CarryT:
    """The combined carries of all ranks before this one, in rank order; ``carry.zero()`` on the first rank.

    It is differentiable, for any carry. Every rank of the group must call it, forward and backward.

    Args:
        carry: the carry of this rank's piece of the sequence. Shapes and dtypes must be the same on every rank.
        group: the ranks, in the order of their pieces; None is one rank.
        reverse: scan from the last rank to the first: the combination of ranks W-1, ..., r+1, in this order (the
            higher rank is the earlier operand). This is the adjoint of the forward scan.
        algorithm: "all_gather", "recursive_doubling", or "auto", which chooses by the number of ranks and the size of a carry.

    Raises:
        ValueError: the algorithm is unknown, or the calls of the ranks differ (they are compared before data is exchanged).
    """
    _check_carry(carry, "carry")
    return exclusive_scan_pieces([carry], group, reverse=reverse, algorithm=algorithm)[0]


@eager
def exclusive_scan_pieces(
    pieces: Sequence[CarryT],
    group: ProcessGroup | None,
    layout: str = "contiguous",
    *,
    reverse: bool = False,
    algorithm: str = "auto",
) -> list[CarryT]:
    """The initial carry of each of this rank's pieces of the sequence: :func:`exclusive_scan` for any shard layout.

    Args:
        pieces: the carries of this rank's pieces in local order: one (contiguous) or two (zigzag). Packed documents under
            zigzag are a batch dimension of the carries.
        group, algorithm: as for :func:`exclusive_scan`.
        layout: "contiguous" or "zigzag".
        reverse: scan from the end of the sequence to its beginning.

    Returns:
        One carry per piece.

    Raises:
        ValueError: as for :func:`exclusive_scan`, or the layout has another number of pieces.
    """
    layout, algorithm = _check(pieces, layout, algorithm)
    checks.flag("reverse", reverse)
    world = group_size(group)
    tensors = [t for piece in pieces for t in piece.tensors()]
    if world > 1:
        assert group is not None
        facts = {
            "carry": type(pieces[0]).__name__,
            "shapes": [list(t.shape) for t in tensors],
            "dtypes": [t.dtype for t in tensors],
            "layout": layout,
            "reverse": reverse,
            "algorithm": algorithm,
            "ranks_per_node": ranks_per_node(),
            "requires_grad": torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        }
        check_same_call("exclusive_scan", facts, group, tensors[0].device)
    transport = _DifferentiableTransport(group)
    scan = _scan(pieces, transport, group, layout, reverse, _pick(algorithm, tensors, world, ranks_per_node()))
    result = _finish(scan)
    return [c.with_tensors(attach(transport.tokens, c.tensors())) for c in result]


@eager
def exclusive_sum(carry: CarryT, group: ProcessGroup | None) -> CarryT:
    """The sum of the *other* ranks' carries, tensor by tensor, by one all-reduce. It is differentiable.

    Non-causal attention needs it in place of the scan. The carry's ``combine`` must be addition.

    Raises:
        TypeError: a tensor of the carry is not floating point.
        ValueError: the calls of the ranks differ.
    """
    _check_carry(carry, "carry")
    tensors = carry.tensors()
    if not all(t.is_floating_point() and t.dtype == tensors[0].dtype for t in tensors):
        raise TypeError(f"exclusive_sum adds floating point tensors of one dtype; got {[t.dtype for t in tensors]}")
    if group_size(group) == 1:
        return carry.zero()
    assert group is not None
    facts = {
        "carry": type(carry).__name__,
        "shapes": [list(t.shape) for t in tensors],
        "dtype": tensors[0].dtype,
        "requires_grad": torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
    }
    check_same_call("exclusive_sum", facts, group, tensors[0].device)
    return carry.with_tensors(differentiable_sum_of_others(tensors, group))


@lru_cache
def _exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream on which all exchanges of a device run, one after another."""
    return torch.cuda.Stream(device)


class ScanHandle(Generic[CarryT]):
    """A running scan (:func:`start_scan`); :meth:`wait` returns the initial carry of each piece."""

    def __init__(self, scan: Generator[None, None, list[CarryT]], tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        self._scan = scan
        self._stream = _exchange_stream(device) if device.type == "cuda" else None
        self._result: list[CarryT] | None = None
        if self._stream is None:
            next(scan)  # start the first exchange, which overlaps with the caller's work
            return
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for t in tensors:
            t.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._result = _finish(scan)

    def wait(self) -> list[CarryT]:
        """One carry per piece. On CUDA the current stream waits, the host does not."""
        if self._result is None:
            self._result = _finish(self._scan)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for carry in self._result:
                for t in carry.tensors():
                    t.record_stream(current)
        return self._result


@torch.no_grad()
def start_scan(
    pieces: Sequence[CarryT],
    group: ProcessGroup | None,
    layout: str = "contiguous",
    *,
    reverse: bool = False,
    algorithm: str = "auto",
) -> ScanHandle[CarryT]:
    """:func:`exclusive_scan_pieces` without gradients and without waiting, so that the exchange overlaps with other work.

    On CUDA the whole scan runs on a side stream. On the CPU only the first round overlaps: for "all_gather" that is all of it.
    The calls of the ranks are not compared.
    """
    layout, algorithm = _check(pieces, layout, algorithm)
    checks.flag("reverse", reverse)
    tensors = [t for piece in pieces for t in piece.tensors()]
    picked = _pick(algorithm, tensors, group_size(group), ranks_per_node())
    return ScanHandle(_scan(pieces, _PlainTransport(group), group, layout, reverse, picked), tensors)


# --- the algorithms, over either kind of transport ----------------------------------------------------------------------------

Pending = Callable[[], Tensors]
Steps = Generator[None, None, list[CarryT]]


class _Transport(Protocol):
    """Exchanges the tensors of a carry. Each method returns a function that waits for the result."""

    def gather(self, tensors: Sequence[Tensor]) -> Pending: ...

    def shift(self, tensors: Sequence[Tensor], by: int) -> Pending: ...

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Pending: ...


class _PlainTransport:
    """Without gradients; the exchange is running when a method returns."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = cast(ProcessGroup, group)

    def gather(self, tensors: Sequence[Tensor]) -> Pending:
        pending = start_all_gather(pack(tensors), self.group)
        return lambda: unpack(pending.wait(), tensors)

    def shift(self, tensors: Sequence[Tensor], by: int) -> Pending:
        pending = start_shift(pack(tensors), by, self.group)
        return lambda: unpack(pending.wait(), tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Pending:
        pending = start_broadcast(pack(tensors), source, self.group)
        return lambda: unpack(pending.wait(), tensors)


class _DifferentiableTransport:
    """With autograd functions; ``tokens`` collects theirs, to be attached to the result."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = cast(ProcessGroup, group)
        self.tokens: list[Tensor] = []

    def _keep(self, token: Tensor, tensors: Tensors) -> Pending:
        self.tokens.append(token)
        return lambda: tensors

    def gather(self, tensors: Sequence[Tensor]) -> Pending:
        return self._keep(*collectives.gather(tensors, self.group))

    def shift(self, tensors: Sequence[Tensor], by: int) -> Pending:
        return self._keep(*collectives.shift(tensors, by, self.group))

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Pending:
        return self._keep(*collectives.broadcast(tensors, source, self.group))


def _scan(
    pieces: Sequence[CarryT], transport: _Transport, group: ProcessGroup | None, layout: Layout, reverse: bool, algorithm: str
) -> Steps[CarryT]:
    if group_size(group) == 1:
        return _on_one_rank(pieces, reverse)
    assert group is not None
    if algorithm == "all_gather":
        return _by_all_gather(pieces, transport, group, reverse)
    if layout == "contiguous":
        return _by_doubling(pieces[0], transport, group, reverse)
    return _by_doubling_zigzag(pieces, transport, group, reverse)


def _on_one_rank(pieces: Sequence[CarryT], reverse: bool) -> Steps[CarryT]:
    yield
    order = list(reversed(pieces)) if reverse else list(pieces)
    carries = [fold(order[:i]) if i else order[0].zero() for i in range(len(order))]
    return carries[::-1] if reverse else carries


def _by_all_gather(pieces: Sequence[CarryT], transport: _Transport, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    rank, world = group_rank(group), group_size(group)
    pending = transport.gather([t for piece in pieces for t in piece.tensors()])
    yield
    gathered = list(pending())
    carries: list[list[CarryT]] = []  # [piece][rank]
    for piece in pieces:
        parts, gathered = gathered[: len(piece.tensors())], gathered[len(piece.tensors()) :]
        carries.append([piece.with_tensors(tuple(part[r] for part in parts)) for r in range(world)])
    order = [(0, r) for r in range(world)] + [(1, r) for r in reversed(range(world))][: world * (len(pieces) - 1)]
    if reverse:
        order.reverse()
    sequence = [carries[p][r] for p, r in order]
    positions = [order.index((p, rank)) for p in range(len(pieces))]
    return [fold(sequence[:n]) if n else pieces[0].zero() for n in positions]


def _by_doubling(carry: CarryT, transport: _Transport, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    """``ceil(log2 W)`` rounds; after the round with distance d a rank has combined the 2d pieces up to its own."""
    world = group_size(group)
    position = world - 1 - group_rank(group) if reverse else group_rank(group)
    exclusive: CarryT | None = None
    inclusive, distance = carry, 1
    while distance < world:
        pending = transport.shift(inclusive.tensors(), -distance if reverse else distance)
        yield
        received = carry.with_tensors(pending())
        if position >= distance:
            exclusive = received if exclusive is None else received.combine(exclusive)
            inclusive = received.combine(inclusive)
        distance *= 2
    return [carry.zero() if exclusive is None else exclusive]


def _by_doubling_zigzag(pieces: Sequence[CarryT], transport: _Transport, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    """First pieces are in rank order, second pieces follow in reverse rank order. In a reverse scan the two swap roles."""
    first, second = reversed(pieces) if reverse else pieces
    last = group_size(group) - 1
    (before_first,) = yield from _by_doubling(first, transport, group, False)
    (before_second,) = yield from _by_doubling(second, transport, group, True)
    total = before_first.combine(first)
    pending = transport.broadcast(total.tensors(), last)
    yield
    total = first.with_tensors(pending())
    carries = [before_first, total.combine(before_second)]
    return carries[::-1] if reverse else carries


def _finish(scan: Steps[CarryT]) -> list[CarryT]:
    while True:
        try:
            next(scan)
        except StopIteration as end:
            return cast(list[CarryT], end.value)


@lru_cache
def _is_carry(kind: type[Carry]) -> bool:
    """Whether a class has the methods of a carry; cached, because the check is slow."""
    return issubclass(kind, Carry)


def _check(pieces: Sequence[Carry], layout: str, algorithm: str) -> tuple[Layout, Algorithm]:
    layout = check_layout(layout)
    if not isinstance(pieces, (list, tuple)):
        raise TypeError(f"pieces must be a list of carries; got {checks.typed_repr(pieces)}")
    for piece in pieces:
        _check_carry(piece, "pieces")
    expected = 2 if layout == "zigzag" else 1
    if len(pieces) != expected:
        raise ValueError(
            f"a rank holds {expected} piece{'s' if expected > 1 else ''} of the sequence under the {layout} "
            f"layout; got {len(pieces)} carries"
        )
    return layout, checks.choice("algorithm", algorithm, ALGORITHMS)


def _check_carry(carry: Any, name: str) -> None:
    if isinstance(carry, type) or not _is_carry(cast(type[Carry], type(carry))):
        raise TypeError(
            f"a scan takes carries (zero, combine, tensors, with_tensors: race_dist.carry.Carry); "
            f"got {checks.typed_repr(carry)} for {name}"
        )


def _pick(algorithm: Algorithm, tensors: Sequence[Tensor], world: int, ranks_per_node: int) -> Algorithm:
    """Inside a node one all-gather costs about what the rounds of recursive doubling do, and takes one launch."""
    if algorithm != "auto":
        return algorithm
    small = world <= ranks_per_node or world * packed_size(tensors) <= _SMALL_BUFFER
    return "all_gather" if small else "recursive_doubling"
