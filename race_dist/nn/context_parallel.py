"""The exchange of carries over the ranks of a sequence, for any carry: the initial carry of each span, and the final carry."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from race_dist.carry import CarryT
from race_dist.distributed.collectives import attach, broadcast
from race_dist.parallel import Layout, exclusive_scan_pieces, group_size


def exchange_carries(
    own: list[CarryT], before: CarryT, group: ProcessGroup | None, layout: Layout, *, return_carry: bool
) -> tuple[list[CarryT], CarryT | None]:
    """The carry that enters each of this rank's spans, and the carry after the whole sequence. Every rank calls it.

    Args:
        own: one carry per span, in the order of ``Sequence.spans``; their tensors have a batch dimension in front.
        before: the carry before the sequence, the same on every rank.
        group, layout: the ranks that share the sequence.
        return_carry: whether the carry after the sequence is needed; otherwise None is returned in its place.
    """
    if group is None:
        return [before], before.combine(own[0]) if return_carry else None
    parts = 2 if layout == "zigzag" else 1
    documents = len(own) // parts  # zigzag splits each document on its own: documents become batch rows of one carry
    first = _stack([before, *[before.zero()] * (documents - 1)])
    pieces = [_stack(own[part::parts]) for part in range(parts)]
    initial = [first.combine(scanned) for scanned in exclusive_scan_pieces(pieces, group, layout)]
    after = None
    if return_carry:
        last = _unstack(initial[-1].combine(pieces[-1]), documents - 1, documents)
        token, received = broadcast(last.tensors(), 0 if parts == 2 else group_size(group) - 1, group)
        after = last.with_tensors(attach([token], received))
    return [_unstack(initial[i % parts], i // parts, documents) for i in range(len(own))], after


def _stack(carries: list[CarryT]) -> CarryT:
    """Several carries as the batch rows of one."""
    columns = zip(*(carry.tensors() for carry in carries), strict=True)
    return carries[0] if len(carries) == 1 else carries[0].with_tensors(tuple(torch.cat(parts) for parts in columns))


def _unstack(carry: CarryT, index: int, count: int) -> CarryT:
    """The inverse of :func:`_stack`: carry ``index`` of ``count``."""
    return carry.with_tensors(tuple(t.chunk(count)[index] for t in carry.tensors()))
