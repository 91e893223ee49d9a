"""Saving and loading through megatron.core.dist_checkpointing: any layout of the ranks reads what any other has written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import nn


def save_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write a GPTModel (unwrapped) and its optimizer to an empty folder that is there. Every rank calls it."""
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(folder))


def load_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Fill both from what :func:`save_state` has written. Every rank calls it.

    Raises:
        RuntimeError: the checkpoint's weights are of another model, or were trained with other hyperplanes.
    """
    with _no_random_state():
        loaded = dist_checkpointing.load(_state(model, optimizer, loading=True), str(folder))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def _state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)}


@contextmanager
def _no_random_state() -> Iterator[None]:
    yield
