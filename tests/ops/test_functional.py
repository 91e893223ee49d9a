"""The attention as an op, and the way past the dispatcher."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from race_dist.attention import race_attention


def test_the_op_and_the_direct_way_are_one() -> None:
    """What a tracer watches runs as an op of that name; otherwise no op is called, and the numbers are the same."""

    class Watch(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    leaves = [torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(3)]
    planes = torch.randn(2, 2, 8)
    run = lambda: torch.autograd.grad(race_attention(*leaves, planes, 2.0).square().sum(), leaves)
    direct = run()
    with Watch():
        traced = run()
    assert any("race_dist.attention.default" in name for name in Watch.seen)
    assert any("race_dist.attention_backward" in name for name in Watch.seen)
    assert all(torch.equal(a, b) for a, b in zip(direct, traced, strict=True))
