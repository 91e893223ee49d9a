"""The exclusive scan against a fold in one process: every algorithm, direction, layout and kind of carry; gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks
from torch import Tensor

from race_dist.distributed.communication import count_bytes
from race_dist.parallel.scan import exclusive_scan, exclusive_scan_pieces, exclusive_sum, fold, start_scan
from race_dist.sketch import SketchState

ALGORITHMS = ["all_gather", "recursive_doubling"]


@dataclass(frozen=True)
class Affine:
    """x -> a x + b on vectors, with a count in int64: neither commutative nor of one dtype."""

    a: Tensor
    b: Tensor
    count: Tensor

    def zero(self) -> Self:
        return self.with_tensors(
            (torch.eye(self.a.shape[-1], dtype=self.a.dtype), torch.zeros_like(self.b), torch.zeros_like(self.count))
        )

    def combine(self, later: Self) -> Self:
        return self.with_tensors((later.a @ self.a, later.b + (later.a @ self.b[:, None])[:, 0], self.count + later.count))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b, self.count

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        return type(self)(*tensors)


def make(kind: str, seed: int) -> SketchState | Affine:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    if kind == "affine":
        return Affine(draw(3, 3), draw(3), torch.tensor(seed))
    decay = None
    if kind != "sketch":
        decay = -draw(2, 2).detach().abs()
        if kind == "reset" and seed % 3 == 1:
            decay[0] = -torch.inf
        decay.requires_grad_()
    return SketchState(draw(2, 2, 4), draw(2, 2, 4, 3), decay)


def weighted(carries, seed):
    """A loss that reads every floating-point tensor of some carries, with different weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    total = torch.zeros((), dtype=torch.float64)
    for carry in carries:
        for t in carry.tensors():
            if t.is_floating_point():
                weight = torch.randn(t.shape, dtype=torch.float64, generator=generator)
                total = total + (weight * torch.where(t.isinf(), 0.0, t)).sum()
    return total


def sharded(group, kind, layout, reverse, algorithm):
    rank, pieces = dist.get_rank(group), 2 if layout == "zigzag" else 1
    mine = [make(kind, pieces * rank + p) for p in range(pieces)]
    initial = exclusive_scan_pieces(mine, group, layout, reverse=reverse, algorithm=algorithm)
    loss = weighted(initial, rank)
    if loss.requires_grad:  # nothing enters a single piece
        loss.backward()
    raw = start_scan(mine, group, layout, reverse=reverse, algorithm=algorithm).wait()
    same = all(a.equal(b) for x, y in zip(raw, initial) for a, b in zip(x.tensors(), y.tensors()))
    grads = [t.grad for piece in mine for t in piece.tensors()]
    return [tuple(t.detach() for t in c.tensors()) for c in initial], grads, same


def on_one_rank(world, kind, layout, reverse):
    """The definition: fold all pieces before each piece, one loss, autograd."""
    pieces = 2 if layout == "zigzag" else 1
    every = {(r, p): make(kind, pieces * r + p) for r in range(world) for p in range(pieces)}
    order = [(r, 0) for r in range(world)] + ([(r, 1) for r in reversed(range(world))] if pieces == 2 else [])
    if reverse:
        order.reverse()
    initial, running = {}, every[order[0]].zero()
    for place in order:
        initial[place] = running
        running = running.combine(every[place])
    loss = sum(weighted([initial[r, p] for p in range(pieces)], r) for r in range(world))
    if loss.requires_grad:
        loss.backward()
    return [
        ([initial[r, p].tensors() for p in range(pieces)], [t.grad for p in range(pieces) for t in every[r, p].tensors()])
        for r in range(world)
    ]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scan_is_a_fold(world: int, layout: str, algorithm: str) -> None:
    for kind in ("sketch", "decay", "reset", "affine"):
        for reverse in (False, True):
            got = run_ranks(world, sharded, kind, layout, reverse, algorithm)
            for (carries, grads, same), (expected, expected_grads) in zip(got, on_one_rank(world, kind, layout, reverse)):
                assert same
                for a, b in zip(carries, expected):
                    for x, y in zip(a, b):
                        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-12)
                for x, y in zip(grads, expected_grads):
                    if y is None:
                        assert x is None or not x.any()
                    else:
                        assert x.isfinite().all()
                        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def unused(group):
    """Nothing reads the last rank's carry, and the first rank's loss does not depend on its initial carry."""
    carry = make("decay", dist.get_rank(group))
    initial = exclusive_scan(carry, group)
    initial.mass.sum().backward()
    return carry.mass.grad


