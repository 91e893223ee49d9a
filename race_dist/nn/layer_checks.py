"""Checks of the arguments of mixing layers, in one place for all kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from race_dist import checks
from race_dist.nn.mixing_layer import LayerCarry, MixingLayer
from race_dist.nn.sequence import Sequence


def check_layer_call(
    layer: MixingLayer, x: Tensor, carry: object, sequence: object, *, dim: int, weight: Tensor, carry_type: type[LayerCarry]
) -> None:
    """Raise unless the arguments of ``layer(x, carry, sequence)`` fit the layer.

    Shapes, classes, dtypes and devices are always checked. Values are checked only on the CPU and where the layer is called by
    itself (no ``sequence``): inside a model NaN passes through, and the training loop decides what to do about it.

    Args:
        layer: named in messages.
        x: ``[B, T, dim]``.
        carry: a ``carry_type`` with this layer's shapes, or None.
        sequence: a :class:`Sequence`, or None.
        dim: the layer's width.
        weight: a tensor with the weights' dtype and device.
        carry_type: the class of the layer's carry.

    Raises:
        TypeError: an argument has another class or dtype.
        ValueError: a shape, a device or a value does not fit.
    """
    name = type(layer).__name__
    checks.tensor("x", x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x: {name} takes [B, T, dim = {dim}]; got {list(x.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, whose weights have no values: make it on the device of x ({x.device})")
    if x.dtype != weight.dtype and weight.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} has {weight.dtype} weights but x is {x.dtype}; convert one of them")
    if torch.compiler.is_compiling():
        return
    if sequence is not None:
        checks.instance("sequence", sequence, Sequence, "make it with Sequence.of(T, ...)")
    elif checks.readable(x) and not bool(x.detach().isfinite().all()):
        raise ValueError(f"x holds NaN or Inf: {name} that is called by itself takes finite numbers")
    if carry is not None:
        _check_carry(layer, checks.instance("carry", carry, carry_type, f"make it with {name}.zero_carry"), x.shape[0])


def check_zero_carry(batch: int, device: torch.device | str | None, dtype: torch.dtype, state_dtype: torch.dtype | None) -> int:
    """``batch``; TypeError or ValueError where an argument of ``zero_carry`` is invalid."""
    if not torch.compiler.is_compiling():
        checks.device("device", device)
    checks.dtype("dtype", dtype)
    if state_dtype is not None:
        checks.dtype("state_dtype", state_dtype, (torch.float64, torch.float32))
    return checks.integer("batch", batch, minimum=0, maximum=2**40)


def _check_carry(layer: MixingLayer, carry: LayerCarry, batch: int) -> None:
    name, expected = type(layer).__name__, vars(layer).get("_carry_shapes")
    if expected is None:
        expected = vars(layer)["_carry_shapes"] = layer.zero_carry(1, device="meta").row_shapes()
    try:
        found, rows = carry.row_shapes(), carry.tensors()[0].shape[0]
    except (AttributeError, IndexError, TypeError):
        raise TypeError(f"carry is not a carry of {name}: it holds something other than tensors") from None
    if len(found) != len(expected) or not all(map(_fit, found, expected)):
        raise ValueError(
            f"carry is of another layer: its tensors are {list(found)} behind the batch, those of this {name} {list(expected)}"
        )
    if rows != batch:
        raise ValueError(f"carry is of {rows} rows but x has {batch}: carry the rows of one batch")


def _fit(found: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether two shapes are equal, up to lengths that grow (None)."""
    return all(a == b or a is None or b is None for a, b in zip(found, expected))
