"""Hopper's pipelines on a machine without a GPU: Gluon kernels run as they are written, in PyTorch.

    emulated(kernel)[grid](*arguments)

``language``: what kernels call, one function each. ``values``: blocks in registers, and pointers. ``machine``: a program's
partitions, which take turns, and what they share.

The emulation checks the program, not its speed or the compiler: its numbers (operands rounded to bfloat16, products in float32,
nothing read outside a tensor) and its hand-offs. Every partition, its copies and its matrix products carry a vector clock that
mbarriers pass on (Lamport's "happened before"). A buffer that is read while somebody may write it is an error that names both,
whatever order this run took. So are an accumulator that is read before it is waited for, an operand that no fence makes visible
to wgmma, an mbarrier that nobody waits at, and partitions that wait for each other.
"""

from __future__ import annotations

from tests.kernels.emulated.language import Emulated as emulated
from tests.kernels.emulated.machine import Deadlock
from tests.kernels.emulated.values import Hazard

__all__ = ["Deadlock", "Hazard", "emulated"]
