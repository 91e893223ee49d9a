"""The attention as a custom operator and as an autograd function without the dispatcher."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from race_dist.attention import race_attention


def test_the_op_and_the_direct_way_are_one() -> None:
    """Under a dispatch mode the custom operator runs; otherwise no operator is called, and the results are equal."""

    class RecordOperators(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    leaves = [torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(3)]
    planes = torch.randn(2, 2, 8)
    run = lambda: torch.autograd.grad(race_attention(*leaves, planes, 2.0).square().sum(), leaves)
    direct = run()
    with RecordOperators():
        traced = run()
    assert any("race_dist.attention.default" in name for name in RecordOperators.seen)
    assert any("race_dist.attention_backward" in name for name in RecordOperators.seen)
    assert all(torch.equal(a, b) for a, b in zip(direct, traced, strict=True))


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_function_transforms_are_right_or_point_to_the_reference(backend: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    planes = torch.randn(2, 2, 8, generator=draw, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return race_attention(x, k, v, planes, 2.0, backend=backend).square().sum()

    def forward_mode() -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(loss(torch.autograd.forward_ad.make_dual(q, v))).tangent

    leaf = q.clone().requires_grad_()
    (right,) = torch.autograd.grad(race_attention(leaf, k, v, planes, 2.0, backend="chunked").square().sum(), leaf)
    along = (right * v).sum()
    ways = {
        "grad": (lambda: torch.func.grad(loss)(q), right),
        "jacrev": (lambda: torch.func.jacrev(loss)(q), right),
        "vjp": (lambda: torch.func.vjp(loss, q)[1](torch.ones((), dtype=q.dtype))[0], right),
        "jvp": (lambda: torch.func.jvp(loss, (q,), (v,))[1], along),
        "forward mode": (forward_mode, along),
        "vmap": (lambda: torch.func.vmap(loss)(q[None])[0], loss(q)),
    }
    for name, (run, expected) in ways.items():
        if backend == "reference":
            torch.testing.assert_close(run(), expected, atol=1e-9, rtol=1e-9, msg=name)
        else:
            with pytest.raises(ValueError, match=r'race_attention .*give backend="reference" there'):
                run()
