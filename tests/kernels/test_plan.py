"""Plans: which kernels are chosen for which shapes, and that smaller GPUs get kernels that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from race_dist.kernels import plan as plan_module
from race_dist.kernels.plan import KERNELS, Spec, make_plan, shared_bytes, work_bucket
from race_dist.kernels.tiles import MAX_PIPELINE_TILE, fitted_tile

HOPPER, AMPERE, ADA = 232_448, 166_912, 101_376
BASE = Spec(
    D=128,
    Dv=128,
    L=4,
    P=4,
    G=1,
    C=0,
    SB=0,
    stages=0,
    causal=True,
    is_global=True,
    is_bucket=False,
    decay=False,
    masked=False,
    packed=False,
    fp32=False,
    fp16=False,
    split_planes=False,
    tma=False,
)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as for a GPU, also where the kernels are interpreted."""
    monkeypatch.setattr(plan_module, "INTERPRET", False)


@pytest.mark.parametrize("limit", [HOPPER, AMPERE, ADA])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"G": 8},
        {"L": 1, "P": 8},
        {"fp32": True},
        {"is_bucket": True, "is_global": False},
        {"D": 256, "Dv": 256},
        {"D": 16, "Dv": 16},
        {"L": 1, "P": 10},
    ],
)
def test_every_kernel_fits_the_gpu(limit: int, change: dict[str, int | bool]) -> None:
    plan = make_plan(replace(BASE, **change), 2**23, shared_limit=limit)
    for kernel in KERNELS:
        assert shared_bytes(kernel, plan[kernel].spec) <= limit
        assert plan[kernel].spec.C >= 16


def test_a_length_changes_the_tile_and_nothing_else() -> None:
    plans = [make_plan(BASE, work_bucket(8 * length), shared_limit=HOPPER) for length in (2**12, 2**16, 2**20, 2**22)]
    assert [plan.tile for plan in plans] == sorted(plan.tile for plan in plans)
    assert len({plan[kernel].spec for plan in plans for kernel in ["fwd"]}) == 1
    assert work_bucket(2**20) == work_bucket(2**21 - 1)


def test_families() -> None:
    assert make_plan(BASE, 2**23, shared_limit=HOPPER).recurrent
    assert not make_plan(replace(BASE, is_bucket=True, is_global=False), 2**23, shared_limit=HOPPER).recurrent
    assert not make_plan(replace(BASE, L=1, P=8), 2**23, shared_limit=HOPPER).recurrent
    assert make_plan(replace(BASE, L=1, P=8), 2**23, shared_limit=HOPPER)["fwd"].spec.NSB == 4


@pytest.mark.parametrize(
    ("change", "pipe"),
    [
        ({}, True),
        ({"causal": False}, True),
        ({"G": 8}, True),
        ({"Dv": 256}, False),
        ({"tma": False}, False),
        ({"need_planes": True}, True),
        ({"split_planes": True}, True),
        ({"fp32": True}, False),
        ({"fp16": True}, False),
        ({"L": 1, "P": 8}, True),
        ({"L": 1, "P": 8, "G": 2}, False),
        ({"L": 1, "P": 8, "causal": False}, False),
        ({"L": 1, "P": 8, "decay": True}, False),
        ({"L": 1, "P": 8, "decay": True, "is_global": False}, True),
        ({"L": 1, "P": 7, "decay": True}, True),
        ({"L": 3, "P": 6, "decay": True}, False),
    ],
)
def test_pipelines_are_chosen_where_they_fit(change: dict[str, int | bool], pipe: bool) -> None:
    spec = replace(BASE, tma=True)
    assert make_plan(replace(spec, **change), 2**23, shared_limit=HOPPER, hopper=True).pipelined == pipe
    assert not make_plan(replace(spec, **change), 2**23, shared_limit=HOPPER).pipelined


@pytest.mark.parametrize("length", [1, 64, 1000, 2**13, 100_000, 2**20, 2**20 + 1, 75_000_000, 2**30])
@pytest.mark.parametrize("rows", [1, 4, 8, 64])
def test_tiles_fill_the_sms(length: int, rows: int) -> None:
    """The chunks per SM are within 5% of an even share for long sequences, and little above it for short ones."""
    tile = fitted_tile(length, rows, 132)
    assert 64 <= tile <= MAX_PIPELINE_TILE
    assert tile % 64 == 0
    waves = -(-rows * -(-length // tile) // 132)
    share = rows * length / 64 / 132
    assert waves * (tile // 64) <= max(1.05 * share, share + 4 * waves)


def test_tiles_of_the_usual_lengths() -> None:
    assert fitted_tile(2**20, 8, 132) == 8000  # 8 waves of 132
    assert fitted_tile(2**13, 8, 132) == 512  # one of 128
    assert fitted_tile(2**13, 8, 132) == make_plan(BASE, 8 * 2**13, shared_limit=HOPPER, hopper=True, tile=512).tile
