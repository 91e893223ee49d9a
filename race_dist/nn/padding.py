"""Padding (``key_mask``): positions that count real tokens only, and pieces with their real tokens in front.

A token at which ``key_mask`` is False is *absent*: a layer that looks back a fixed distance sees the real tokens before it, and
positions count only those. Such a layer therefore reads *compacted* pieces: in each row (in each of its documents) real tokens
come first, in their order, and padding follows them, where it cannot change the output of a real token of a causal layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCount:
    """The number of real tokens of the open document in a piece: the carry of positions.

    Attributes:
        count: ``[B]`` int64.
        reset: ``[B]`` bool: whether a document began inside the piece.
    """

    count: Tensor
    reset: Tensor

    @classmethod
    def of(cls, real: Tensor, begin: Tensor | None) -> TokenCount:
        """The count of a piece with mask ``real [B, n]``; ``begin`` as in :meth:`TailCarry.of`."""
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
        return type(self)(*tensors)


def real_positions(real: Tensor, initial: Tensor, starts: Tensor | None = None) -> Tensor:
    """``[B, n]`` int64: the number of real tokens before each row in its document.

    Args:
        real: ``[B, n]`` bool.
        initial: ``[B]`` int64: real tokens before the piece in the document that continues into it.
        starts: ``[n]`` int64: the row of the piece at which each row's document begins, negative where it began earlier;
            None: all began earlier.
    """
    before = real.cumsum(1) - real.long()
    if starts is None:
        return before + initial[:, None]
    return before - before[:, starts.clamp(min=0)] + torch.where(starts < 0, initial[:, None], 0)


class Compaction(NamedTuple):
    """The order that puts the real tokens of each document of a piece before its padding. No shape depends on the mask.

    Attributes:
        real: ``[B, n]`` bool: the rows that are not padding.
        order: ``[B, n]``: the row in each slot.
        slots: ``[B, n]``: the slot of each row.
        stop: ``[B]``: the slot after the last real token of the piece's last document.
    """

    real: Tensor
    order: Tensor
    slots: Tensor
    stop: Tensor

    @classmethod
    def of(cls, real: Tensor, begin: Tensor | None = None, documents: Tensor | None = None) -> Compaction:
        """The compaction of a piece.

        Args:
            real: ``[B, n]`` bool.
            begin: as in :meth:`TailCarry.of`.
            documents: ``[n]``: the document of each row, in ascending order, or None if all are in one.
        """
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
        """The inverse of :meth:`gather`; padding rows are 0 and have no gradient."""
        back = y.take_along_dim(_like(self.slots, y), 1)
        return torch.where(_like(self.real, y), back, torch.zeros((), dtype=y.dtype, device=y.device))


def _like(index: Tensor, x: Tensor) -> Tensor:
    """``[B, n]`` with as many trailing dimensions as ``x [B, n, ...]``."""
    return index.view(*index.shape, *(1,) * (x.dim() - 2))
