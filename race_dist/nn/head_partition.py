"""Which heads of a layer a module holds: all of them, or those of one tensor-parallel rank of a host framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadRange:
    """Heads ``first`` to ``first + count`` of a layer that has ``total``."""

    first: int
    count: int
    total: int

    def narrow(self, full: Tensor, dim: int) -> Tensor:
        """The part of ``full`` that belongs to these heads; dimension ``dim`` goes over all heads, any width per head."""
        width = full.shape[dim] // self.total
        return full.narrow(dim, self.first * width, self.count * width)


@dataclass(frozen=True)
class HeadAxis:
    """Which dimension of a parameter goes over heads, and over which: query heads, key/value heads, or none ("shared")."""

    heads: Literal["query", "key_value", "shared"]
    dim: int = 0


@dataclass(frozen=True)
class HeadPartition:
    """The heads of one module, out of the heads of the whole layer that its config describes.

    A host framework subclasses it where reading a parameter needs communication, for example because ranks that share a
    key/value head must sum their gradients.

    Attributes:
        query, key_value: the heads that this module computes.
        kv_replicated: whether parameters of key/value heads are stored for all heads of the layer, because one key/value head
            serves several ranks; :meth:`read` then selects this module's.
    """

    query: HeadRange
    key_value: HeadRange
    kv_replicated: bool = False

    @classmethod
    def whole(cls, num_heads: int, num_kv_heads: int) -> HeadPartition:
        """The partition of a module that has every head."""
        return cls(HeadRange(0, num_heads, num_heads), HeadRange(0, num_kv_heads, num_kv_heads))

    def stored(self, full: Tensor, axis: HeadAxis) -> Tensor:
        """The part of the whole layer's values ``full`` that this module's parameter holds."""
        if axis.heads == "shared" or self._stores_all(axis):
            return full
        return self._range(axis).narrow(full, axis.dim)

    def stored_shape(self, full: tuple[int, ...], axis: HeadAxis) -> tuple[int, ...]:
        """The shape of this module's parameter, of which the whole layer's has shape ``full``."""
        return tuple(self.stored(torch.empty(full, device="meta"), axis).shape)

    def read(self, parameter: Tensor, axis: HeadAxis) -> Tensor:
        """The part of a stored parameter that the forward pass uses."""
        return self._range(axis).narrow(parameter, axis.dim) if self._stores_all(axis) else parameter

    def _stores_all(self, axis: HeadAxis) -> bool:
        return axis.heads == "key_value" and self.kv_replicated

    def _range(self, axis: HeadAxis) -> HeadRange:
        return self.query if axis.heads == "query" else self.key_value


class HeadSlice(NamedTuple):
    """A partition and the axis of one parameter."""

    partition: HeadPartition
    axis: HeadAxis

    def stored(self, full: Tensor) -> Tensor:
        """:meth:`HeadPartition.stored`."""
        return self.partition.stored(full, self.axis)

    def stored_shape(self, *full: int) -> tuple[int, ...]:
        """:meth:`HeadPartition.stored_shape`."""
        return self.partition.stored_shape(full, self.axis)

    def read(self, parameter: Tensor) -> Tensor:
        """:meth:`HeadPartition.read`."""
        return self.partition.read(parameter, self.axis)
