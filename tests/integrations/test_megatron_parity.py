"""A GPTModel with RACE layers is one model however its ranks are arranged: DecoderLM, to float32's digits."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

import numpy as np
from harness import spawn_ranks
from megatron_ranks import Outcome, layout, model_config, native, run
from torch.distributed import ProcessGroup

TOLERANCE = 1e-6


def layouts(_: ProcessGroup, cases: list[tuple[str, int, int, dict[str, Any], dict[str, Any]]]) -> dict[str, Outcome]:
    """Every case's outcome: (name, tp, cp, options of the model, options of the run)."""
    results = {}
    for name, tp, cp, race, options in cases:
        with layout(tp, cp):
            results[name] = run(model_config(**race), **options)
    return results


def run_cases(world: int, cases: list[tuple[str, int, int, dict[str, Any], dict[str, Any]]]) -> None:
    """Hold every case, on every rank, to DecoderLM in float64."""
    for rank in spawn_ranks(world, layouts, cases, timeout=120):
        assert rank.error is None, rank.error
        for name, _, _, race, _ in cases:
            expected, got = native(model_config(**race)), rank.value[name]
            assert got.loss == pytest.approx(expected.loss, abs=TOLERANCE), name
            assert got.grads.keys() == expected.grads.keys()
            for weight, g in expected.grads.items():
                error = np.abs(got.grads[weight] - g).max()
                assert error <= TOLERANCE * max(1.0, np.abs(g).max()), (name, weight, error)


def test_two_ranks() -> None:
    run_cases(2, [(f"tp{tp} cp{cp}", tp, cp, {}, {}) for tp, cp in [(1, 1), (1, 2), (2, 1)]])
