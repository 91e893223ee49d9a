"""The one idea: every layer that mixes tokens is a scan over a monoid.

What a layer hands from one piece of a sequence to the next is a *carry*. A carry class says what the carry of no
tokens is (``zero``) and how the carries of two neighbouring pieces join (``combine``); everything else (decoding,
streaming, sequence parallelism, packed documents) is written once, over these two.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor


@runtime_checkable
class Carry(Protocol):
    """An element of a monoid made of tensors.

    ``combine`` is associative, differentiable and has ``zero`` as its identity. ``tensors`` and ``with_tensors`` are
    each other's inverse: they let a collective move a carry without knowing what it means. Shapes never depend on
    how many tokens a carry has seen.
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
    """The same carry, cut from the autograd graph."""
    return carry.with_tensors(tuple(t.detach() for t in carry.tensors()))
