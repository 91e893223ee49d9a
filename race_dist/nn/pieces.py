"""A rank's pieces of a sequence: what enters each of them and what leaves the sequence, and its real tokens in front.

A token that ``key_mask`` says is padding is *absent*: what looks back a fixed distance sees the real tokens before it, and
positions count those. So a piece is *compacted* before such a layer: in each row (of each document in it) real tokens come
first, in their order, and padding after them, where a causal layer lets it change nothing that is real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.carry import CarryT
from race_dist.distributed.collectives import attach, broadcast
from race_dist.parallel import Layout, group_size
from race_dist.parallel.scan import exclusive_scan_pieces


def across_ranks(
    own: list[CarryT], before: CarryT, group: ProcessGroup | None, layout: Layout, *, return_carry: bool
) -> tuple[list[CarryT], CarryT | None]:
    """The carry that enters each of this rank's spans, and the one that leaves the sequence. Every rank calls it.

    Args:
        own: one carry a span, in the order of ``Sequence.spans``; tensors have a batch in front.
        before: what comes before the sequence, the same on every rank.
        group, layout: the ranks that share the sequence.
        return_carry: whether the outgoing carry is wanted; None is returned in its place.
    """
    if group is None:
        return [before], before.combine(own[0]) if return_carry else None
    parts = 2 if layout == "zigzag" else 1
    documents = len(own) // parts  # that were cut one by one: rows of one carry
    first = _stack([before, *[before.zero()] * (documents - 1)])
    pieces = [_stack(own[part::parts]) for part in range(parts)]
    entering = [first.combine(scanned) for scanned in exclusive_scan_pieces(pieces, group, layout)]
    outgoing = None
    if return_carry:
        last = _row(entering[-1].combine(pieces[-1]), documents - 1, documents)
        token, received = broadcast(last.tensors(), 0 if parts == 2 else group_size(group) - 1, group)
        outgoing = last.with_tensors(attach([token], received))
    return [_row(entering[i % parts], i // parts, documents) for i in range(len(own))], outgoing


def _stack(rows: list[CarryT]) -> CarryT:
    """Several carries as the batch rows of one."""
    columns = zip(*(row.tensors() for row in rows), strict=True)
    return rows[0] if len(rows) == 1 else rows[0].with_tensors(tuple(torch.cat(parts) for parts in columns))


def _row(carry: CarryT, index: int, rows: int) -> CarryT:
    """The inverse of :func:`_stack`: one of ``rows`` carries."""
    return carry.with_tensors(tuple(t.chunk(rows)[index] for t in carry.tensors()))


@dataclass(frozen=True)
class TokenCount:
    """How many real tokens of the open document a piece holds: the carry of positions.

    Attributes:
        count: ``[B]`` int64.
        reset: ``[B]`` bool: whether a document began inside the piece.
    """

    count: Tensor
    reset: Tensor

    @classmethod
    def of(cls, real: Tensor, begin: Tensor | None) -> TokenCount:
        """Of a piece whose rows are ``real [B, n]``. ``begin``: where in it its last document begins, as for TailCarry.of."""
        if begin is None:
            return cls(real.sum(1), torch.zeros_like(real[:, :1]).any(1))
        inside = torch.arange(real.shape[1], device=real.device) >= begin
        return cls((real & inside).sum(1), (begin >= 0).expand(real.shape[0]))

    def zero(self) -> Self:
        """The count of no tokens."""
        return self.with_tensors((torch.zeros_like(self.count), torch.zeros_like(self.reset)))

    def combine(self, later: Self) -> Self:
        """The count of this piece followed by ``later``."""
        return type(self)(torch.where(later.reset, later.count, self.count + later.count), self.reset | later.reset)

    def tensors(self) -> tuple[Tensor, ...]:
        """``(count, reset)``."""
        return self.count, self.reset

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A count made of ``tensors``, in the order of :meth:`tensors`."""
        return type(self)(*tensors)


def real_positions(real: Tensor, entering: Tensor, starts: Tensor | None = None) -> Tensor:
    """``[B, n]`` int64: how many real tokens of its document come before each row.

    Args:
        real: ``[B, n]`` bool.
        entering: ``[B]`` int64: real tokens, before the piece, of the document that goes on into it.
        starts: ``[n]`` int64: where in the piece each row's document begins, negative where it began before; None: all did.
    """
    before = real.cumsum(1) - real.long()
    if starts is None:
        return before + entering[:, None]
    return before - before[:, starts.clamp(min=0)] + torch.where(starts < 0, entering[:, None], 0)


class Compaction(NamedTuple):
    """A piece with the real tokens of each document in front of its padding. No shape depends on the mask.

    ``real [B, n]`` bool: the rows that are no padding; ``order [B, n]``: the row in each slot; ``slots [B, n]``: the slot of
    each row; ``stop [B]``: the slot after the last real token of the piece's last document.
    """

    real: Tensor
    order: Tensor
    slots: Tensor
    stop: Tensor

    @classmethod
    def of(cls, real: Tensor, begin: Tensor | None = None, documents: Tensor | None = None) -> Compaction:
        """Of rows ``real [B, n]``; ``begin``: where the last document begins, as for TailCarry.of; ``documents [n]``: of each
        row, never falling, or None where all are of one."""
        key = (~real).to(torch.int64)
        order = (key if documents is None else key + 2 * documents).argsort(dim=1, stable=True)
        rows = torch.arange(real.shape[1], device=real.device).expand_as(order)
        stop = TokenCount.of(real, begin).count
        return cls(
            real, order, torch.empty_like(order).scatter_(1, order, rows), stop if begin is None else stop + begin.clamp(min=0)
        )

    def gather(self, x: Tensor) -> Tensor:
        """The rows ``x [B, n, ...]``, compacted."""
        return x.take_along_dim(_like(self.order, x), 1)

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`gather`; 0, and no gradient, where a row is padding."""
        back = y.take_along_dim(_like(self.slots, y), 1)
        return torch.where(_like(self.real, y), back, torch.zeros((), dtype=y.dtype, device=y.device))


def _like(index: Tensor, x: Tensor) -> Tensor:
    """``[B, n]`` with as many trailing dimensions as ``x [B, n, ...]``."""
    return index.view(*index.shape, *(1,) * (x.dim() - 2))
