"""The exclusive scan over ranks: what enters each rank's piece of the sequence, for any carry.

A carry is an element of a monoid (:mod:`race_dist.carry`), so the scan is written once: *all_gather* hands every carry to
every rank, which folds those before it by pairs; *recursive_doubling* takes ``ceil(log2 W)`` rounds, in round i of which
a rank hears from the rank ``2**i`` places before it all that this one knows. Both are exact, differentiable through
``combine``, and combine in an order that depends on nothing but ranks.
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

_SMALL_BUFFER = 2**20  # bytes of all ranks' carries below which latency counts, not their number


def fold(carries: Sequence[CarryT]) -> CarryT:
    """Combine one or more carries, earliest first, by pairs: long sums lose few digits."""
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
    """The combination of the carries of all ranks before this one, in rank order; ``carry.zero()`` on the first.

    Differentiable, for any carry. Every rank of the group calls it, forward and backward.

    Args:
        carry: this rank's: the summary of its piece of the sequence. Shapes and dtypes are the same on every rank.
        group: the ranks, in the order of their pieces; None is one rank.
        reverse: from the last rank towards the first: the combination of ranks W-1, ..., r+1, in this order (the
            higher rank is the earlier operand). The adjoint of the forward scan.
        algorithm: "all_gather", "recursive_doubling", or "auto", which picks by the ranks and the bytes of a carry.

    Raises:
        ValueError: no such algorithm, or the ranks' calls do not fit each other (compared before data moves).
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
    """What enters each of this rank's pieces of the sequence: :func:`exclusive_scan` for any shard layout.

    Args:
        pieces: summaries of this rank's pieces in local order: one (contiguous) or two (zigzag). Documents that zigzag
            cuts one by one are a batch dimension of the carries.
        group, algorithm: as for :func:`exclusive_scan`.
        layout: "contiguous" or "zigzag".
        reverse: from the end of the sequence towards its beginning.

    Returns:
        One carry a piece.

    Raises:
        ValueError: as :func:`exclusive_scan`, and when the layout does not have this many pieces.
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
    wire = _Differentiable(group)
    scan = _scan(pieces, wire, group, layout, reverse, _pick(algorithm, tensors, world, ranks_per_node()))
    result = _finish(scan)
    return [c.with_tensors(attach(wire.tokens, c.tensors())) for c in result]


@eager
def exclusive_sum(carry: CarryT, group: ProcessGroup | None) -> CarryT:
    """The sum of the *other* ranks' carries, tensor by tensor, by one all-reduce. Differentiable.

    What non-causal attention needs in place of the scan; the carry's ``combine`` must be addition.

    Raises:
        TypeError: a tensor of the carry is not floating point.
        ValueError: the ranks' calls do not fit each other.
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
    """The stream that exchanges run on, one after another, as a group's collectives do."""
    return torch.cuda.Stream(device)


