"""The sketch: what RACE Attention remembers of any number of tokens (SketchState)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SketchState:
    """Keys and values added into buckets: the carry of RACE Attention.

    Sketches of disjoint token sets add; with decay the earlier one is first weighted by ``exp(later.log_decay)``.

    Attributes:
        mass: ``[B, Hkv, S]``, ``mass[s] = sum_j w_j phi_s(k_j)``, float32 or float64.
        values: ``[B, Hkv, S, Dv]``, ``values[s] = sum_j w_j phi_s(k_j) v_j``, same dtype.
        log_decay: ``[B, Hkv]`` or None (no decay): the sum of the piece's log decays, by which whatever came before
            the piece is weighted. ``-inf`` means that a document began inside the piece: nothing from before it is
            seen after it. The weights are ``w_j = exp(sum of the log decays after j)``.

    With packed documents (``cu_seqlens``) the leading dimension counts documents instead of batch rows.

    Raises:
        TypeError: a field is not a tensor, or the dtype is neither float32 nor float64.
        ValueError: shapes do not fit each other.
    """

    mass: Tensor
    values: Tensor
    log_decay: Tensor | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling() or not isinstance(self.mass, Tensor):
            return  # pytree and compiler placeholders pass through here
        dtype, shape, of_values = self.mass.dtype, self.mass.shape, self.values.shape  # host time of every exchange
        for name, found in (("mass", dtype), ("values", self.values.dtype)):
            if found not in _DTYPES:
                raise TypeError(f"SketchState.{name} is {found}; sketches are float32 or float64: "
                                f"convert with .to(torch.float32)")
        if dtype != self.values.dtype:
            raise TypeError(f"SketchState.mass is {dtype} but values is {self.values.dtype}; convert one of them")
        if len(shape) != 3 or len(of_values) != 4 or of_values[:3] != shape:
            raise ValueError(f"SketchState needs mass [B, Hkv, S] and values [B, Hkv, S, Dv]; "
                             f"got {list(shape)} and {list(of_values)}")
        if self.log_decay is not None and self.log_decay.shape != shape[:2]:
            raise ValueError(f"SketchState.log_decay is [B, Hkv] = {list(shape[:2])} here; "
                             f"got {list(self.log_decay.shape)}")

    @classmethod
    def empty(cls, batch: int, heads: int, features: int, value_dim: int, *, dtype: torch.dtype = torch.float32,
              device: torch.device | str | None = None, decay: bool = False) -> SketchState:
        """The sketch of no tokens. ``dtype=torch.float64`` is the one to carry through token-by-token decoding:
        a float32 mass that is fed single tokens stops growing at 2**24."""
        return cls(torch.zeros(batch, heads, features, dtype=dtype, device=device),
                   torch.zeros(batch, heads, features, value_dim, dtype=dtype, device=device),
                   torch.zeros(batch, heads, dtype=dtype, device=device) if decay else None)

    def zero(self) -> Self:
        """The sketch of no tokens, shaped like this one."""
        return self.with_tensors(tuple(torch.zeros_like(t) for t in self.tensors()))

    def combine(self, later: Self) -> Self:
        """The sketch of this piece's tokens followed by ``later``'s: ``exp(later.log_decay) * self + later``.

        Raises:
            ValueError, TypeError: shapes or dtypes differ.
        """
        if self.values.shape != later.values.shape:
            raise ValueError(f"sketches to combine must have one shape; got values {list(self.values.shape)} and "
                             f"{list(later.values.shape)}")
        if self.mass.dtype != later.mass.dtype:
            raise TypeError(f"sketches to combine must have one dtype; got {self.mass.dtype} and {later.mass.dtype}")
        mass, values, log_decay = self.mass, self.values, self.log_decay
        if later.log_decay is not None:
            weight = later.log_decay.exp()
            mass, values = weight[..., None] * mass, weight[..., None, None] * values
            log_decay = later.log_decay if log_decay is None else log_decay + later.log_decay
        return type(self)(mass + later.mass, values + later.values, log_decay)

    def tensors(self) -> tuple[Tensor, ...]:
        """``(mass, values)`` or ``(mass, values, log_decay)``."""
        return (self.mass, self.values) if self.log_decay is None else (self.mass, self.values, self.log_decay)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A sketch made of ``tensors``, in the order of :meth:`tensors`."""
        return type(self)(*tensors)

    def to(self, *args: object, **kwargs: object) -> Self:
        """This sketch with every tensor passed through ``Tensor.to``."""
        return self.with_tensors(tuple(t.to(*args, **kwargs) for t in self.tensors()))  # type: ignore[call-overload]

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The sketches of some batch rows (or documents)."""
        return self.with_tensors(tuple(t[rows] for t in self.tensors()))


pytree.register_pytree_node(
    SketchState,
    lambda s: ([s.mass, s.values, s.log_decay], None),
    lambda leaves, _: SketchState(*leaves),
    serialized_type_name="race_dist.SketchState",
)
