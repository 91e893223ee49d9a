"""The Hopper pipelines on a GPU, against the chunked pass in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.problems import both, check_pipelines, drawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

PROBLEMS: dict[str, dict[str, object]] = {
    "one chunk": {"length": 64},
    "one token more": {"length": 65},
    "ragged": {"length": 3001},
    "states": {"length": 3001, "states": True},
    "grouped": {"length": 3001, "repeats": 3, "heads": 2},
    "masked": {"length": 1500, "masked": True, "dim": 64},
    "narrow values": {"length": 1500, "value_dim": 72, "dim": 96},
    "many tables": {"length": 1500, "tables": 32, "planes": 1, "decay": "token"},
    "one table": {"tables": 1, "planes": 6},
    "many features": {"length": 3001, "tables": 1, "planes": 8, "states": True},
    "many features, decay": {
        "length": 3001,
        "tables": 2,
        "planes": 7,
        "decay": "token",
        "normalization": "none",
        "states": True,
    },
    "many features, documents": {
        "documents": [0, 64, 128, 1500, 3000],
        "length": 3000,
        "tables": 3,
        "planes": 5,
        "masked": True,
        "decay": "token",
    },
    "many features, one column block": {"length": 1500, "tables": 1, "planes": 8, "value_dim": 64},
    "many features, narrow values": {"length": 1500, "tables": 3, "planes": 5, "value_dim": 72, "states": True},
    "many features, two rows": {"batch": 2, "length": 1500, "tables": 1, "planes": 7, "mean": 1.0, "decay": "token"},
    "two rows": {"batch": 2, "length": 1500, "tables": 2, "planes": 2},
    "decay": {"length": 3000, "decay": "token", "normalization": "none", "states": True},
    "decay and a denominator": {"length": 3000, "decay": "token", "states": True},
    "hard resets": {"length": 3000, "decay": "hard", "normalization": "none", "repeats": 2, "heads": 2},
    "documents": {"length": 3000, "documents": [0, 700, 700, 1500, 1501, 3000], "states": True},
    "documents, decay, mask": {
        "length": 3000,
        "documents": [0, 64, 128, 1500, 3000],
        "decay": "token",
        "masked": True,
        "normalization": "none",
        "states": True,
    },
    "not causal": {"length": 3001, "causal": False, "masked": True},
    "not causal, grouped": {"length": 1000, "causal": False, "repeats": 2, "documents": [0, 300, 1000]},
    "a mean of 3": {"length": 50_000, "mean": 3.0, "heads": 2},
    "a million tokens, a mean of 1": {"length": 2**20, "mean": 1.0, "heads": 1},
    "a mean of 3, decay": {"length": 50_000, "mean": 3.0, "decay": "token", "normalization": "none", "heads": 2},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_pipelines_agree_with_float64(name: str) -> None:
    check_pipelines(*drawn(**PROBLEMS[name]))  # type: ignore[arg-type]


PLANES: dict[str, dict[str, object]] = {
    "one block": {"length": 3001, "states": True},
    "grouped, masked": {"length": 3001, "repeats": 4, "masked": True},
    "not causal": {"length": 1500, "causal": False, "repeats": 2, "value_dim": 72},
    "many features": {"length": 3001, "tables": 1, "planes": 8, "decay": "token", "normalization": "none"},
    "many tables, documents": {"documents": [0, 64, 128, 1500, 3000], "length": 3000, "tables": 3, "planes": 5},
}


@pytest.mark.parametrize("trained", [False, True], ids=["sampled", "trained"])
@pytest.mark.parametrize("name", PLANES)
def test_float32_planes_are_not_rounded(name: str, trained: bool) -> None:
    problem = {"plane_dtype": torch.float32, "trained": trained, **PLANES[name]}
    check_pipelines(*drawn(**problem), need_planes=trained)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ragged", "hard resets", "documents", "many features", "many features, decay"])
def test_pipelines_repeat_bitwise(name: str) -> None:
    p, dout, dfinal = drawn(**PROBLEMS[name])  # type: ignore[arg-type]
    runs = [both(p, dout, dfinal) for _ in range(20)]
    for forward, gradients in runs[1:]:
        assert torch.equal(forward.out, runs[0][0].out)
        assert all(torch.equal(a, b) for a, b in zip(gradients[:3], runs[0][1][:3]))