class ScanHandle(Generic[CarryT]):
    """A scan under way (:func:`start_scan`); :meth:`wait` gives what enters each piece."""

    def __init__(self, scan: Generator[None, None, list[CarryT]], tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        self._scan = scan
        self._stream = _exchange_stream(device) if device.type == "cuda" else None
        self._result: list[CarryT] | None = None
        if self._stream is None:
            next(scan)  # the first exchange is launched and runs beside what the caller does next
            return
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for t in tensors:
            t.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._result = _finish(scan)

    def wait(self) -> list[CarryT]:
        """One carry a piece. On CUDA the current stream waits, the host does not."""
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
    """:func:`exclusive_scan_pieces` without gradients and without waiting: the exchange runs beside what the caller does next.

    On CUDA all of it runs on a stream of its own; on the CPU the first round does, so "all_gather" overlaps whole.
    The ranks' calls are not compared.
    """
    layout, algorithm = _check(pieces, layout, algorithm)
    checks.flag("reverse", reverse)
    tensors = [t for piece in pieces for t in piece.tensors()]
    picked = _pick(algorithm, tensors, group_size(group), ranks_per_node())
    return ScanHandle(_scan(pieces, _Raw(group), group, layout, reverse, picked), tensors)


# --- the algorithms, over either kind of wire ----------------------------------------------------------------------------

Ticket = Callable[[], Tensors]
Steps = Generator[None, None, list[CarryT]]


class _Wire(Protocol):
    """Moves a carry's tensors; a ticket waits for the result."""

    def gather(self, tensors: Sequence[Tensor]) -> Ticket: ...

    def shift(self, tensors: Sequence[Tensor], by: int) -> Ticket: ...

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Ticket: ...


class _Raw:
    """No gradients; the exchange is under way when a method returns."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = cast(ProcessGroup, group)

    def gather(self, tensors: Sequence[Tensor]) -> Ticket:
        pending = start_all_gather(pack(tensors), self.group)
        return lambda: unpack(pending.wait(), tensors)

    def shift(self, tensors: Sequence[Tensor], by: int) -> Ticket:
        pending = start_shift(pack(tensors), by, self.group)
        return lambda: unpack(pending.wait(), tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Ticket:
        pending = start_broadcast(pack(tensors), source, self.group)
        return lambda: unpack(pending.wait(), tensors)


class _Differentiable:
    """Autograd functions; ``tokens`` of those that ran, to be attached to the result."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = cast(ProcessGroup, group)
        self.tokens: list[Tensor] = []

    def _keep(self, token: Tensor, tensors: Tensors) -> Ticket:
        self.tokens.append(token)
        return lambda: tensors

    def gather(self, tensors: Sequence[Tensor]) -> Ticket:
        return self._keep(*collectives.gather(tensors, self.group))

    def shift(self, tensors: Sequence[Tensor], by: int) -> Ticket:
        return self._keep(*collectives.shift(tensors, by, self.group))

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> Ticket:
        return self._keep(*collectives.broadcast(tensors, source, self.group))


def _scan(
    pieces: Sequence[CarryT], wire: _Wire, group: ProcessGroup | None, layout: Layout, reverse: bool, algorithm: str
) -> Steps[CarryT]:
    if group_size(group) == 1:
        return _on_one_rank(pieces, reverse)
    assert group is not None
    if algorithm == "all_gather":
        return _by_all_gather(pieces, wire, group, reverse)
    if layout == "contiguous":
        return _by_doubling(pieces[0], wire, group, reverse)
    return _by_doubling_zigzag(pieces, wire, group, reverse)


def _on_one_rank(pieces: Sequence[CarryT], reverse: bool) -> Steps[CarryT]:
    yield
    order = list(reversed(pieces)) if reverse else list(pieces)
    carries = [fold(order[:i]) if i else order[0].zero() for i in range(len(order))]
    return carries[::-1] if reverse else carries


def _by_all_gather(pieces: Sequence[CarryT], wire: _Wire, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    rank, world = group_rank(group), group_size(group)
    ticket = wire.gather([t for piece in pieces for t in piece.tensors()])
    yield
    gathered = list(ticket())
    every: list[list[CarryT]] = []  # [piece][rank]
    for piece in pieces:
        parts, gathered = gathered[: len(piece.tensors())], gathered[len(piece.tensors()) :]
        every.append([piece.with_tensors(tuple(part[r] for part in parts)) for r in range(world)])
    order = [(0, r) for r in range(world)] + [(1, r) for r in reversed(range(world))][: world * (len(pieces) - 1)]
    if reverse:
        order.reverse()
    sequence = [every[p][r] for p, r in order]
    places = [order.index((p, rank)) for p in range(len(pieces))]
    return [fold(sequence[:place]) if place else pieces[0].zero() for place in places]


def _by_doubling(carry: CarryT, wire: _Wire, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    """``ceil(log2 W)`` rounds; after the round of distance d a rank knows the 2d pieces up to its own."""
    world = group_size(group)
    place = world - 1 - group_rank(group) if reverse else group_rank(group)
    before: CarryT | None = None
    upto, distance = carry, 1
    while distance < world:
        ticket = wire.shift(upto.tensors(), -distance if reverse else distance)
        yield
        received = carry.with_tensors(ticket())
        if place >= distance:
            before = received if before is None else received.combine(before)
            upto = received.combine(upto)
        distance *= 2
    return [carry.zero() if before is None else before]


def _by_doubling_zigzag(pieces: Sequence[CarryT], wire: _Wire, group: ProcessGroup, reverse: bool) -> Steps[CarryT]:
    """First pieces lie in rank order, second pieces after them in the opposite order. Backwards the two swap roles."""
    first, second = reversed(pieces) if reverse else pieces
    last = group_size(group) - 1
    (before_first,) = yield from _by_doubling(first, wire, group, False)
    (before_second,) = yield from _by_doubling(second, wire, group, True)
    total = before_first.combine(first)
    ticket = wire.broadcast(total.tensors(), last)
    yield
    total = first.with_tensors(ticket())
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
    """Whether it has a carry's methods; looked up once a class."""
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
