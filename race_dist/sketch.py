"""The sketch: the fixed-size state of RACE Attention (SketchState)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from race_dist import checks

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SketchState:
    """Sums of keys and values per bucket: the carry of RACE Attention.

    Sketches of disjoint token sets add; with decay the earlier one is first weighted by ``exp(later.log_decay)``.

    Attributes:
        mass: ``[B, Hkv, S]``, ``mass[s] = sum_j w_j phi_s(k_j)``, float32 or float64.
        values: ``[B, Hkv, S, Dv]``, ``values[s] = sum_j w_j phi_s(k_j) v_j``, same dtype.
        log_decay: ``[B, Hkv]`` or None (no decay): the sum of the piece's log decays. Its exponential is the weight of the
            state before the piece in the state after it; ``-inf`` resets the state, where a document begins inside the piece.
            The weights are ``w_j = exp(sum of the log decays after j)``.

    With packed documents (``cu_seqlens``) the leading dimension counts documents instead of batch rows.

    Raises:
        TypeError: a field is not a tensor, or the dtype is neither float32 nor float64.
        ValueError: shapes do not fit each other.
    """

    mass: Tensor
    values: Tensor
    log_decay: Tensor | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        given = {"mass": self.mass, "values": self.values} | ({} if self.log_decay is None else {"log_decay": self.log_decay})
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"SketchState.{name} must be a torch.Tensor; got {checks.typed_repr(value)}")
            if value.layout is not torch.strided:
                raise ValueError(
                    f"SketchState.{name} must be a dense tensor, but is {value.layout}: convert it with .to_dense()"
                )
            if value.dtype not in _DTYPES:
                raise TypeError(
                    f"SketchState.{name} is {value.dtype}; sketches are float32 or float64: convert with .to(torch.float32)"
                )
            if value.dtype != self.mass.dtype:
                raise TypeError(f"SketchState.mass is {self.mass.dtype} but {name} is {value.dtype}; convert one of them")
            if value.device != self.mass.device:
                raise ValueError(f"SketchState.mass is on {self.mass.device} but {name} is on {value.device}; move one of them")
        shape, of_values = self.mass.shape, self.values.shape
        if len(shape) != 3 or len(of_values) != 4 or of_values[:3] != shape:
            raise ValueError(
                f"SketchState needs mass [B, Hkv, S] and values [B, Hkv, S, Dv]; got {list(shape)} and {list(of_values)}"
            )
        decay = self.log_decay
        if decay is not None and decay.shape != shape[:2]:
            raise ValueError(f"SketchState.log_decay is [B, Hkv] = {list(shape[:2])} here; got {list(decay.shape)}")
        if decay is not None and checks.readable(decay) and not bool((decay <= 0).all()):
            raise ValueError(
                f"SketchState.log_decay must be 0 or less (a weight of at most 1); its largest value is {decay.max().item():g}"
            )

    @classmethod
    def unchecked(cls, mass: Tensor, values: Tensor, log_decay: Tensor | None = None) -> Self:
        """Construct without checks, from tensors that the package has computed itself, or from the leaves of a pytree."""
        if torch.compiler.is_compiling():
            return cls(mass, values, log_decay)
        made = object.__new__(cls)
        vars(made).update(mass=mass, values=values, log_decay=log_decay)
        return made

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        features: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        decay: bool = False,
    ) -> SketchState:
        """The sketch of no tokens. Use ``dtype=torch.float64`` for token-by-token decoding: a float32 mass to which single
        tokens are added stops growing at 2**24.

        Raises:
            TypeError, ValueError: a count is not an integer of at least 1 (``batch``: 0), or the sketch is too large for
                any machine.
        """
        if not torch.compiler.is_compiling():
            counts = {"batch": batch, "heads": heads, "features": features, "value_dim": value_dim}
            counts = {name: checks.integer(name, count, minimum=name != "batch") for name, count in counts.items()}
            checks.size(8, **counts)
            checks.dtype("dtype", dtype, _DTYPES)
            checks.flag("decay", decay)
            batch, heads, features, value_dim = counts.values()
            device = checks.device("device", device)
        return cls.unchecked(
            torch.zeros(batch, heads, features, dtype=dtype, device=device),
            torch.zeros(batch, heads, features, value_dim, dtype=dtype, device=device),
            torch.zeros(batch, heads, dtype=dtype, device=device) if decay else None,
        )

    def zero(self) -> Self:
        """The sketch of no tokens, shaped like this one."""
        return self.with_tensors(tuple(torch.zeros_like(t) for t in self.tensors()))

    def combine(self, later: Self) -> Self:
        """The sketch of this piece's tokens followed by ``later``'s: ``exp(later.log_decay) * self + later``.

        Raises:
            ValueError, TypeError: shapes or dtypes differ.
        """
        checks.instance("later", later, SketchState)
        if self.values.shape != later.values.shape:
            raise ValueError(
                f"sketches to combine must have one shape; got values {list(self.values.shape)} and {list(later.values.shape)}"
            )
        if self.mass.dtype != later.mass.dtype:
            raise TypeError(f"sketches to combine must have one dtype; got {self.mass.dtype} and {later.mass.dtype}")
        mass, values, log_decay = self.mass, self.values, self.log_decay
        if later.log_decay is not None:
            weight = later.log_decay.exp()
            mass, values = weight[..., None] * mass, weight[..., None, None] * values
            log_decay = later.log_decay if log_decay is None else log_decay + later.log_decay
        return self.unchecked(mass + later.mass, values + later.values, log_decay)

    def tensors(self) -> tuple[Tensor, ...]:
        """``(mass, values)`` or ``(mass, values, log_decay)``."""
        return (self.mass, self.values) if self.log_decay is None else (self.mass, self.values, self.log_decay)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A sketch of other tensors, in the order of :meth:`tensors`."""
        return self.unchecked(*tensors)

    def to(self, *args: object, **kwargs: object) -> Self:
        """This sketch with every tensor passed through ``Tensor.to``.

        Raises:
            TypeError, ValueError: ``Tensor.to`` has no such arguments, or the dtype is neither float32 nor float64.
        """
        try:
            if args and (isinstance(args[0], bool) or not isinstance(args[0], (str, int, torch.device, torch.dtype, Tensor))):
                raise TypeError("that is none of these")
            moved = tuple(t.to(*args, **kwargs) for t in self.tensors())  # type: ignore[call-overload]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            given = ", ".join(
                [*map(checks.short_repr, args), *(f"{name}={checks.short_repr(value)}" for name, value in kwargs.items())]
            )
            reason = checks.short_repr((str(error).splitlines() or [""])[0], 200)
            raise ValueError(
                f"SketchState.to takes the args of torch.Tensor.to: a device, a dtype or a tensor; got ({given}): {reason}"
            ) from None
        return type(self)(*moved)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The sketches of some batch rows (or documents).

        Raises:
            TypeError, ValueError: ``rows`` is neither a slice nor a tensor of indices, or there is no such row.
        """
        if not torch.compiler.is_compiling():
            rows = checks.rows("rows", rows, self.mass.shape[0])
        return self.with_tensors(tuple(t[rows] for t in self.tensors()))


pytree.register_pytree_node(
    SketchState,
    lambda s: ([s.mass, s.values, s.log_decay], None),
    lambda leaves, _: SketchState.unchecked(*leaves),
    serialized_type_name="race_dist.SketchState",
)
