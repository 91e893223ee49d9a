"""Rotary angles against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from race_dist.nn.rope import inverse_frequencies, rotate, rotation


# pi from Machin's formula, in exact arithmetic of its own
def _atan_inverse(n: int, terms: int) -> Fraction:
    return sum((Fraction((-1) ** k, (2 * k + 1) * n ** (2 * k + 1)) for k in range(terms)), Fraction(0))


PI = 4 * (4 * _atan_inverse(5, 60) - _atan_inverse(239, 20))


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e8])
@pytest.mark.parametrize("position", [0, 1, 4097, 2**24 + 1, 2**31, 2**40, 2**40 - 12345])
def test_angles_are_right_at_any_position(position: int, base: float) -> None:
    cos, sin = rotation(torch.tensor([position]), 64, base, torch.float64)
    for i, w in enumerate(inverse_frequencies(64, base)):
        assert w == base ** (-2 * i / 64)
        turns = Fraction(w) * position / (2 * PI)
        angle = float((turns - math.floor(turns)) * 2 * PI)
        assert abs(cos[0, i].item() - math.cos(angle)) < 1e-6
        assert abs(sin[0, i].item() - math.sin(angle)) < 1e-6


def test_dot_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 3, 32, dtype=torch.float64)

    def dot(i: int, j: int) -> torch.Tensor:
        at = lambda x, p: rotate(x, *rotation(torch.tensor([p]), 32, 10000.0, torch.float64))
        return (at(q, i) * at(k, j)).sum(-1)

    torch.testing.assert_close(dot(2**39 + 70, 2**39 + 3), dot(67, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(dot(1070, 1003), dot(67, 0), rtol=1e-12, atol=1e-12)


def test_positions_by_row_and_dtype() -> None:
    positions = torch.arange(6).view(2, 3)
    cos, sin = rotation(positions, 8, 10000.0)
    assert cos.shape == (2, 3, 4)
    assert cos.dtype == torch.float32
    x = torch.randn(2, 3, 5, 8).bfloat16()
    y = rotate(x, cos, sin)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=-1), x.float().norm(dim=-1))


def test_errors() -> None:
    with pytest.raises(TypeError, match="int64"):
        rotation(torch.arange(3, dtype=torch.int32), 8, 10000.0)
    with pytest.raises(ValueError, match="even head_dim; got 7"):
        rotation(torch.arange(3), 7, 10000.0)
