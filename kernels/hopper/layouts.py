"""Register and shared-memory layouts of products, operands and rows, and rounding to bfloat16."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def wgmma_layout(columns):
    """The register layout of a product ``[C, columns]`` on four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def lhs_layout(columns):
    """The register layout of the left operand of a product ``[C, columns]``."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16]), 2)


@gluon.constexpr_function
def shared_layout(rows, columns):
    """The shared-memory layout of bfloat16 ``[rows, columns]`` that TMA writes and wgmma reads."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.constexpr_function
def blocked_layout(columns):
    """A register layout for moving ``[rows, columns]`` to and from memory, 8 columns per thread."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


VECTOR_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of float32 [size] in shared memory
MATRIX_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))  # of float32 [rows, columns] in shared memory
LINE_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of a vector in registers, one element per thread


@gluon.jit
def round_to_bf16(x):
    """x rounded to a bfloat16 number (ties away from 0), still float32. A conversion to bfloat16 and back would go through the
    unit that computes exponentials, at an eighth of the rate."""
    return ((x.to(gl.int32, bitcast=True) + 0x8000) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def truncate_to_bf16(x):
    """x without the digits that bfloat16 does not hold, still float32: the first of two parts, whose second holds the rest."""
    return (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def to_lhs(x, layout: gl.constexpr):
    """x rounded to a bfloat16 left operand."""
    return gl.convert_layout(x.to(gl.bfloat16), layout)


@gluon.jit
def split_lhs(x, layout: gl.constexpr):
    """x as the sum of two bfloat16 left operands."""
    high = truncate_to_bf16(x)
    return to_lhs(high, layout), to_lhs(x - high, layout)
