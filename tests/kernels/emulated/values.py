"""Blocks in registers, and pointers: what a kernel's variables hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int1": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}


class Hazard(AssertionError):
    """Two accesses of which nothing says which comes first, or one that is not allowed yet."""


def torch_dtype(dtype: Any) -> torch.dtype:
    """PyTorch's name of a Triton dtype."""
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[str(dtype)]


def constant(x: Any) -> Any:
    """The value of a Triton constexpr; anything else as it is."""
    return constant(x.value) if type(x).__name__ == "constexpr" else x


class Value:
    """A block or a scalar in registers. ``pending``: which of its part's products it is, if that has not been waited for."""

    def __init__(self, x: Tensor, pending: int = 0) -> None:
        self.x, self.pending = x, pending

    def read(self) -> Tensor:
        """Its elements."""
        if self.pending:
            raise Hazard("a product is read before warpgroup_mma_wait: its registers are still being written")
        return self.x

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        return Value(self.read().view(torch_dtype(dtype)) if bitcast else self.read().to(torch_dtype(dtype)))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.read().permute(order))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.read()[index])

    def __bool__(self) -> bool:
        return bool(self.read())

    def __index__(self) -> int:
        return int(self.read())

    def __neg__(self) -> Value:
        return Value(-self.read())

    __hash__ = None  # type: ignore[assignment]


def combined(function: Callable[..., Tensor], a: Any, b: Any) -> Value:
    """``function(a, b)`` in the wider of two dtypes, also of scalars; Python's numbers take the other's."""
    a, b = constant(a), constant(b)
    if not isinstance(a, Value):
        a = Value(torch.tensor(a, dtype=_dtype_beside(a, b.dtype)))
    if not isinstance(b, Value):
        b = Value(torch.tensor(b, dtype=_dtype_beside(b, a.dtype)))
    dtype = torch.promote_types(a.dtype, b.dtype)
    return Value(function(a.read().to(dtype), b.read().to(dtype)))


def _dtype_beside(number: float, dtype: torch.dtype) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, float) and not dtype.is_floating_point:
        return torch.float32
    return torch.int32 if dtype == torch.bool else dtype


def _define(name: str, function: Callable[..., Tensor]) -> None:
    def forward(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return combined(function, self, other)

    setattr(Value, f"__{name}__", forward)
    setattr(Value, f"__r{name}__", lambda self, other: combined(function, other, self))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "rshift", "eq", "ne", "lt", "le", "gt", "ge"):
    _define(_name.rstrip("_"), getattr(operator, _name))


@dataclass
class Pointer:
    """Into a tensor's storage, ``offsets`` elements on. What lies outside of the storage is never reached."""

    memory: Tensor
    offsets: Any = 0

    @staticmethod
    def to(x: Tensor) -> Pointer:
        """The first element of x."""
        size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return Pointer(x.as_strided((size,), (1,)) if x.numel() else x.reshape(-1))

    @property
    def dtype(self) -> Pointer:
        return self

    @property
    def element_ty(self) -> torch.dtype:
        return self.memory.dtype

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, offsets + self.offsets)

    __radd__ = __add__

    def where(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, and which of them count; checked."""
        offsets = self.offsets.read() if isinstance(self.offsets, Value) else torch.tensor(int(constant(self.offsets)))
        counts = torch.tensor(True) if mask is None else mask.read()
        offsets, counts = torch.broadcast_tensors(offsets, counts)
        outside = counts & ((offsets < 0) | (offsets >= self.memory.numel()))
        if outside.any():
            raise IndexError(f"element {int(offsets[outside][0])} of a tensor whose storage holds {self.memory.numel()}")
        return offsets, counts

    def load(self, mask: Any, other: float) -> Value:
        offsets, counts = self.where(mask)
        if not counts.any():
            return Value(torch.full(offsets.shape, other, dtype=self.memory.dtype))
        found = self.memory[torch.where(counts, offsets, 0)]
        return Value(torch.where(counts, found, torch.tensor(other, dtype=self.memory.dtype)))

    def store(self, value: Any, mask: Any) -> None:
        offsets, counts = self.where(mask)
        value = value.read() if isinstance(value, Value) else torch.tensor(value)
        value = value.to(self.memory.dtype).broadcast_to(offsets.shape)
        self.memory[offsets[counts]] = value[counts]
