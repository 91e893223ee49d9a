"""Inputs of the layers of race_dist.nn and their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from race_dist import RaceAttention, RaceConfig, SketchState
from race_dist.models import ModelConfig
from race_dist.nn import (
    Embedding,
    FullAttention,
    HistoryCarry,
    Linear,
    RaceCarry,
    RaceCore,
    RMSNorm,
    Sequence,
    ShortConv,
    TailCarry,
    WindowAttention,
    initialize,
    rotate,
    rotation,
)
from tests.inputs import values as v
from tests.inputs.table import Subject, Value

DIM, T = 8, 5
RACE = {"dim": DIM, "num_heads": 2, "num_tables": 2, "num_planes": 2}


def x() -> Tensor:
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(0))


LAYERS: dict[str, Any] = {
    "RaceAttention": RaceAttention(RaceConfig(**RACE)),
    "WindowAttention": WindowAttention(DIM, 2, 2, 3),
    "FullAttention": FullAttention(DIM, 2, 2),
}
BARE = RaceAttention(RaceConfig(**RACE, short_conv=0))
CORE = RaceCore(RaceConfig(**RACE, decay="none", short_conv=0, output_gate=False))


def inputs(layer: Any) -> dict[str, list[Value]]:
    """Invalid arguments of a layer's forward."""
    others = [(f"of {name}", lambda other=other: other.zero_carry(2)) for name, other in LAYERS.items() if other is not layer]
    carries = [
        *v.instances(("tensor of it", x), ("tuple", lambda: layer.zero_carry(2).tensors()), *others, optional=True),
        *v.wrong(("three rows", lambda: layer.zero_carry(3))),
    ]
    return {
        "x": [
            *v.tensors(x, dtypes=(torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.complex64)),
            *v.wrong(("nan", lambda: x() * v.NAN), ("inf", lambda: x() * v.INF), ("wider", lambda: x().repeat(1, 1, 2))),
        ],
        "carry": carries,
        "sequence": v.instances(("positions", lambda: torch.arange(T)), optional=True),
    }


def parameters() -> dict[str, list[Value]]:
    return {"device": v.devices(), "dtype": v.dtypes(optional=True)}


def softmax(**more: list[Value]) -> dict[str, list[Value]]:
    counts = {name: v.integers(least=1, right=DIM if name == "dim" else 2) for name in ("dim", "num_heads", "num_kv_heads")}
    return {
        **counts,
        "head_dim": v.integers(least=1, optional=True, right=4),
        "rope_base": v.numbers(above=1, optional=True, right=9.0),
        "output_gain": v.numbers(least=0, right=1.0),
        "init_weights": v.flags(),
        "seed": v.integers(least=0, right=1),
        **more,
        **parameters(),
    }


def carry(kind: str) -> Any:
    return LAYERS[kind].zero_carry(2)


def norm(shape: Any, **options: Any) -> RMSNorm:
    return RMSNorm(shape, **options)


