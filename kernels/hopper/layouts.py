"""Where the elements of a product, of an operand and of rows lie, and how they are rounded."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def product(columns):
    """The layout of a product ``[C, columns]`` on four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def left(columns):
    """The layout of a product's left operand that stays in registers."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16]), 2)


@gluon.constexpr_function
def tile(rows, columns):
    """The layout of bfloat16 rows in shared memory, as the copy engine and the matrix units want them."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.constexpr_function
def by_rows(columns):
    """A layout for moving ``[rows, columns]`` between memory and registers, 8 columns a thread."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLAIN_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def rounded(x):
    """x rounded to a bfloat16 number (ties away from 0), still float32. To bfloat16 and back would go through the unit of
    exponentials, at an eighth of the rate."""
    return ((x.to(gl.int32, bitcast=True) + 0x8000) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def cut(x):
    """x without the digits that a bfloat16 number has no room for, still float32: the first of two parts, whose second makes up
    for what is missing."""
    return (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)
