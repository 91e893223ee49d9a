"""A short causal depthwise convolution of a layer's projections, whose carry is the tail of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.head_partition import HeadSlice
from race_dist.nn.initialization import InitialValue, SeededModule, SlicedNormal
from race_dist.nn.mixing_layer import LayerCarry
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail_carry import SpanWithTail, TailCarry, run_with_tail

CarryT = TypeVar("CarryT", bound=Any)


class ShortConv(SeededModule):
    """``y[t, c] = sum_i weight[i, c] * x[t - width + 1 + i, c]``, within a document.

    Args:
        channels: of the whole layer's ``x``.
        width: taps; the last one belongs to the token itself. The carry holds the ``width - 1`` tokens before.
        part: the heads of which this module convolves the channels; None: all channels.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        part: HeadSlice | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, width = checks.integer("channels", channels, minimum=1), checks.integer("width", width, minimum=1)
        checks.size(2, channels=channels, width=width)
        checks.factory_kwargs(device, dtype)
        self._full_shape, self._part = (width, channels), part
        shape = self._full_shape if part is None else part.stored_shape(*self._full_shape)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def initial_values(self) -> dict[str, InitialValue]:
        std = 0.5 * self._full_shape[0] ** -0.5
        return {"weight": std if self._part is None else SlicedNormal(std, self._full_shape, self._part)}

    def forward(self, extended: Tensor, documents: Tensor | None = None) -> Tensor:
        """
        Args:
            extended: ``[B, width - 1 + T, channels]``: the tail, then the piece.
            documents: ``[width - 1 + T]``: the document of each of these tokens, or None if all are in one.

        Returns:
            ``[B, T, channels]``.
        """
        weight = self.weight if self._part is None else self._part.read(self.weight)
        return short_conv(extended, weight, documents)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, width={self.weight.shape[0]}"


def short_conv(extended: Tensor, weight: Tensor, documents: Tensor | None = None) -> Tensor:
    """:meth:`ShortConv.forward` with taps ``weight [width, channels]``."""
    width = weight.shape[0]
    length = extended.shape[1] - width + 1
    y = weight[-1] * extended[:, width - 1 :]
    for tap in range(width - 1):
        x = extended[:, tap : tap + length]
        if documents is not None:
            same = documents[tap : tap + length] == documents[width - 1 :]
            x = torch.where(same[:, None], x, 0)
        y = y + weight[tap] * x
    return y


def apply_short_convs(
    tensors: tuple[Tensor, ...], convs: tuple[ShortConv | None, ...], tail: TailCarry | None, sequence: Sequence
) -> tuple[tuple[Tensor, ...], TailCarry | None]:
    """Each tensor plus its short convolution. Padding is skipped.

    Args:
        tensors: each ``[B, T, channels]``.
        convs: one per tensor, all of one width; None leaves its tensor unchanged.
        tail: the inputs of the convolutions before this piece, or None.
        sequence: the position of the rows in their sequence.

    Returns:
        The tensors, and the outgoing tail (None without a convolution, or unless ``sequence.return_carry``).
    """
    convolved = [(x, conv) for x, conv in zip(tensors, convs, strict=True) if conv is not None]
    if not convolved:
        return tensors, None

    def convolve(piece: SpanWithTail) -> tuple[Tensor, ...]:
        return tuple(conv(x, piece.documents) for x, (_, conv) in zip(piece.tensors, convolved, strict=True))

    width = convolved[0][1].weight.shape[0]
    added, tail = run_with_tail(tuple(x for x, _ in convolved), width - 1, tail, sequence, convolve)
    terms = iter(added)
    return tuple(x if conv is None else x + next(terms) for x, conv in zip(tensors, convs, strict=True)), tail


@dataclass(frozen=True)
class ConvolvedCarry(LayerCarry, Generic[CarryT]):
    """The carry of a softmax layer with short convolutions: the attention's own, and the tail of the convolutions' inputs."""

    inner: CarryT
    tail: TailCarry

    def zero(self) -> Self:
        return type(self)(self.inner.zero(), self.tail.zero())

    def combine(self, later: Self) -> Self:
        return type(self)(self.inner.combine(later.inner), self.tail.combine(later.tail))

    def with_reset(self) -> Self:
        return type(self)(self.inner.with_reset(), self.tail.with_reset())

    def tensors(self) -> tuple[Tensor, ...]:
        """The attention's tensors, then those of the tail."""
        return (*self.inner.tensors(), *self.tail.tensors())

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        split = len(self.inner.tensors())
        return type(self)(self.inner.with_tensors(tuple(tensors[:split])), self.tail.with_tensors(tuple(tensors[split:])))

    def row_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        return (*self.inner.row_shapes(), *self.tail.row_shapes())

    def additive(self) -> tuple[bool, ...]:
        return (*self.inner.additive(), *self.tail.additive())


pytree.register_pytree_node(
    ConvolvedCarry,
    lambda c: ([c.inner, c.tail], None),
    lambda leaves, _: ConvolvedCarry(*leaves),
    serialized_type_name="race_dist.ConvolvedCarry",
)
