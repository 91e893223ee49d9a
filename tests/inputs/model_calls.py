"""Inputs of the models, their loss and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from race_dist import RaceConfig
from race_dist.models import (
    DecoderLM,
    MaskedLM,
    ModelConfig,
    PromptState,
    SequenceClassifier,
    generate,
    linear_cross_entropy,
    prefill,
    sample,
)
from tests.inputs import values as v
from tests.inputs.table import Subject, Value

V, T = 11, 6
RACE = {"num_tables": 2, "num_planes": 2}
CONFIG: dict[str, Any] = {"vocab_size": V, "dim": 8, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW", "window": 3}
LM = DecoderLM(ModelConfig(**CONFIG, race=RaceConfig(**RACE)))
ENCODER = CONFIG | {"layer_pattern": "RS", "race": RaceConfig(**RACE, causal=False)}
CLASSIFIER, MASKED = SequenceClassifier(ModelConfig(**ENCODER), 3), MaskedLM(ModelConfig(**ENCODER))


def ids() -> Tensor:
    return torch.arange(2 * T).view(2, T) % V


def labels() -> Tensor:
    return (ids() + 1) % V


def tokens(right: Callable[[], Tensor] = ids, *, optional: bool = False) -> list[Value]:
    dtypes = (torch.float32, torch.bool, torch.int16, torch.complex64)
    return [
        *v.tensors(right, dtypes=dtypes, optional=optional),
        *v.wrong(("beyond the vocabulary", lambda: right() + V), ("-1", lambda: right() * 0 - 1)),
    ]


def everywhere() -> dict[str, list[Value]]:
    """Arguments of every model's forward."""
    masks = v.tensors(lambda: torch.ones(2, T).bool(), dtypes=(torch.int64, torch.float32), optional=True)
    return {
        "input_ids": tokens(),
        "key_mask": [*masks, *v.wrong(("longer", lambda: torch.ones(2, T + 1).bool()))],
        "group": v.groups(),
        "layout": v.choices(),
    }


def targets() -> list[Value]:
    return [
        *(one for one in v.numbers(above=0, optional=True, right=3.0)),
        *v.wrong(
            ("[0]", lambda: torch.tensor(0)),
            ("[-1]", lambda: torch.tensor(-1)),
            ("[nan]", lambda: torch.tensor(v.NAN)),
            ("[inf]", lambda: torch.tensor(v.INF)),
            ("meta", lambda: torch.tensor(3, device="meta")),
            ("[True]", lambda: torch.tensor(True)),
            ("2**70", lambda: 2**70),
            ("array of it", lambda: v.np.array([3])),
        ),
    ]


def language() -> dict[str, list[Value]]:
    return everywhere() | {
        "labels": tokens(labels, optional=True),
        "num_targets": targets(),
        "cu_seqlens": [
            *v.tensors(lambda: torch.tensor([0, T]), dtypes=(torch.float32, torch.bool), optional=True),
            *v.wrong(("of two rows", lambda: torch.tensor([0, T]))),
        ],
    }


def parameters() -> dict[str, list[Value]]:
    return {"device": v.devices(), "dtype": v.dtypes(optional=True)}


def configs() -> list[Value]:
    return v.instances(
        ("dictionary of it", lambda: dict(CONFIG)),
        ("of RACE", lambda: RaceConfig(**RACE, dim=8, num_heads=2)),
        ("class", lambda: ModelConfig),
    )


def context() -> PromptState:
    return prefill(LM, ids())


def draws() -> dict[str, list[Value]]:
    return {
        "temperature": [*v.numbers(least=0, right=1.0), v.value("1e-320", 1e-320)],
        "top_k": v.integers(least=1, optional=True, right=3, huge=False),
        "top_p": [*v.numbers(above=0, most=1, optional=True, right=0.5), v.value("1e-320", 1e-320)],
    }


