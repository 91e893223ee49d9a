"""Rotary positions (RoPE) with exact angles at every int64 position."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from race_dist import checks

# pi to 80 digits: far more precise than the resolution 2**-64 of the table
_PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def inverse_frequencies(head_dim: int, base: float) -> list[float]:
    """``base**(-2i / D)`` for ``i < D / 2``. These float64 numbers are the exact values of the frequencies."""
    return [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]


@torch.compiler.assume_constant_result
def turns_per_token(head_dim: int, base: float) -> tuple[int, ...]:
    """The frequencies in units of ``2**-64`` turns, rounded to int64.

    A turn is ``2**64`` units, so int64 multiplication drops whole turns by overflow. The product with a position is the angle
    modulo one turn; its error is at most ``position / 2`` units (``2e-7`` radians at position ``2**40``).
    """
    return _turns_per_token(head_dim, base)


@lru_cache(maxsize=64)
def _turns_per_token(head_dim: int, base: float) -> tuple[int, ...]:
    units = [round(Fraction(w) / (2 * _PI) * 2**64) % 2**64 for w in inverse_frequencies(head_dim, base)]
    return tuple(u - 2**64 if u >= 2**63 else u for u in units)


def rotation(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles ``positions * base**(-2i / D)``.

    Args:
        positions: ``[T]`` or ``[B, T]``, int64, any value.
        head_dim: ``D``, even.
        base: of the frequencies.
        dtype: of the result; angles are computed in float64.

    Returns:
        ``cos, sin``, each ``[T, D/2]`` or ``[B, T, D/2]``.

    Raises:
        TypeError: positions are not int64.
        ValueError: head_dim is odd.
    """
    checks.tensor("positions", positions)
    head_dim, base = checks.integer("head_dim", head_dim, minimum=1), checks.number("base", base, above=1)
    checks.dtype("dtype", dtype)
    if positions.dtype != torch.int64:
        raise TypeError(f"positions are {positions.dtype}; they must be torch.int64: smaller integers wrap too early")
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim; got {head_dim}")
    units = torch.tensor(turns_per_token(head_dim, base), dtype=torch.int64)
    if positions.is_cuda and not torch.compiler.is_compiling():
        units = units.pin_memory()  # a copy from pageable memory would wait for all work queued on the device
    units = units.to(positions.device, non_blocking=True)
    angle = (positions[..., None] * units).double() * (2 * math.pi * 2.0**-64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[..., i], x[..., i + D/2])``, computed in the dtype of ``cos``.

    Args:
        x: ``[B, T, H, D]``.
        cos, sin: ``[T, D/2]`` or ``[B, T, D/2]``.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``cos``.
    """
    for name, given in (("x", x), ("cos", cos), ("sin", sin)):
        checks.tensor(name, given, dtypes=checks.DTYPES)
    if x.dim() != 4 or cos.dim() not in (2, 3) or x.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"x, cos and sin must be [B, T, H, D] and twice [T, D/2] or [B, T, D/2]; got {list(x.shape)}, "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
