"""Base classes of layers that mix tokens, :class:`MixingLayer`, and of their carries, :class:`LayerCarry`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from race_dist.nn.sequence import Sequence


class LayerCarry(ABC):
    """The carry of a mixing layer: an element of a monoid made of tensors (:class:`race_dist.carry.Carry`).

    Subclasses are dataclasses of tensors whose first dimension counts batch rows. ``combine`` is associative, differentiable
    and has ``zero`` as its identity. Decoding, streaming and context parallelism need nothing else from a layer.
    """

    @abstractmethod
    def zero(self) -> Self:
        """The carry of no tokens, with this carry's shapes, dtypes and device."""

    @abstractmethod
    def combine(self, later: Self) -> Self:
        """The carry of this piece followed by ``later``."""

    @abstractmethod
    def with_reset(self) -> Self:
        """This carry for a piece in which a document began before these tokens: combined with an earlier carry, it hides
        the earlier one."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The carry's tensors, in a fixed order."""

    @abstractmethod
    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A carry made of ``tensors``, in the order of :meth:`tensors`."""

    def row_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """The shape of each tensor that identifies the layer, without the batch dimension; None for a length that grows."""
        return tuple(tuple(t.shape[1:]) for t in self.tensors())

    def additive(self) -> tuple[bool, ...]:
        """For each tensor, whether ``combine`` only adds it, so that a piece can be subtracted again."""
        return (False,) * len(self.tensors())


class MixingLayer(nn.Module):
    """A layer in which tokens see each other: ``y, carry = layer(x, carry, sequence)``.

    Attributes:
        head_dim, rope_base: which rotary angles the layer reads (:meth:`Sequence.rotation`); ``rope_base`` None: none.
    """

    head_dim: int
    rope_base: float | None = None

    @abstractmethod
    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> Any:
        """The carry of no tokens: activations in ``dtype``, sums over the whole sequence in ``state_dtype``."""

    @abstractmethod
    def forward(self, x: Tensor, carry: Any = None, sequence: Sequence | None = None) -> tuple[Tensor, Any]:
        """``x [B, T, dim]`` to the same, and the outgoing carry (None unless ``sequence.return_carry``)."""
