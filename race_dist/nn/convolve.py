"""Short convolutions of a layer's projections, wherever the tokens before a piece are; a carry with their tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from race_dist.nn.conv import ShortConv
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail import SpanWithTail, TailCarry, run_with_tail

CarryT = TypeVar("CarryT", bound=Any)


def apply_short_convs(
    tensors: tuple[Tensor, ...], convs: tuple[ShortConv | None, ...], tail: TailCarry | None, sequence: Sequence
) -> tuple[tuple[Tensor, ...], TailCarry | None]:
    """Each tensor plus its short convolution; padding is left out.

    Args:
        tensors: each ``[B, T, channels]``.
        convs: one a tensor, all of one width; None leaves the tensor as it is.
        tail: the inputs before the piece, of the tensors that have a convolution, or None.
        sequence: where the rows stand.

    Returns:
        The tensors, and the outgoing tail (None where there is no convolution, or unless ``sequence.return_carry``).
    """
    taken = [(x, conv) for x, conv in zip(tensors, convs, strict=True) if conv is not None]
    if not taken:
        return tensors, None

    def taps(piece: SpanWithTail) -> tuple[Tensor, ...]:
        return tuple(conv(x, piece.documents) for x, (_, conv) in zip(piece.tensors, taken, strict=True))

    added, tail = run_with_tail(tuple(x for x, _ in taken), taken[0][1].weight.shape[0] - 1, tail, sequence, taps)
    more = iter(added)
    return tuple(x if conv is None else x + next(more) for x, conv in zip(tensors, convs, strict=True)), tail


@dataclass(frozen=True)
class ConvolvedCarry(Generic[CarryT]):
    """The carry of a layer with short convolutions: its own, and the tail of their inputs."""

    inner: CarryT
    tail: TailCarry

    def zero(self) -> Self:
        """The carry of no tokens, shaped like this one."""
        return type(self)(self.inner.zero(), self.tail.zero())

    def combine(self, later: Self) -> Self:
        """The carry of this piece followed by ``later``."""
        return type(self)(self.inner.combine(later.inner), self.tail.combine(later.tail))

    def tensors(self) -> tuple[Tensor, ...]:
        """The layer's own tensors, then the tail's."""
        return (*self.inner.tensors(), *self.tail.tensors())

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A carry made of ``tensors``, in the order of :meth:`tensors`."""
        split = len(self.inner.tensors())
        return type(self)(self.inner.with_tensors(tuple(tensors[:split])), self.tail.with_tensors(tuple(tensors[split:])))


pytree.register_pytree_node(
    ConvolvedCarry,
    lambda c: ([c.inner, c.tail], None),
    lambda leaves, _: ConvolvedCarry(*leaves),
    serialized_type_name="race_dist.ConvolvedCarry",
)
