"""Hopper's pipelines on a machine without a GPU: Gluon kernels run as they are written, in PyTorch.

    emulated(kernel)[grid](*arguments)

``language``: what kernels call, one function each. ``values``: blocks in registers, and pointers. ``machine``: the parts of a
program, which take turns, and what they share.

Not the speed and not the compiler are checked, but the program: its numbers (operands rounded to bfloat16, products in
float32, nothing read outside a tensor) and its hand-offs. Every part, its copies and its matrix products carry a vector clock
that barriers pass on (Lamport's "happened before"), so that a buffer that is read while somebody may write it is an error,
named with both, whatever the order in which this run took them; so are an accumulator that is read before it is waited for,
an operand that no fence shows to the matrix units, a barrier that nobody waits at, and parts that wait for each other.
"""

from __future__ import annotations

from tests.kernels.emulated.language import Emulated as emulated
from tests.kernels.emulated.machine import Deadlock
from tests.kernels.emulated.values import Hazard

__all__ = ["Deadlock", "Hazard", "emulated"]
