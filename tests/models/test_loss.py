"""The loss in chunks against PyTorch's on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from race_dist.models import linear_cross_entropy


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 11])
def test_against_whole_logits(chunk: int | None, count: int) -> None:
    h = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 13, (count,))
    labels[::3] = -100
    actual = linear_cross_entropy(h, weight, labels, chunk=chunk)
    expected = F.cross_entropy(h @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(3 * actual, (h, weight)), torch.autograd.grad(3 * expected, (h, weight)),
                    strict=True):
        torch.testing.assert_close(a, e)


def test_large_logits_stay_finite() -> None:
    h, weight = 1e3 * torch.ones(2, 4), torch.eye(4)
    h[:, 1] = -1e3
    h.requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(2e3, rel=1e-2)
    assert h.grad.isfinite().all()


def test_only_what_is_wanted() -> None:
    h, weight, labels = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(0, 9, (6,))
    linear_cross_entropy(h, weight, labels).backward()
    assert h.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, labels).requires_grad


def test_autocast_keeps_float32_sums() -> None:
    h, weight, labels = torch.randn(64, 16), torch.randn(30, 16, requires_grad=True), torch.randint(0, 30, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad.dtype == torch.float32
    assert abs(loss.item() / F.cross_entropy(h @ weight.T, labels, reduction="sum").item() - 1) < 1e-2


def test_the_operator_is_well_formed() -> None:
    h = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    arguments = (h, weight, torch.randint(0, 7, (5,)), torch.float32, 2, True, True)
    torch.library.opcheck(torch.ops.race_dist.linear_cross_entropy.default, arguments,
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
