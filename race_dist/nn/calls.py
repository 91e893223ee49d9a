"""What a mixing layer is called with, checked in one place for all kinds of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from race_dist import checks
from race_dist.carry import Carry
from race_dist.nn.sequence import Sequence


def check_layer_call(
    layer: nn.Module, x: Tensor, carry: object, sequence: object, *, dim: int, like: Tensor, kind: type
) -> None:
    """Raise unless ``layer(x, carry, sequence)`` can be meant.

    Shapes, classes, dtypes and devices are looked at, values only where the layer is called by itself (no ``sequence``) on the
    CPU: inside a model NaN goes through, and whoever trains decides what to do.

    Args:
        layer: with ``zero_carry``, and named in messages.
        x: ``[B, T, dim]``.
        carry: of class ``kind`` and of this layer's shapes, or None.
        sequence: a :class:`Sequence`, or None.
        dim: the layer's width.
        like: of the weights' dtype and device.
        kind: class of the layer's carry.

    Raises:
        TypeError: something is of another class or dtype.
        ValueError: a shape, a device or a value does not fit.
    """
    name = type(layer).__name__
    checks.tensor("x", x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x: {name} takes [B, T, dim = {dim}]; got {list(x.shape)}")
    if like.is_meta:
        raise ValueError(f"{name} is on the meta device, whose weights have no values: make it on the device of x ({x.device})")
    if x.dtype != like.dtype and like.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} has {like.dtype} weights but x is {x.dtype}; convert one of them")
    if torch.compiler.is_compiling():
        return
    if sequence is not None:
        checks.instance("sequence", sequence, Sequence, "make it with Sequence.of(T, ...)")
    elif checks.readable(x) and not bool(x.detach().isfinite().all()):
        raise ValueError(f"x holds NaN or Inf: {name} that is called by itself takes finite numbers")
    if carry is not None:
        _check_carry(layer, checks.instance("carry", carry, kind, f"make it with {name}.zero_carry"), x.shape[0])


def check_zero_carry(batch: int, device: torch.device | str | None, dtype: torch.dtype, state_dtype: torch.dtype | None) -> int:
    """The batch of a carry of no tokens; TypeError or ValueError where one of the arguments cannot be right."""
    if not torch.compiler.is_compiling():
        checks.device("device", device)
    checks.dtype("dtype", dtype)
    if state_dtype is not None:
        checks.dtype("state_dtype", state_dtype, (torch.float64, torch.float32))
    return checks.integer("batch", batch, minimum=0, maximum=2**40)


def _check_carry(layer: nn.Module, carry: Carry, batch: int) -> None:
    name, wanted = type(layer).__name__, vars(layer).get("_carry_shapes")
    if wanted is None:
        wanted = vars(layer)["_carry_shapes"] = _shapes(layer.zero_carry(1, device="meta"))  # type: ignore[operator]
    try:
        found, rows = _shapes(carry), carry.tensors()[0].shape[0]
    except (AttributeError, IndexError, TypeError):
        raise TypeError(f"carry is no carry of {name}: it holds something else than tensors") from None
    if len(found) != len(wanted) or any(
        a != b and a is not None and b is not None for ours, theirs in zip(wanted, found) for a, b in zip(ours, theirs)
    ):
        raise ValueError(f"carry is of another layer: its tensors are {found} behind the batch, those of this {name} {wanted}")
    if rows != batch:
        raise ValueError(f"carry is of {rows} rows but x has {batch}: carry the rows of one batch")


def _shapes(carry: Carry) -> list[tuple[int | None, ...]]:
    """Of a carry's tensors, behind the batch; None for a length that grows. Without a sketch's log decay: documents add one."""
    sketch = getattr(carry, "sketch", None)
    tensors = carry.tensors() if sketch is None else (sketch.mass, sketch.values, *carry.tensors()[len(sketch.tensors()) :])
    grows = sketch is None and not hasattr(getattr(carry, "inner", carry), "reset")
    return [tuple(None if grows and n == 0 else size for n, size in enumerate(t.shape[1:])) for t in tensors]
