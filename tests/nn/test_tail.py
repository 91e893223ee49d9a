"""The tail is a monoid: a sequence split into pieces of any lengths, with documents, has the same tail."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from race_dist.carry import Carry
from race_dist.nn import HistoryCarry, RaceCarry, TailCarry
from race_dist.sketch import SketchState

WIDTH = 4


def tail(x: Tensor, begin: int | None = None) -> TailCarry:
    return TailCarry.of((x, x[..., 0] > 0), WIDTH, None if begin is None else torch.tensor(begin))


def same(a: TailCarry, b: TailCarry) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=3, max_size=3))
def test_combine(pieces: list[tuple[int, bool]]) -> None:
    """Pieces of 0 to 6 tokens, in some of which (in the middle) a document begins."""
    lengths = [n for n, _ in pieces]
    xs = torch.randn(2, sum(lengths), 3).split(lengths, 1)
    begins = [n // 2 if reset else None for n, reset in pieces]
    a, b, c = (tail(x, begin) for x, begin in zip(xs, begins, strict=True))
    assert same(a.combine(b).combine(c), a.combine(b.combine(c)))
    assert same(a.zero().combine(a), a)
    assert same(a.combine(a.zero()), a)
    starts = [sum(lengths[:i]) + begin for i, begin in enumerate(begins) if begin is not None]
    whole = tail(torch.cat(xs, 1), starts[-1] if starts else None)
    assert same(a.combine(b).combine(c), whole)


def test_slots_that_hold_nothing_are_zero() -> None:
    carry = tail(torch.ones(1, 6, 3), begin=4)
    assert carry.count.tolist() == [2]
    assert carry.held.tolist() == [[False, False, True, True]]
    assert carry.tails[0][0, :, 0].tolist() == [0, 0, 1, 1]


def test_gradients_reach_the_tokens_that_are_kept() -> None:
    a = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    out = TailCarry.of((a,), WIDTH).combine(TailCarry.of((b,), WIDTH)).tails[0]
    out.backward(torch.arange(8.0, dtype=torch.float64).view(1, 4, 2))
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [[[0, 0], [0, 0], [0, 0], [0, 0], [0, 1]]]
    assert b.grad.tolist() == [[[2, 3], [4, 5], [6, 7]]]


def test_every_carry_follows_the_protocol() -> None:
    sketch = SketchState(torch.rand(1, 2, 4), torch.rand(1, 2, 4, 3), -torch.rand(1, 2))
    history = HistoryCarry(torch.rand(1, 3, 2, 4), torch.rand(1, 3, 2, 4), torch.ones(1, 3, dtype=torch.bool))
    for carry in (
        sketch,
        tail(torch.randn(1, 3, 2)),
        RaceCarry(sketch, tail(torch.randn(1, 3, 2))),
        RaceCarry(sketch),
        history,
    ):
        assert isinstance(carry, Carry)
        again = carry.with_tensors(carry.tensors())
        for a, b in zip(carry.combine(carry.zero()).tensors(), again.tensors(), strict=True):
            torch.testing.assert_close(a, b)
        leaves, spec = torch.utils._pytree.tree_flatten(carry)
        rebuilt = torch.utils._pytree.tree_unflatten(leaves, spec)
        assert type(rebuilt) is type(carry)
        assert all(a is b for a, b in zip(rebuilt.tensors(), carry.tensors(), strict=True))
