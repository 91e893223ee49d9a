"""Weights as safetensors: out of a run or one of its checkpoints, and into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from race_dist.nn.init import write_part
from race_dist.outputs import check_output_file

WEIGHTS = "model.safetensors"


def save_weights(file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name; the file appears when it is complete. OSError where it would replace a link, folder or device."""
    check_output_file(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial, dict(metadata or {}))
    partial.replace(file)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model's parameters, whole or sharded, from a safetensors file or the folder of a run, one at a time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its tensors are not those of the model; the message names the first that differs.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there are no weights {file}")
    try:
        with safe_open(file, "pt") as stored:
            _fill(model, stored, file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _fill(model: nn.Module, stored: safe_open, file: Path) -> None:
    names = set(stored.keys())
    parameters = dict(model.named_parameters())
    missing, surplus = sorted(set(parameters) - names), sorted(names - set(parameters))
    for kind, odd in (("lacks", missing), ("has, but the model lacks,", surplus)):
        if odd:
            raise ValueError(f"{file} does not fit the model: it {kind} {odd[0]} ({len(odd)} in all); "
                             "use the configuration it was trained with")
    for name, parameter in parameters.items():
        shape = list(stored.get_slice(name).get_shape())
        if shape != list(parameter.shape):
            raise ValueError(f"{file} does not fit the model: {name} is {shape} there and {list(parameter.shape)} here; "
                             "use the configuration it was trained with")
        write_part(parameter, stored.get_tensor(name).to(torch.promote_types(parameter.dtype, torch.float32)))
