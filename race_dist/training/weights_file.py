"""Weights files: write a model's weights as safetensors, and load them into a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from race_dist.files import CheckedTensors, DamagedFileError, open_tensors, save_tensors
from race_dist.models import ModelConfig
from race_dist.nn.initialization import copy_local_shard

WEIGHTS = "model.safetensors"
COMPUTE_ONLY = ("activation_checkpointing", "loss_chunk")  # keys of a model that do not change what it computes


def save_weights(file: Path, weights: Mapping[str, Tensor], config: ModelConfig | None = None) -> None:
    """Write named tensors, each with a checksum, and their model's configuration, atomically.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    save_tensors(file, weights, {} if config is None else {"config": config.model_dump_json()})


def load_weights(model: nn.Module, path: Path, *, config: ModelConfig | None = None) -> None:
    """Load a model's parameters, one at a time, from a safetensors file or the folder of a run. They may be sharded.

    Checksums are verified if the file has them; a file from another program may have none.

    Args:
        model: on any device.
        path: of the file or folder.
        config: the configuration that the weights must have been written with, if the file has one; None: any.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or its tensors do not fit the model; the message names the first that differs.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there are no weights {file}")
    with open_tensors(file) as stored:
        if config is not None and "config" in stored.metadata:
            check_same_model(_config_of(stored), config.model_dump(mode="json"), str(file))
        _fill(model, stored, file)


def check_same_model(trained: Mapping[str, Any], config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the weights were trained with this configuration of a model, given as a tree."""
    differing = sorted(key for key in trained if key not in COMPUTE_ONLY and key in config and trained[key] != config[key])
    if differing:
        raise ValueError(
            f"{source} was trained with another {', '.join(f'model.{key}' for key in differing)} than the run's "
            "config.json says: one of the two files was changed"
        )


def _config_of(stored: CheckedTensors) -> dict[str, Any]:
    try:
        return dict(json.loads(stored.metadata["config"]))
    except (ValueError, TypeError):
        raise DamagedFileError(f"{stored.path} is damaged: its header holds no configuration") from None


def _fill(model: nn.Module, stored: CheckedTensors, file: Path) -> None:
    names = set(stored)
    parameters = dict(model.named_parameters())
    missing, surplus = sorted(set(parameters) - names), sorted(names - set(parameters))
    for kind, odd in (("lacks", missing), ("has, but the model lacks,", surplus)):
        if odd:
            raise ValueError(
                f"{file} does not fit the model: it {kind} {odd[0]} ({len(odd)} in all); "
                "use the configuration it was trained with"
            )
    for name, parameter in parameters.items():
        shape = stored.shape(name)
        if shape != list(parameter.shape):
            raise ValueError(
                f"{file} does not fit the model: {name} is {shape} there and {list(parameter.shape)} here; "
                "use the configuration it was trained with"
            )
        copy_local_shard(parameter, stored[name].to(torch.promote_types(parameter.dtype, torch.float32)))
