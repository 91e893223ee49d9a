"""Inputs of race_dist.parallel on one rank: shards, scans, collectives, meshes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from race_dist import SketchState
from race_dist.parallel import (
    DataParallelModel,
    GradientReducer,
    all_gather_tensor,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_tensor,
    build_mesh,
    check_same_on_all_ranks,
    exclusive_scan,
    exclusive_scan_pieces,
    exclusive_sum,
    fold,
    full_tensor,
    gather_objects,
    group_rank,
    group_size,
    init_distributed,
    local_segments,
    new_gloo_group,
    shard_lengths,
    shard_offset,
    shard_positions,
    shard_rows,
    shard_sequence,
    shutdown,
    start_scan,
    unshard_sequence,
)
from tests.inputs import values as v
from tests.inputs.table import Subject, Value

T = 6


def x() -> Tensor:
    return torch.arange(2.0 * T).view(2, T)


def sketch() -> SketchState:
    return SketchState.empty(1, 1, 4, 2)


def documents(*, whole: bool = True) -> list[Value]:
    made = v.tensors(lambda: torch.tensor([0, 2, T]), dtypes=(torch.float32, torch.bool), optional=True)
    made += v.wrong(("falls", lambda: torch.tensor([0, 9, T])), ("starts at 1", lambda: torch.tensor([1, T])))
    return made + (v.wrong(("beyond", lambda: torch.tensor([0, T + 1]))) if whole else [])


def mesh(**arguments: object) -> object:
    init_distributed(device="cpu")
    try:
        return build_mesh(**arguments)  # type: ignore[arg-type]
    finally:
        shutdown()


CARRIES = v.instances(("tensor", x), ("class", lambda: SketchState))
LISTS = [*v.common(), *v.wrong(("of tensors", lambda: [x()]), ("a carry", sketch))]
SCAN = {"group": v.groups(), "reverse": v.flags(), "algorithm": v.choices()}
SHARDED = {
    "x": v.tensors(x, shape=False),
    "group": v.groups(),
    "layout": v.choices(),
    "cu_seqlens": documents(),
    "dim": [*v.integers(right=1), v.value("2", 2), v.value("-3", -3)],
}
REDUCED = {"x": v.tensors(x, shape=False), "group": v.groups()}
RANK = {"rank": v.integers(least=0, right=0), "world": v.integers(least=1, right=1, huge=False)}
SUBJECTS = [
    Subject("shard_sequence", shard_sequence, lambda: {"x": x(), "group": None, "dim": 1}, SHARDED),
    Subject(
        "unshard_sequence",
        unshard_sequence,
        lambda: {"x": x(), "group": None, "dim": 1},
        SHARDED | {"total": [*v.integers(least=0, right=T, optional=True), v.value("7", T + 1)]},
    ),
    Subject(
        "shard_positions",
        shard_positions,
        lambda: {"length": T, "group": None},
        {
            "length": v.integers(least=0, right=T, huge=False),
            "group": v.groups(),
            "layout": v.choices(),
            "cu_seqlens": documents(),
            "device": v.devices(),
            "total": [*v.integers(least=0, right=T, optional=True), v.value("7", T + 1)],
        },
    ),
    Subject(
        "shard_offset",
        shard_offset,
        lambda: {"length": T, "group": None},
        {"length": v.integers(least=0, right=T, huge=False), "group": v.groups()},
    ),
    Subject(
        "shard_lengths",
        shard_lengths,
        lambda: {"total": T, "world": 2},
        {"total": v.integers(least=0, right=T, huge=False), "world": v.integers(least=1, right=2)},
    ),
    Subject(
        "shard_rows",
        shard_rows,
        lambda: {"total": T, "rank": 0, "world": 1},
        {
            "total": v.integers(least=0, right=T),
            "layout": v.choices(),
            "cu_seqlens": documents(),
            "device": v.devices(),
            **RANK,
        },
    ),
    Subject(
        "local_segments",
        local_segments,
        lambda: {"length": T, "rank": 0, "world": 1},
        {
            "length": v.integers(least=0, right=T),
            "layout": v.choices(),
            "cu_seqlens": documents(whole=False),
            "offset": v.integers(least=0, right=1),
            "device": v.devices(),
            **RANK,
        },
    ),
    Subject("exclusive_scan", exclusive_scan, lambda: {"carry": sketch(), "group": None}, SCAN | {"carry": CARRIES}),
    Subject(
        "exclusive_scan_pieces",
        exclusive_scan_pieces,
        lambda: {"pieces": [sketch()], "group": None},
        SCAN | {"pieces": [*LISTS, *v.wrong(("two", lambda: [sketch()] * 2))], "layout": v.choices()},
        names={"pieces": ("piece",)},
    ),
    Subject(
        "start_scan",
        start_scan,
        lambda: {"pieces": [sketch()], "group": None},
        SCAN | {"pieces": LISTS, "layout": v.choices()},
        names={"pieces": ("piece",)},
    ),
    Subject(
        "exclusive_sum", exclusive_sum, lambda: {"carry": sketch(), "group": None}, {"carry": CARRIES, "group": v.groups()}
    ),
    Subject("fold", fold, lambda: {"carries": [sketch()]}, {"carries": LISTS}),
    *(
        Subject(name.__name__, name, lambda: {"x": x(), "group": None}, REDUCED)
        for name in (all_reduce_sum, all_reduce_max, all_gather_tensor)
    ),
    Subject(
        "broadcast_tensor",
        broadcast_tensor,
        lambda: {"x": x(), "group": None},
        REDUCED | {"source": [*v.integers(least=0, right=0), v.value("1", 1)]},
    ),
    *(
        Subject(name.__name__, name, lambda: {"group": None}, {"group": v.groups()})
        for name in (group_size, group_rank, barrier, new_gloo_group)
    ),
    Subject("gather_objects", gather_objects, lambda: {"value": 1, "group": None}, {"group": v.groups()}),
    Subject(
        "check_same_on_all_ranks",
        check_same_on_all_ranks,
        lambda: {"facts": {"a": 1}, "group": None},
        {"facts": v.common(but=("{}",)), "group": v.groups()},
    ),
    Subject("full_tensor", full_tensor, lambda: {"x": x()}, {"x": v.common(but=("tensor",))}),
    Subject(
        "GradientReducer",
        GradientReducer,
        lambda: {"parameters": [], "group": None},
        {
            "parameters": [*v.common(but=("[]", "()", "{}", "''", "tensor")), *v.wrong(("tensor", lambda: torch.ones(())))],
            "group": v.groups(),
        },
    ),
    Subject(
        "DataParallelModel.replicated",
        DataParallelModel.replicated,
        lambda: {"model": nn.Linear(1, 1), "group": None},
        {"model": v.instances(("class", lambda: nn.Linear)), "group": v.groups()},
    ),
    Subject(
        "build_mesh",
        mesh,
        lambda: {"dp": 1, "sp": 1},
        {
            "dp": v.integers(least=1, right=1),
            "sp": v.integers(least=1, right=1),
            "timeout": [*v.numbers(above=0, optional=True, right=9.0), v.value("1e300", 1e300)],
        },
    ),
]
