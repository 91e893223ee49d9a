"""Differentiable collectives over tensors that travel packed in one buffer.

Each is an autograd function whose backward is a collective too, so every rank must run it. Therefore each returns a *token*,
and :func:`attach` makes the rank's results depend on the token, even where they do not use what the collective returned.
Autograd runs functions in the reverse order of their calls, so the collectives of a backward pass run in the same order on
every rank. The loss is the sum of the ranks' losses: the gradient of a rank's input is the sum over the ranks that used it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import (
    group_rank,
    group_size,
    pack,
    start_all_gather,
    start_all_reduce,
    start_all_to_all,
    start_broadcast,
    start_shift,
    unpack,
)

Tensors = tuple[Tensor, ...]


def tree_sum(x: Tensor) -> Tensor:
    """Pairwise sum of ``[n, ...]`` over n >= 1: the same order on every rank, and small rounding errors."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0]


class _Gather(torch.autograd.Function):
    """Tensors -> token and ``[W, ...]`` per tensor. Backward: all-to-all of the gradients, and the sum for this rank's row."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> Tensors:
        ctx.group = group
        gathered = unpack(start_all_gather(pack(tensors), group).wait(), tensors)
        gathered = tuple(t.clone() for t in gathered)
        ctx.mark_non_differentiable(*[t for t in gathered if not t.is_floating_point()])
        return _token(tensors), *gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        world = group_size(ctx.group)
        returned = unpack(start_all_to_all(pack(grads, rows=world), ctx.group).wait(), [g[0] for g in grads])
        return None, *(tree_sum(g) if g.is_floating_point() else None for g in returned)


class _Shift(torch.autograd.Function):
    """Tensors -> token and the tensors of rank ``rank - by``. Backward: the opposite shift."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, by: int, *tensors: Tensor) -> Tensors:
        ctx.group, ctx.by = group, by
        received = tuple(t.clone() for t in unpack(start_shift(pack(tensors), by, group).wait(), tensors))
        ctx.mark_non_differentiable(*[t for t in received if not t.is_floating_point()])
        return _token(tensors), *received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        returned = unpack(start_shift(pack(grads), -ctx.by, ctx.group).wait(), grads)
        return None, None, *(g if g.is_floating_point() else None for g in returned)


class _Broadcast(torch.autograd.Function):
    """Tensors -> token and the tensors of group rank ``source``. Backward: the sum of the gradients, on the source."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, source: int, *tensors: Tensor) -> Tensors:
        ctx.group, ctx.source = group, source
        received = tuple(t.clone() for t in unpack(start_broadcast(pack(tensors), source, group).wait(), tensors))
        ctx.mark_non_differentiable(*[t for t in received if not t.is_floating_point()])
        return _token(tensors), *received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gathered = unpack(start_all_gather(pack(grads), ctx.group).wait(), grads)
        is_source = group_rank(ctx.group) == ctx.source
        return (
            None,
            None,
            *((tree_sum(g) if is_source else torch.zeros_like(g[0])) if g.is_floating_point() else None for g in gathered),
        )


class _SumOfOthers(torch.autograd.Function):
    """Floating-point tensors -> their sums over the other ranks: one all-reduce minus this rank's own. It is its own
    adjoint."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> Tensors:
        ctx.group = group
        return sum_of_others(tensors, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *sum_of_others(grads, ctx.group)


class _Attach(torch.autograd.Function):
    """Tokens and tensors -> the tensors; the backward pass gives the tokens zero gradients."""

    @staticmethod
    def forward(ctx: Any, count: int, *tokens_and_tensors: Tensor) -> Tensors:
        ctx.tokens = [(t.dtype, t.device) for t in tokens_and_tensors[:count]]
        return tuple(t.view_as(t) for t in tokens_and_tensors[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros((), dtype=dtype, device=device) for dtype, device in ctx.tokens), *grads


def _token(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), device=tensors[0].device)


def gather(tensors: Sequence[Tensor], group: ProcessGroup) -> tuple[Tensor, Tensors]:
    """All-gather of tensors whose shapes are equal on all ranks: a token, and ``[W, *t.shape]`` per tensor."""
    token, *gathered = _Gather.apply(group, *tensors)
    return token, tuple(gathered)


def shift(tensors: Sequence[Tensor], by: int, group: ProcessGroup) -> tuple[Tensor, Tensors]:
    """A token, and the tensors of rank ``rank - by``; zeros where there is no such rank."""
    token, *received = _Shift.apply(group, by, *tensors)
    return token, tuple(received)


def broadcast(tensors: Sequence[Tensor], source: int, group: ProcessGroup) -> tuple[Tensor, Tensors]:
    """A token, and the tensors of group rank ``source``."""
    token, *received = _Broadcast.apply(group, source, *tensors)
    return token, tuple(received)


def attach(tokens: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensors:
    """The tensors, with a dependency on the tokens in the autograd graph."""
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    if not (tokens and floating):
        return tuple(tensors)
    tied = dict(zip(floating, _Attach.apply(len(tokens), *tokens, *(tensors[i] for i in floating)), strict=True))
    return tuple(tied.get(i, t) for i, t in enumerate(tensors))


def sum_of_others(tensors: Sequence[Tensor], group: ProcessGroup) -> Tensors:
    """Sums over the other ranks of tensors of the same dtype, in one all-reduce. Not differentiable."""
    own = torch.cat([t.detach().reshape(-1) for t in tensors])
    others = start_all_reduce(own, group).wait() - own
    parts = others.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def differentiable_sum_of_others(tensors: Sequence[Tensor], group: ProcessGroup) -> Tensors:
    """:func:`sum_of_others` with gradients."""
    result: Tensors = _SumOfOthers.apply(group, *tensors)
    return result


def gather_rows(x: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """All ranks' rows ``[sum(lengths), ...]`` from x ``[lengths[rank], ...]``, differentiable."""
    longest = max(lengths)
    padded = torch.cat([x, x.new_zeros((longest - x.shape[0], *x.shape[1:]))]) if x.shape[0] < longest else x
    token, (gathered,) = gather([padded], group)
    if min(lengths) < longest:
        rows = torch.cat([gathered[r, :n] for r, n in enumerate(lengths)])
    else:
        rows = gathered.flatten(0, 1)
    return attach([token], [rows])[0]