def test_ranks_that_use_nothing_still_take_part() -> None:
    grads = run_ranks(3, unused)
    assert not grads[2].any()
    assert grads[0].any()


def totals(group):
    carry = make("sketch", dist.get_rank(group))
    others = exclusive_sum(carry, group)
    weighted([others], dist.get_rank(group)).backward()
    return others.values.detach(), carry.values.detach(), carry.values.grad


def test_exclusive_total() -> None:
    got = run_ranks(3, totals)
    every = sum(own for _, own, _ in got)
    for others, own, _ in got:
        torch.testing.assert_close(others, every - own)
    leaves = [make("sketch", r) for r in range(3)]
    loss = sum(weighted([fold([leaves[o] for o in range(3) if o != r])], r) for r in range(3))
    loss.backward()
    for (*_, grad), leaf in zip(got, leaves):
        torch.testing.assert_close(grad, leaf.values.grad)


def bytes_of(group, algorithm):
    with count_bytes() as count:
        exclusive_scan(make("sketch", 0), group, algorithm=algorithm)
    return count


def test_bytes_are_counted() -> None:
    size = 8 * (16 + 48)
    for count in run_ranks(4, bytes_of, "all_gather"):
        assert count.by_op == {"all_gather": (2, 40 + size)}  # a header of 40 bytes, then the carry
    calls = [c.by_op.get("shift", (0, 0)) for c in run_ranks(4, bytes_of, "recursive_doubling")]
    assert calls == [(2, 2 * size), (2, 2 * size), (1, size), (0, 0)]


def mismatch(group, what):
    odd = dist.get_rank(group) == 1
    if what == "shape":
        exclusive_scan(SketchState.empty(1, 2, 8 if odd else 4, 3), group)
    elif what == "algorithm":
        exclusive_scan(SketchState.empty(1, 2, 4, 3), group, algorithm="recursive_doubling" if odd else "all_gather")
    elif odd:
        exclusive_sum(SketchState.empty(1, 2, 4, 3), group)
    else:
        exclusive_scan(SketchState.empty(1, 2, 4, 3), group)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"shapes is \[\[1, 2, 4\], \[1, 2, 4, 3\]\] on ranks 0, 2, but \[\[1, 2, 8\].*on rank 1"),
        ("algorithm", "algorithm is all_gather on ranks 0, 2, but recursive_doubling on rank 1"),
        ("call", "call is exclusive_scan on ranks 0, 2, but exclusive_sum on rank 1"),
    ],
)
def test_a_mismatch_names_the_rank(what: str, message: str) -> None:
    with pytest.raises(RankError, match=message) as error:
        run_ranks(3, mismatch, what)
    assert all("ValueError" in e for e in error.value.errors)


def test_errors_name_the_value() -> None:
    carry = SketchState.empty(1, 1, 4, 2)
    with pytest.raises(ValueError, match="got 'ring'"):
        exclusive_scan(carry, None, algorithm="ring")
    with pytest.raises(TypeError, match=r"a scan takes carries .* got int"):
        exclusive_scan(3, None)
    with pytest.raises(ValueError, match="holds 2 pieces of the sequence under the zigzag layout; got 1"):
        exclusive_scan_pieces([carry], None, "zigzag")
