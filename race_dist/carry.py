"""Carries: every layer that mixes tokens is a scan over a monoid.

A *carry* is the state that a layer passes from one piece of a sequence to the next. A carry class defines the carry of no
tokens (``zero``) and the combination of the carries of two neighbouring pieces (``combine``). Decoding, streaming, context
parallelism and packed documents are written once, over these two operations.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor


@runtime_checkable
class Carry(Protocol):
    """An element of a monoid made of tensors.

    ``combine`` is associative, differentiable and has ``zero`` as its identity. ``tensors`` and ``with_tensors`` are
    inverses, with which collectives send a carry of any class. Shapes do not depend on the number of tokens.
    """

    def zero(self) -> Self:
        """The carry of an empty piece, with this carry's shapes, dtypes and device."""
        ...

    def combine(self, later: Self) -> Self:
        """The carry of this piece followed by ``later``."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The carry's tensors, in a fixed order."""
        ...

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A carry like this one made of other tensors of the same shapes."""
        ...


CarryT = TypeVar("CarryT", bound=Carry)


def detach(carry: CarryT) -> CarryT:
    """The same carry, detached from the autograd graph."""
    return carry.with_tensors(tuple(t.detach() for t in carry.tensors()))