GENERATED = {
    "model": v.instances(("class", lambda: DecoderLM), ("classifier", lambda: CLASSIFIER), ("encoder", lambda: MASKED)),
    "prompt_ids": [*tokens(), *v.wrong(("no token", lambda: ids()[:, :0]), ("list of ids", lambda: [1, 2, 3]))],
    "max_new_tokens": v.integers(least=0, right=1, huge=False),
    "seed": v.integers(least=0, most=2**64 - 1, right=1),
    **draws(),
    "prefill_chunk": v.integers(least=1, right=2),
}
FEW = {"temperature": 0.0, "max_new_tokens": 2}
SUBJECTS = [
    Subject("DecoderLM", DecoderLM, lambda: {"config": LM.config}, {"config": configs(), **parameters()}),
    Subject(
        "SequenceClassifier",
        SequenceClassifier,
        lambda: {"config": CLASSIFIER.config, "num_classes": 3},
        {
            "config": [*configs(), *v.wrong(("causal", lambda: LM.config))],
            "num_classes": v.integers(least=2, right=3),
            **parameters(),
        },
        names={"config": ("race.causal",)},
    ),
    Subject(
        "MaskedLM",
        MaskedLM,
        lambda: {"config": MASKED.config},
        {"config": [*configs(), *v.wrong(("causal", lambda: LM.config))], **parameters()},
        names={"config": ("race.causal",)},
    ),
    Subject("DecoderLM()", LM, lambda: {"input_ids": ids(), "labels": labels()}, language()),
    Subject("MaskedLM()", MASKED, lambda: {"input_ids": ids(), "labels": labels()}, language()),
    Subject(
        "SequenceClassifier()",
        CLASSIFIER,
        lambda: {"input_ids": ids(), "labels": torch.tensor([0, 2])},
        everywhere()
        | {
            "labels": [
                *v.tensors(lambda: torch.tensor([0, 2]), dtypes=(torch.float32, torch.int32), optional=True, shape=False),
                *v.wrong(
                    ("3 classes", lambda: torch.tensor([0, 3])),
                    ("negative", lambda: torch.tensor([0, -1])),
                    ("one a token", ids),
                ),
            ]
        },
    ),
    Subject(
        "DecoderLM.hidden",
        LM.hidden,
        lambda: {"input_ids": ids()},
        everywhere()
        | {
            "carry": [
                *v.instances(("tensor", ids), ("context", context), optional=True),
                *v.wrong(
                    ("of one layer", lambda: replace(context().carry, layers=context().carry.layers[:1])),
                    ("of three rows", lambda: LM.zero_carry(3)),
                ),
            ],
            "return_carry": v.flags(),
        },
    ),
    Subject(
        "DecoderLM.zero_carry",
        LM.zero_carry,
        lambda: {"batch": 2},
        {"batch": v.integers(least=0, right=2), "dtype": v.dtypes(optional=True), "state_dtype": v.dtypes(optional=True)},
    ),
    Subject(
        "generate",
        lambda **options: list(generate(**options)),
        lambda: {"model": LM, "prompt_ids": ids(), **FEW},
        GENERATED | {"key_mask": everywhere()["key_mask"]},
        names={"prompt_ids": ("input_ids",)},
    ),
    Subject(
        "prefill",
        prefill,
        lambda: {"model": LM, "ids": ids()},
        {
            "model": GENERATED["model"],
            "ids": [*tokens(), *v.wrong(("no token", lambda: ids()[:, :0]))],
            "before": v.instances(("carry", lambda: context().carry), optional=True),
            "chunk": v.integers(least=1, right=2),
            "key_mask": everywhere()["key_mask"],
        },
        names={"ids": ("input_ids",)},
    ),
    Subject(
        "sample",
        sample,
        lambda: {"logits": torch.ones(2, V)},
        draws()
        | {
            "logits": [
                *v.tensors(lambda: torch.ones(2, V), dtypes=(torch.int64, torch.bool, torch.complex64)),
                *v.wrong(
                    ("nan", lambda: torch.full((2, V), v.NAN)),
                    ("inf", lambda: torch.full((2, V), v.INF)),
                    ("-inf", lambda: torch.full((2, V), -v.INF)),
                ),
            ],
            "generator": v.instances(optional=True),
        },
    ),
    Subject(
        "linear_cross_entropy",
        linear_cross_entropy,
        lambda: {"h": torch.ones(T, 4), "weight": torch.ones(V, 4), "labels": torch.arange(T)},
        {
            "h": v.tensors(lambda: torch.ones(T, 4), dtypes=(torch.int64, torch.complex64)),
            "weight": v.tensors(lambda: torch.ones(V, 4), dtypes=(torch.int64, torch.complex64)),
            "labels": [
                *v.tensors(lambda: torch.arange(T), dtypes=(torch.int32, torch.float32)),
                *v.wrong(("beyond", lambda: torch.arange(T) + V), ("-1", lambda: torch.arange(T) - 1)),
            ],
            "chunk": v.integers(least=1, optional=True, right=2),
            "fused": [one for one in v.flags() if one.label != "None"],
        },
    ),
]
