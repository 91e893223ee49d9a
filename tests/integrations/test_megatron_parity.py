"""A GPTModel with RACE layers computes what DecoderLM does on every tp x cp x dp mesh, to float32 precision."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from harness import spawn_ranks
from megatron_ranks import LENGTH, ROWS, Outcome, Packed, layout, losses_of_training, model_config, native, run
from torch.distributed import ProcessGroup

TOLERANCE = 1e-6
BARE = {"qk_norm": False, "short_conv": 0, "decay": "none", "normalization": "global", "output_gate": False}


@dataclass(frozen=True)
class Case:
    """A mesh, the options of the model (of RaceConfig; others with an underscore) and the options of the run."""

    tp: int
    cp: int
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def outcomes(_: ProcessGroup, cases: list[Case]) -> list[Outcome]:
    results = []
    for (tp, cp), alike in itertools.groupby(
        cases, lambda case: (case.tp, case.cp)
    ):  # creating process groups is slower than a step
        with layout(tp, cp):
            results += [run(model_config(**case.model), **case.options) for case in alike]
    return results


def run_cases(world: int, cases: list[Case]) -> list[list[Outcome]]:
    """Compare every case, on every rank, with DecoderLM in float64."""
    ranks = spawn_ranks(world, outcomes, cases, timeout=120)
    for rank in ranks:
        assert rank.error is None, rank.error
    for i, case in enumerate(cases):
        packed = case.options.get("packed")
        expected = native(model_config(**case.model), packed.real if packed else None)
        for rank in ranks:
            got = rank.value[i]
            assert got.loss == pytest.approx(expected.loss, abs=TOLERANCE), case
            assert got.grads.keys() == expected.grads.keys()
            for weight, g in expected.grads.items():
                error = np.abs(got.grads[weight] - g).max()
                assert error <= TOLERANCE * max(1.0, np.abs(g).max()), (case, weight, error)
    return [rank.value for rank in ranks]


def test_one_rank_and_two() -> None:
    run_cases(1, [Case(1, 1), Case(1, 1, {"_layer_pattern": "RS", "_rope_base": None})])
    run_cases(2, [Case(1, 1), Case(1, 2), Case(2, 1)])


def trained(_: ProcessGroup) -> list[list[float]]:
    """Losses of four steps of megatron-core's optimizer, with replicated and with sharded optimizer states."""
    with layout(1, 1):
        return [losses_of_training(model_config(), 4, use_distributed_optimizer=divided) for divided in (False, True)]


def test_the_distributed_optimizer_steps_alike() -> None:
    for rank in spawn_ranks(2, trained, timeout=120):
        assert rank.error is None, rank.error
        whole, divided = rank.value
        assert whole[-1] < whole[0] - 1
        assert divided == pytest.approx(whole, abs=TOLERANCE)


def test_four_ranks() -> None:
    """tp x cp x dp, both orders of shards, fewer key/value heads than ranks, and every option that has parameters."""
    run_cases(
        4,
        [
            Case(1, 1),
            Case(1, 2),
            Case(1, 4),
            Case(1, 4, options={"order": "contiguous"}),
            Case(2, 1),
            Case(2, 1, {"_layer_pattern": "RS", "_rope_base": None}),
            Case(4, 1),
            Case(4, 1, {"train_planes": True, "normalization": "bucket"}),
            Case(2, 2),
            Case(2, 2, BARE),
            Case(2, 2, BARE | {"rope_base": 10000.0}),
            Case(2, 2, {"decay": "multiscale", "train_beta": False, "beta_init": (1.0, 3.0), "output_gate": False}),
            Case(2, 2, {"train_planes": True, "share_planes": True, "normalization": "bucket"}),
            Case(2, 2, {"conv_values": True, "gate_activation": "sigmoid"}),
        ],
    )


def test_packed_documents_are_rows() -> None:
    """THD gives the same as SBHD, padded or not, also with the context-parallel groups of packed_seq_params."""
    ragged = (LENGTH, LENGTH - 9, LENGTH // 2 + 1, 3)
    assert len(ragged) == ROWS
    run_cases(
        4,
        [
            Case(1, 4, options={"packed": Packed(), "order": "contiguous"}),
            *[
                Case(tp, cp, options={"packed": packed})
                for tp, cp, more in [(1, 4, [Packed(dynamic=2)]), (2, 2, []), (1, 1, [Packed(dynamic=2)])]
                for packed in [Packed(), Packed(ragged), *more]
            ],
        ],
    )


def test_recompute_and_determinism() -> None:
    """Recomputation of layers or of the core attention changes nothing, and a second run is bitwise the same."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    fixed = {"deterministic_mode": True}
    for _, _, once, twice in run_cases(
        4, [Case(2, 2, options=full), Case(2, 2, options=selective), Case(2, 2, options=fixed), Case(2, 2, options=fixed)]
    ):
        assert once.loss == twice.loss
        for name, g in once.grads.items():
            assert np.array_equal(g, twice.grads[name]), name
