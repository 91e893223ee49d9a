"""Matrix products with bfloat16 operands (float32 inputs: three tf32 products), accumulated in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from race_dist.kernels.interpreter import INTERPRET as _INTERPRET

INTERPRET = tl.constexpr(_INTERPRET)


@triton.jit
def to_operand(x, c: tl.constexpr):
    """The operand of a product: bfloat16 for 16-bit inputs, float32 otherwise."""
    if c.fp32:
        return x.to(tl.float32)
    elif INTERPRET:  # it multiplies bfloat16 as integers: the same numbers as float32
        return round_operand(x.to(tl.float32), c)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def matmul(a, b, acc=None):
    """``a @ b (+ acc)`` in float32, of operands from :func:`to_operand`."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def round_operand(x, c: tl.constexpr):
    """x rounded to the precision of :func:`to_operand`, still float32. On the bits: conversion there and back is slower."""
    if c.fp32:
        return x
    else:
        return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def split_operand(x, c: tl.constexpr):
    """x as the sum (high, low) of two operands, 16 bits of mantissa together (float32: x itself, and x again, unused)."""
    if c.fp32:
        return x, x
    else:
        high = round_operand(x, c)
        return to_operand(high, c), to_operand(x - high, c)


@triton.jit
def matmul_split_rhs(a, b, acc, c: tl.constexpr):
    """``a @ b (+ acc)`` where b comes from :func:`split_operand`."""
    acc = matmul(a, b[0], acc)
    if not c.fp32:
        acc = matmul(a, b[1], acc)
    return acc


@triton.jit
def matmul_split_lhs(a, b, acc, c: tl.constexpr):
    """``a @ b (+ acc)`` where a comes from :func:`split_operand`."""
    acc = matmul(a[0], b, acc)
    if not c.fp32:
        acc = matmul(a[1], b, acc)
    return acc
