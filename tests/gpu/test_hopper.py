"""Hopper's pipelines on a card, against the chunked pass in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from race_dist.ops import chunked
from race_dist.ops.problem import Problem
from race_dist.sketch import SketchState
from tests.gpu.test_kernels import both, double, problem
from tests.ops.cases import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")]
triton_backend = pytest.importorskip("race_dist.ops.triton")

PROBLEMS: dict[str, dict[str, object]] = {
    "one chunk": {"length": 64}, "one token more": {"length": 65}, "ragged": {"length": 3001},
    "states": {"length": 3001, "states": True}, "grouped": {"length": 3001, "repeats": 3, "heads": 2},
    "masked": {"length": 1500, "masked": True, "dim": 64}, "narrow values": {"length": 1500, "value_dim": 72, "dim": 96},
    "many tables": {"length": 1500, "tables": 32, "planes": 1, "decay": "token"}, "one table": {"tables": 1, "planes": 6},
    "many features": {"length": 3001, "tables": 1, "planes": 8, "states": True},
    "many features, decay": {"length": 3001, "tables": 2, "planes": 7, "decay": "token", "normalization": "none",
                             "states": True},
    "many features, documents": {"documents": [0, 64, 128, 1500, 3000], "length": 3000, "tables": 3, "planes": 5,
                                 "masked": True, "decay": "token"},
    "two rows": {"batch": 2, "length": 1500, "tables": 2, "planes": 2},
    "decay": {"length": 3000, "decay": "token", "normalization": "none", "states": True},
    "decay and a denominator": {"length": 3000, "decay": "token", "states": True},
    "hard resets": {"length": 3000, "decay": "hard", "normalization": "none", "repeats": 2, "heads": 2},
    "documents": {"length": 3000, "documents": [0, 700, 700, 1500, 1501, 3000], "states": True},
    "documents, decay, mask": {"length": 3000, "documents": [0, 64, 128, 1500, 3000], "decay": "token", "masked": True,
                               "normalization": "none", "states": True},
    "not causal": {"length": 3001, "causal": False, "masked": True}, "not causal, grouped": {
        "length": 1000, "causal": False, "repeats": 2, "documents": [0, 300, 1000]},
    "a mean of 3": {"length": 50_000, "mean": 3.0, "heads": 2},
    "a million tokens, a mean of 1": {"length": 2**20, "mean": 1.0, "heads": 1},
    "a mean of 3, decay": {"length": 50_000, "mean": 3.0, "decay": "token", "normalization": "none", "heads": 2},
}


def drawn(*, length: int = 1000, dim: int = 128, value_dim: int | None = None, batch: int = 1, decay: str = "",
          documents: list[int] | None = None, masked: bool = False, states: bool = False, **options: object
          ) -> tuple[Problem, Tensor, SketchState | None]:
    """A problem with every option, and gradients of its output and final state."""
    g = torch.Generator("cuda").manual_seed(1)
    base = problem(length=length * batch, dim=dim, **options)  # type: ignore[arg-type]
    rows = lambda x: x.view(batch, length, *x.shape[2:])
    heads, features = base.k.shape[2], base.features
    p = replace(base, q=rows(base.q), k=rows(base.k), v=rows(base.v[..., :value_dim]).contiguous())
    if decay:
        rate = -0.05 * torch.rand(batch, length, heads, device="cuda", generator=g)
        if decay == "hard":
            rate[torch.rand(rate.shape, device="cuda", generator=g) < 0.02] = -300.0
        p = replace(p, log_decay=rate)
    if documents is not None:
        p = replace(p, cu_seqlens=torch.tensor(documents, device="cuda"))
    if masked:
        p = replace(p, key_mask=torch.rand(batch, length, device="cuda", generator=g) > 0.3)
    dout = torch.randn(*p.q.shape[:3], p.v.shape[3], device="cuda", generator=g).to(p.q.dtype)
    if not states:
        return p, dout, None
    shape = (p.num_states, heads, features)
    normal = lambda *s: torch.randn(*s, device="cuda", generator=g)
    initial = SketchState(10 * torch.rand(shape, device="cuda", generator=g), 10 * normal(*shape, p.v.shape[3]))
    return replace(p, initial=initial), dout, SketchState(0.1 * normal(*shape), 0.1 * normal(*shape, p.v.shape[3]))


@pytest.mark.parametrize("name", PROBLEMS)
def test_pipelines_agree_with_float64(name: str) -> None:
    p, dout, dfinal = drawn(**PROBLEMS[name])  # type: ignore[arg-type]
    assert triton_backend._Call(p, False, (dout,)).plan.pipe
    forward, gradients = both(p, dout, dfinal)
    right = chunked.forward(double(p))
    right_gradients = chunked.backward(double(p), right, dout.double(), None if dfinal is None else dfinal.to(torch.float64),
                                       need_planes=False)
    found = {"out": relative_error(forward.out, right.out), "final": relative_error(forward.final.values, right.final.values)}
    for part in ("q", "k", "v", "beta", "log_decay"):
        mine, theirs = getattr(gradients, part), getattr(right_gradients, part)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            found[f"d{part}"] = relative_error(mine, theirs)
    if dfinal is not None:
        for part in ("mass", "values"):
            if p.normalization == "global" or part == "values":
                found[f"dinitial.{part}"] = relative_error(getattr(gradients.initial, part),
                                                           getattr(right_gradients.initial, part))
    assert max(found["out"], found["final"]) <= 4e-3, found
    assert found.pop("dbeta") <= 5e-2, found  # a sum over all tokens that nearly cancels
    assert max(found.values()) <= 1e-2, found


@pytest.mark.parametrize("name", ["ragged", "hard resets", "documents", "many features"])
def test_pipelines_repeat_bitwise(name: str) -> None:
    p, dout, dfinal = drawn(**PROBLEMS[name])  # type: ignore[arg-type]
    runs = [both(p, dout, dfinal) for _ in range(20)]
    for forward, gradients in runs[1:]:
        assert torch.equal(forward.out, runs[0][0].out)
        assert all(torch.equal(a, b) for a, b in zip(gradients[:3], runs[0][1][:3]))
