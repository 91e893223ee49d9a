"""DeepSpeed applies the true gradient: every ZeRO stage and mesh, with and without clipping, one launch per number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from race_dist.integrations.deepspeed.parity import Case, Ratio, cases
from tests.distributed.harness import spawn_ranks
from tests.integrations.once import once


def measure_all(group: Any, world: int) -> dict[Case, Ratio]:
    from race_dist.integrations.deepspeed.parity import measure

    return {case: measure(case) for case in cases(world)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[Case, Ratio]]]:
    """The measurements of each rank; one launch per number of ranks."""

    def launch(world: int) -> list[dict[Case, Ratio]]:
        outcomes = spawn_ranks(world, measure_all, world, timeout=60.0)
        assert not any(o.error for o in outcomes), "\n".join(o.error or "" for o in outcomes)
        return [o.value for o in outcomes]

    return lambda world: once(tmp_path_factory, f"deepspeed-gradients-{world}", lambda: launch(world))


@pytest.mark.parametrize("world", [2, 4])
def test_the_grid_is_the_whole_one(world: int) -> None:
    """Every ZeRO stage and mesh, with and without clipping, is measured."""
    meshes = {2: {(1, 2), (2, 1)}, 4: {(1, 4), (2, 2), (4, 1)}}[world]
    grid = {(case.stage, (case.sp, case.dp), case.clip > 0) for case in cases(world)}
    assert grid == {(stage, mesh, clipped) for stage in range(4) for mesh in meshes for clipped in (False, True)}


@pytest.mark.parametrize(
    "case",
    [c for world in (2, 4) for c in cases(world)],
    ids=lambda c: "-".join(f"{name}{value}" for name, value in c._asdict().items() if value != Case._field_defaults.get(name)),
)
def test_the_applied_gradient_is_the_true_one(measured: Callable[[int], list[dict[Case, Ratio]]], case: Case) -> None:
    for found in measured(case.sp * case.dp):
        ratio = found[case]
        assert ratio.spread == 0
        if case.bfloat16:  # bfloat16 gradients, rounded in a different order on each mesh
            assert ratio.ratio == pytest.approx(1, abs=2**-6)
        else:
            # the error of float32 alone is ratio.rounding, 4e-6 to 13e-6 depending on the CPU; ranks round in another order
            limit = max(1e-5, 2 * ratio.rounding)
            assert limit < 1e-4
            assert ratio.ratio == pytest.approx(1, abs=limit)
            assert ratio.distance < limit
            assert ratio.worst == pytest.approx(1, abs=1e-4)
