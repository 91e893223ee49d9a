"""Inputs of race_attention, SketchState and sample_planes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from race_dist import SketchState, race_attention, sample_planes
from tests.inputs import values as v
from tests.inputs.table import Subject, Value

B, T, HQ, HKV, D, DV, L, P = 2, 5, 4, 2, 4, 6, 3, 3
S = L * 2**P
INF, NAN = v.INF, v.NAN


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def state(mass: float = 1.0, values: float = 1.0, **more: Any) -> SketchState:
    return SketchState(torch.full((B, HKV, S), mass), torch.full((B, HKV, S, DV), values), **more)


def call() -> dict[str, Any]:
    return {
        "q": normal(B, T, HQ, D),
        "k": normal(B, T, HKV, D),
        "v": normal(B, T, HKV, DV),
        "planes": sample_planes(L, P, D, seed=0),
        "beta": 2.0,
    }


def one_row() -> dict[str, Any]:
    return {name: x[:1] if name in "qkv" else x for name, x in call().items()}


def of_state(method: str) -> Any:
    return lambda **arguments: getattr(state(), method)(*arguments.values())


def full(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


def sketch_field(name: str) -> list[Value]:
    right = lambda: {"mass": torch.ones(1, 1, 4), "values": torch.ones(1, 1, 4, 2), "log_decay": torch.zeros(1, 1)}[name]
    return v.tensors(right, dtypes=(torch.float16, torch.int64, torch.float64, torch.complex64), optional=name == "log_decay")


HALVES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
SUBJECTS = [
    Subject(
        "race_attention",
        race_attention,
        call,
        {
            "q": [
                *v.tensors(lambda: call()["q"], dtypes=(*HALVES, torch.float64)),
                *v.wrong(("no heads", lambda: normal(B, T, 0, D)), ("3 heads", lambda: normal(B, T, 3, D))),
            ],
            "k": [
                *v.tensors(lambda: call()["k"], dtypes=(*HALVES, torch.float16)),
                *v.wrong(("longer", lambda: normal(B, T + 1, HKV, D)), ("wider", lambda: normal(B, T, HKV, D + 1))),
            ],
            "v": [
                *v.tensors(lambda: call()["v"], dtypes=(*HALVES, torch.float64)),
                *v.wrong(("more heads", lambda: normal(B, T, HKV + 1, DV)), ("no width", lambda: normal(B, T, HKV, 0))),
            ],
            "planes": [
                *v.tensors(lambda: call()["planes"], dtypes=HALVES, shape=False),
                *v.wrong(
                    ("11 planes", lambda: normal(L, 11, D)),
                    ("wider", lambda: normal(L, P, D + 1)),
                    ("2 dimensions", lambda: normal(L, D)),
                    ("of 3 heads", lambda: normal(3, L, P, D)),
                ),
            ],
            "beta": [
                *(one for one in v.numbers(above=0, right=2.0) if one.label != "tensor"),
                *v.wrong(
                    ("1e300", lambda: 1e300),
                    ("meta", lambda: torch.ones(HKV, device="meta")),
                    ("[-1]", lambda: -torch.ones(HKV)),
                    ("[nan]", lambda: full(torch.ones(HKV), NAN)),
                    ("float64 1e300", lambda: full(torch.ones(HKV).double(), 1e300)),
                    ("int tensor", lambda: torch.ones(HKV).long()),
                    ("[3]", lambda: torch.ones(3)),
                    ("sparse", lambda: torch.ones(HKV).to_sparse()),
                    ("'2'", lambda: "2"),
                ),
            ],
            "causal": v.flags(),
            "output_final_state": v.flags(),
            "normalization": v.choices(),
            "layout": v.choices(),
            "backend": v.choices(),
            "key_mask": [*v.tensors(lambda: torch.ones(B, T).bool(), dtypes=(torch.float32, torch.int64), optional=True)],
            "log_decay": [
                *v.tensors(
                    lambda: -torch.ones(B, T, HKV), dtypes=(torch.int64, torch.complex64, torch.float8_e4m3fn), optional=True
                ),
                *v.wrong(
                    ("positive", lambda: torch.ones(HKV)),
                    ("nan", lambda: full(torch.ones(HKV), NAN)),
                    ("[T, Hkv]", lambda: -torch.ones(T, HKV)),
                ),
            ],
            "cu_seqlens": [
                *v.tensors(lambda: torch.tensor([0, T]), dtypes=(torch.float32, torch.bool), optional=True),
                *v.wrong(("of two rows", lambda: torch.tensor([0, T]))),
            ],
            "initial_state": [
                *v.instances(("tensor of it", lambda: state().mass), ("tuple of it", lambda: state().tensors()), optional=True),
                *v.wrong(
                    ("inf mass", lambda: state(INF)),
                    ("nan mass", lambda: state(NAN)),
                    ("negative mass", lambda: state(-1.0)),
                    ("inf values", lambda: state(1.0, INF)),
                    ("nan values", lambda: state(1.0, NAN)),
                    ("meta", lambda: state().to("meta")),
                    ("one row", lambda: state()[:1]),
                    ("of fewer features", lambda: SketchState.empty(B, HKV, S - 1, DV)),
                    ("of wider values", lambda: SketchState.empty(B, HKV, S, DV + 1)),
                ),
            ],
            "group": v.groups(),
        },
        names={"q": ("q", "query heads"), "planes": ("planes", "num_planes"), "k": ("k",), "v": ("v",)},
    ),
    Subject(
        "race_attention, packed",
        race_attention,
        one_row,
        {
            "cu_seqlens": [
                *v.tensors(lambda: torch.tensor([0, 2, T]), dtypes=(torch.float32, torch.int16), optional=True),
                *v.wrong(
                    ("starts at 1", lambda: torch.tensor([1, T])),
                    ("falls", lambda: torch.tensor([0, 4, 2, T])),
                    ("too short", lambda: torch.tensor([0, T - 1])),
                    ("huge", lambda: torch.tensor([0, 2**62])),
                    ("one", lambda: torch.tensor([0])),
                    ("none", lambda: torch.tensor([], dtype=torch.int64)),
                    ("negative", lambda: torch.tensor([-1, T])),
                ),
            ]
        },
    ),
    Subject(
        "race_attention, not causal",
        race_attention,
        lambda: call() | {"causal": False},
        {"normalization": [*v.choices(), v.value("none", "none")], "log_decay": v.wrong(("right", lambda: -torch.ones(HKV)))},
    ),
    Subject(
        "SketchState",
        SketchState,
        lambda: {"mass": torch.ones(1, 1, 4), "values": torch.ones(1, 1, 4, 2)},
        {
            "mass": sketch_field("mass"),
            "values": sketch_field("values"),
            "log_decay": [
                *sketch_field("log_decay"),
                *v.wrong(("5", lambda: torch.full((1, 1), 5.0)), ("nan tensor", lambda: torch.full((1, 1), NAN))),
            ],
        },
    ),
    Subject(
        "SketchState.empty",
        SketchState.empty,
        lambda: {"batch": 1, "heads": 1, "features": 4, "value_dim": 2},
        {
            "batch": v.integers(least=0, right=1),
            "heads": v.integers(least=1, right=1),
            "features": v.integers(least=1),
            "value_dim": [*v.integers(least=1), v.value("10**15", 10**15)],
            "dtype": [*v.dtypes(), v.value("half", torch.half)],
            "device": v.devices(),
            "decay": v.flags(),
        },
    ),
    Subject(
        "SketchState.combine",
        of_state("combine"),
        lambda: {"later": state()},
        {"later": v.instances(("one row", lambda: state()[:1]), ("float64", lambda: state().to(torch.float64)))},
        names={"later": ("sketches to combine",)},
    ),
    Subject(
        "SketchState[]",
        of_state("__getitem__"),
        lambda: {"rows": slice(0, 1)},
        {
            "rows": [
                *v.common(),
                *v.wrong(
                    ("beyond", lambda: torch.tensor([7])),
                    ("slice('a')", lambda: slice("a")),
                    ("slice(0.5)", lambda: slice(0.5)),
                    ("backwards", lambda: slice(None, None, -1)),
                    ("3 bools", lambda: torch.ones(3).bool()),
                    ("...", lambda: ...),
                    ("0, 1", lambda: (0, 1)),
                    ("2 dimensions", lambda: torch.zeros(1, 1).long()),
                ),
            ]
        },
    ),
    Subject(
        "SketchState.to",
        of_state("to"),
        lambda: {"args": torch.float64},
        {
            "args": [
                *v.common(but=("tensor", "None", "True", "np.True_", "10**400", "3", "0")),
                *v.wrong(
                    ("foo", lambda: "foo"),
                    ("half", lambda: torch.half),
                    ("int64", lambda: torch.int64),
                    ("cuda:99", lambda: "cuda:99"),
                ),
            ]
        },
        names={"args": ("SketchState.mass",)},
    ),
    Subject(
        "sample_planes",
        sample_planes,
        lambda: {"num_tables": 2, "num_planes": 2, "head_dim": 4, "seed": 0},
        {
            "num_tables": [*v.integers(least=1, right=2), v.value("2**40", 2**40)],
            "num_planes": v.integers(least=1, most=10, right=2),
            "head_dim": v.integers(least=1, right=4),
            "num_heads": v.integers(least=1, optional=True, right=3),
            "seed": v.integers(least=0, right=1),
            "layer": v.integers(least=0, right=1),
            "head_offset": v.integers(least=0, right=1),
            "device": v.devices(),
            "dtype": v.dtypes(),
        },
    ),
]