CONFIGS = v.instances(
    ("dictionary of it", lambda: dict(RACE)),
    ("of a model", lambda: ModelConfig(vocab_size=5, dim=8, num_layers=1, num_heads=2)),
    ("class", lambda: RaceConfig),
)
FLOATS = (torch.int64, torch.complex64, torch.bool)
SUBJECTS = [
    Subject(
        "RaceAttention",
        RaceAttention,
        lambda: {"config": RaceConfig(**RACE)},
        {
            "config": [*CONFIGS, *v.wrong(("without dim", lambda: RaceConfig(num_heads=2)))],
            "layer": v.integers(least=0, right=1),
            "output_gain": v.numbers(least=0, right=1.0),
            "init_weights": v.flags(),
            **parameters(),
        },
        names={"config": ("RaceConfig",)},
    ),
    Subject(
        "RaceCore",
        RaceCore,
        lambda: {"config": RaceConfig(**RACE)},
        {"config": CONFIGS, "layer": v.integers(least=0, right=1), "init_weights": v.flags(), **parameters()},
    ),
    Subject(
        "RaceCore()",
        CORE,
        lambda: {name: torch.ones(1, 3, 2, 4) for name in "qkv"},
        {name: v.tensors(lambda: torch.ones(1, 3, 2, 4), dtypes=FLOATS) for name in "qkv"}
        | {
            "sketch": v.instances(("tensor", lambda: torch.ones(1)), optional=True),
            "sequence": v.instances(optional=True),
            "log_decay": v.wrong(("unwanted", lambda: torch.zeros(1, 3, 2))),
        },
    ),
    Subject(
        "WindowAttention",
        WindowAttention,
        lambda: {"dim": DIM, "num_heads": 2, "num_kv_heads": 2, "window": 3},
        softmax(window=v.integers(least=2, right=3)),
    ),
    Subject("FullAttention", FullAttention, lambda: {"dim": DIM, "num_heads": 2, "num_kv_heads": 2}, softmax(causal=v.flags())),
    *(Subject(f"{name}()", layer, lambda: {"x": x()}, inputs(layer)) for name, layer in LAYERS.items()),
    Subject(
        "RaceAttention() without convolution",
        BARE,
        lambda: {"x": x()},
        {"carry": v.wrong(("with a tail", lambda: carry("RaceAttention")))},
    ),
    *(
        Subject(
            f"{name}.zero_carry",
            layer.zero_carry,
            lambda: {"batch": 2},
            {
                "batch": v.integers(least=0, right=2),
                "device": v.devices(),
                "dtype": v.dtypes(),
                "state_dtype": v.dtypes(optional=True),
            },
        )
        for name, layer in LAYERS.items()
    ),
    *(
        Subject(
            f"{kind.__name__}.combine",
            made.combine,
            lambda made=made: {"later": made},
            {"later": v.instances(("tensor", lambda: torch.ones(1)), ("sketch", lambda: SketchState.empty(2, 2, 8, 4)))},
        )
        for kind, made in (
            (RaceCarry, carry("RaceAttention")),
            (TailCarry, carry("WindowAttention")),
            (HistoryCarry, carry("FullAttention")),
        )
    ),
    Subject(
        "Sequence.of",
        Sequence.of,
        lambda: {"length": T},
        {
            "length": v.integers(least=0, right=T, huge=False),
            "cu_seqlens": [
                *v.tensors(lambda: torch.tensor([0, T]), dtypes=(torch.float32, torch.bool), optional=True),
                *v.wrong(("beyond", lambda: torch.tensor([0, T + 1])), ("falls", lambda: torch.tensor([0, 6, T]))),
            ],
            "key_mask": [
                *v.tensors(lambda: torch.ones(2, T).bool(), dtypes=(torch.int64, torch.float32), optional=True),
                *v.wrong(("longer", lambda: torch.ones(2, T + 1).bool())),
            ],
            "group": v.groups(),
            "layout": v.choices(),
            "position": v.integers(right=3),
            "return_carry": v.flags(),
            "device": v.devices(),
        },
    ),
    Subject(
        "Linear",
        Linear,
        lambda: {"in_features": 2, "out_features": 3},
        {
            "in_features": v.integers(least=1, right=2),
            "out_features": v.integers(least=1, right=2),
            "gain": v.numbers(least=0, right=1.0),
            **parameters(),
        },
    ),
    Subject(
        "Embedding",
        Embedding,
        lambda: {"num_embeddings": 2, "embedding_dim": 3, "std": 0.1},
        {
            "num_embeddings": v.integers(least=1, right=2),
            "embedding_dim": v.integers(least=1, right=2),
            "std": v.numbers(least=0, right=1.0),
            **parameters(),
        },
    ),
    Subject(
        "RMSNorm",
        norm,
        lambda: {"shape": 3},
        {"shape": v.integers(least=1, right=2), "eps": v.numbers(least=0, right=1.0), **parameters()},
    ),
    Subject(
        "ShortConv",
        ShortConv,
        lambda: {"channels": 2, "width": 3},
        {"channels": v.integers(least=1, right=2), "width": v.integers(least=1, right=2), **parameters()},
    ),
    Subject(
        "initialize",
        initialize,
        lambda: {"module": nn.Linear(2, 2), "seed": 0},
        {
            "module": v.instances(("class", lambda: nn.Linear)),
            "seed": v.integers(least=0, most=2**64 - 1, right=3),
            "prefix": v.common(but=("'x'", "''", "'💥'")),
        },
    ),
    Subject(
        "rotation",
        rotation,
        lambda: {"positions": torch.arange(T), "head_dim": 4, "base": 100.0},
        {
            "positions": v.tensors(lambda: torch.arange(T), dtypes=(torch.int32, torch.float32), shape=False),
            "head_dim": [*v.integers(least=1, right=4, huge=False), v.value("3", 3)],
            "base": v.numbers(above=1, right=9.0),
            "dtype": v.dtypes(),
        },
    ),
    Subject(
        "rotate",
        rotate,
        lambda: {"x": torch.ones(1, T, 2, 4), "cos": torch.ones(T, 2), "sin": torch.ones(T, 2)},
        {
            "x": v.tensors(lambda: torch.ones(1, T, 2, 4), dtypes=FLOATS),
            "cos": v.tensors(lambda: torch.ones(T, 2), dtypes=FLOATS),
            "sin": v.tensors(lambda: torch.ones(T, 2), dtypes=FLOATS),
        },
    ),
]
