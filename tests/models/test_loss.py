"""The chunked loss against PyTorch's loss on all logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from race_dist.models import linear_cross_entropy
from race_dist.models.loss import HAS_LIGER


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
    for a, e in zip(torch.autograd.grad(3 * actual, (h, weight)), torch.autograd.grad(3 * expected, (h, weight)), strict=True):
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
    torch.library.opcheck(
        torch.ops.race_dist.linear_cross_entropy.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


FUSED = """
import torch
from race_dist.models.loss import IGNORE_INDEX, linear_cross_entropy
g = torch.Generator().manual_seed(0)
for narrow, limit in ((False, 1e-5), (True, 2e-2)):
    for need_h, need_weight in ((True, True), (True, False), (False, True), (False, False)):
        h, weight = torch.randn(70, 24, generator=g), torch.randn(50, 24, generator=g) / 5
        labels = torch.randint(0, 50, (70,), generator=g)
        labels[::6] = IGNORE_INDEX
        results = []
        for fused in (False, True):
            leaves = [h.clone().requires_grad_(need_h), weight.clone().requires_grad_(need_weight)]
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = linear_cross_entropy(*leaves, labels, fused=fused)
            if need_h or need_weight:
                (3 * loss).backward()
            results.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
            assert len(results[-1]) == 1 + need_h + need_weight
        for wanted, got in zip(*results, strict=True):
            assert got.dtype == wanted.dtype == torch.float32
            assert float((got - wanted).norm() / wanted.norm()) <= limit, (narrow, need_h, need_weight)
print("alike")
"""


@pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel is not installed")
def test_the_fused_kernel_gives_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FUSED],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.stdout == "alike\n", done.stderr


def test_the_fused_kernel_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install "race-dist\[liger\]"'):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(6, 8), torch.zeros(4, dtype=torch.int64), fused=True)
