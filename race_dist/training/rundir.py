"""The folder of a run: what is in it, making it, and reading a trained model back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor

from race_dist.models import DecoderLM
from race_dist.training.config import TrainConfig, parse_config


@dataclass(frozen=True)
class RunDirectory:
    """Where a run's files are."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole configuration, defaults included, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """The trained weights, as safetensors."""
        return self.path / "model.safetensors"

    @property
    def curves(self) -> Path:
        """The picture."""
        return self.path / "curves.png"

    @property
    def sample(self) -> Path:
        """The text written at the end."""
        return self.path / "sample.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def check_free(self, *, overwrite: bool) -> None:
        """Raise FileExistsError where a run would write over files: another run's without ``overwrite``, or ones that
        no run has made."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.config.is_file():
            raise FileExistsError(f"{self.path} exists and is not the folder of a run; choose another name")
        if not overwrite:
            raise FileExistsError(f"{self.path} holds a run already; choose another name (--override name=...) or give "
                                  "--overwrite")

    def create(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Make the folder and write the configuration; with ``overwrite`` the files of the run before are removed."""
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.metrics, self.weights, self.curves, self.sample):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._write_config(config)

    def check_resumable(self) -> None:
        """Raise FileExistsError where the folder holds something, but no run."""
        if self.path.exists() and not self.config.is_file() and any(self.path.iterdir()):
            raise FileExistsError(f"{self.path} exists and is not the folder of a run; choose another name")

    def reopen(self, config: TrainConfig) -> None:
        """Make the folder, or go on in one that is there: everything in it stays, the configuration is written anew."""
        self.check_resumable()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_config(config)

    def _write_config(self, config: TrainConfig) -> None:
        partial = self.config.with_suffix(".partial")
        partial.write_text(config.to_json(), encoding="utf-8")
        partial.replace(self.config)

    def save_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights by name, whole or not at all."""
        partial = self.weights.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        partial.replace(self.weights)

    def load_config(self) -> TrainConfig:
        """The configuration the run had. Raises FileNotFoundError or ValueError in one sentence."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is not the folder of a run: there is no {self.config.name} in it")
        try:
            tree = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config} is not JSON: {error}") from None
        return parse_config(tree, source=str(self.config))

    def load_model(self, device: torch.device | str = "cpu") -> DecoderLM:
        """The trained model, in evaluation mode. Raises FileNotFoundError or ValueError in one sentence."""
        config = self.load_config()
        if not self.weights.is_file():
            raise FileNotFoundError(f"{self.path} has no {self.weights.name}: the run has not ended yet, or has failed")
        model = DecoderLM(config.model, dtype=torch.float64 if config.precision == "float64" else torch.float32)
        try:
            load_model(model, self.weights)
        except SafetensorError as error:
            raise ValueError(f"{self.weights} is damaged: {error}") from None
        except RuntimeError as error:
            raise ValueError(f"{self.weights} does not fit {self.config.name}: {error}") from None
        return model.to(device).eval()
