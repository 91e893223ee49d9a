"""Inputs of streamed training, evaluation and prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from race_dist.models import DecoderLM
from race_dist.streaming import StepCheckpoint, streamed_backward, streamed_loss, streamed_prompt
from tests.inputs import values as v
from tests.inputs.model_calls import CLASSIFIER, CONFIG, LM, T, V, ids, labels
from tests.inputs.table import Subject, Value


def meta_model() -> DecoderLM:
    return DecoderLM(LM.config, device="meta")


def stored(**options: Any) -> object:
    """A step whose checkpoint is made of these options, in a folder that is removed."""
    with TemporaryDirectory() as folder:
        options = {"folder": str(Path(folder) / "step")} | options
        checkpoint = StepCheckpoint(**options)
        return streamed_backward(LM, ids(), labels(), chunk_size=3, checkpoint=checkpoint)


def tokens(right: Callable[[], Tensor] = ids) -> list[Value]:
    """No tokens; NumPy arrays of integers are right."""
    return [
        *v.tensors(right, dtypes=(torch.float32, torch.bool, torch.complex64), arrays=False),
        *v.wrong(
            ("array", lambda: v.np.arange(3)),
            ("beyond the vocabulary", lambda: right() + V),
            ("negative", lambda: -1 - right()),
            ("array of floats", lambda: right().double().numpy()),
            ("no token", lambda: right()[:, :0]),
        ),
        Value("numpy", lambda: right().numpy(), right=True),
        Value("uint8", lambda: right().numpy().astype("uint8"), right=True),
    ]


def step() -> dict[str, Any]:
    return {"model": LM, "input_ids": ids(), "labels": labels(), "chunk_size": 4}


MODELS = v.instances(
    ("class", lambda: DecoderLM),
    ("config", lambda: LM.config),
    ("dictionary", lambda: dict(CONFIG)),
    ("classifier", lambda: CLASSIFIER),
    ("meta", meta_model),
)
PROMPT = {"model": MODELS, "input_ids": tokens(), "chunk_size": v.integers(least=1, right=3), "group": v.groups()}
EVERY = PROMPT | {
    "labels": tokens(labels),
    "num_targets": v.integers(least=1, optional=True, right=3),
    "progress": v.callbacks(),
    "cu_seqlens": [
        *v.tensors(lambda: torch.tensor([0, T]), dtypes=(torch.float32, torch.bool), optional=True),
        *v.wrong(("of two rows", lambda: torch.tensor([0, T]))),
    ],
}
SUBJECTS = [
    Subject(
        "streamed_backward",
        streamed_backward,
        step,
        EVERY
        | {
            "reduce": v.choices(),
            "keep": v.choices(),
            "world": v.groups(),
            "checkpoint": v.instances(("class", lambda: StepCheckpoint), ("path", Path), optional=True),
        },
    ),
    Subject("streamed_loss", streamed_loss, step, EVERY),
    Subject("streamed_prompt", streamed_prompt, lambda: {"model": LM, "input_ids": ids(), "chunk_size": 4}, PROMPT),
    Subject(
        "StepCheckpoint",
        stored,
        dict,
        {
            "folder": v.paths(),
            "every": [*(one for one in v.numbers(least=0, right=0.0) if one.label != "inf")],
            "key": v.common(but=("'x'", "''", "'💥'")),
            "stop": v.callbacks(),
        },
    ),
]
