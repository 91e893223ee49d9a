"""The folder of a run: its files, how it is created or reopened, and how a trained model is loaded from it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from race_dist.files import (
    file_digest,
    read_checksummed_json,
    read_json_object,
    verify_file,
    write_checksummed_json,
    write_text,
)
from race_dist.models import DecoderLM
from race_dist.output_paths import atomic_write
from race_dist.parallel import gather_objects, group_rank
from race_dist.training.checkpoint import CheckpointManager
from race_dist.training.checkpoint_state import TensorState
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.run_lock import LOCK, RunLock, check_not_in_use
from race_dist.training.sampling import Codec, codec_for
from race_dist.training.weights_file import WEIGHTS, check_same_model, load_weights


def open_run(
    directory: RunDirectory, config: TrainConfig, group: ProcessGroup | None, *, resume: bool, overwrite: bool
) -> AbstractContextManager[object]:
    """Lock the folder of a run and create or reopen it. Every rank of the group calls it; rank 0 does the work.

    Args:
        directory: of the run.
        config: written there.
        group: all ranks of the run; None for one.
        resume: continue the run in the folder.
        overwrite: remove the run in the folder.

    Returns:
        A context manager that holds the lock: enter it for the duration of the run.

    Raises:
        OSError, ValueError: on every rank, with the same message: another process uses the folder, or it is not usable.
    """
    problem: list[str] | None = None  # sent to the other ranks in any case, because they wait for it
    lock = directory.lock()
    if group_rank(group) == 0:
        try:
            directory.check_resumable() if resume else directory.check_free(overwrite=overwrite)
            lock.acquire()
            directory.reopen(config) if resume else directory.create(config, overwrite=overwrite)
        except (OSError, ValueError) as error:
            lock.release()
            problem = ["OSError" if isinstance(error, OSError) else "ValueError", str(error)]
    problem = gather_objects(problem, group)[0]
    if problem is not None:
        raise (OSError if problem[0] == "OSError" else ValueError)(problem[1])
    return lock if group_rank(group) == 0 else nullcontext()


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run's files.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The complete configuration, defaults included, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record per line."""
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """The trained weights, as safetensors."""
        return self.path / WEIGHTS

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, if tokens are not bytes."""
        return self.path / "tokenizer.json"

    @property
    def machine(self) -> Path:
        """The machine, the mesh and the text, as JSON."""
        return self.path / "machine.json"

    @property
    def positions(self) -> list[Path]:
        """Losses by position in the context, as JSON: one file per context length, text and checkpoint."""
        return sorted(self.path.glob("positions-*.json"))

    def positions_of(self, context: int, *, text: str = "", step: int | None = None) -> Path:
        """The file of one evaluation by position.

        Args:
            context: tokens per window.
            text: a name for the text, part of the file name; empty: the held-out split of the run.
            step: of a checkpoint; None: the final weights.
        """
        parts = [str(context), *([text] if text else []), *([] if step is None else [f"step-{step}"])]
        return self.path / f"positions-{'-'.join(parts)}.json"

    @property
    def curves(self) -> Path:
        """The loss plot."""
        return self.path / "curves.png"

    @property
    def sample(self) -> Path:
        """The text generated at the end."""
        return self.path / "sample.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    def lock(self) -> RunLock:
        """The lock of the folder. Only the process that holds it writes there: rank 0 of a run."""
        return RunLock(self.path)

    def check_not_in_use(self) -> None:
        """Raise :class:`race_dist.training.run_lock.RunInUse` if another process uses the folder."""
        check_not_in_use(self.path)

    def _is_empty(self) -> bool:
        return self.path.is_dir() and not any(path.name != LOCK for path in self.path.iterdir())

    def _check_link(self) -> None:
        if self.path.is_symlink() and not self.path.exists():
            raise FileExistsError(
                f"{self.path} is a symbolic link to {self.path.readlink()}, which is not there; remove the "
                "link or choose another name (--override name=...)"
            )

    def check_free(self, *, overwrite: bool) -> None:
        """Raise FileExistsError if the folder holds a run (unless ``overwrite``) or files that do not belong to a run."""
        self._check_link()
        if not self.path.exists() or self._is_empty():
            return
        self.check_not_in_use()
        if not self.config.is_file():
            raise FileExistsError(f"{self.path} exists and is not the folder of a run; choose another name")
        if not overwrite:
            raise FileExistsError(
                f"{self.path} holds a run already; choose another name (--override name=...) or give --overwrite"
            )

    def create(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Create the folder and write the configuration; with ``overwrite``, remove the files of the previous run."""
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        files = (self.metrics, self.weights, self.curves, self.sample, self.tokenizer, self.machine, *self.positions)
        folders = (self.checkpoints, self.tensorboard)
        for path in (self.path, self.config, *files, *folders):
            if path.is_symlink():
                raise FileExistsError(
                    f"{path} is a symbolic link to {path.readlink()}, and a run that begins anew does not "
                    "remove what lies behind a link: remove it, or choose another name "
                    "(--override name=...)"
                )
        for file in files:
            file.unlink(missing_ok=True)
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
        self.write_config(config)

    def check_resumable(self) -> None:
        """Raise FileExistsError if the folder holds files but no run."""
        self._check_link()
        self.check_not_in_use()
        if self.path.exists() and not self.config.is_file() and not self._is_empty():
            raise FileExistsError(f"{self.path} exists and is not the folder of a run; choose another name")

    def reopen(self, config: TrainConfig) -> None:
        """Create the folder, or keep an existing one as it is. The old configuration stays until
        :func:`race_dist.training.loop.run` has found that the checkpoint fits the new one."""
        self.check_resumable()
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the configuration."""
        write_text(self.config, config.to_json())

    def load_config(self) -> TrainConfig:
        """The configuration of the run. Raises FileNotFoundError or ValueError."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is not the folder of a run: there is no {self.config.name} in it")
        return parse_config(read_json_object(self.config), source=str(self.config))

    def load_model(self, device: torch.device | str = "cpu", *, step: int | None = None) -> DecoderLM:
        """The trained model, in evaluation mode: the final weights, or else those of the newest checkpoint.

        Args:
            device: to load it to.
            step: load the checkpoint of this step instead.

        Raises:
            FileNotFoundError: the run does not exist, or nothing is saved yet.
            ValueError: the weights are damaged, or do not fit the configuration.
            CheckpointError: all checkpoints are damaged.
        """
        config = self.load_config()
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        if step is None and self.weights.is_file():
            model = DecoderLM(config.model, dtype=dtype)
            load_weights(model, self.weights, config=config.model)
            return model.to(device).eval()
        store = CheckpointManager(self.checkpoints, None, read_only=True)
        saved = store.latest(step)
        if saved is None:
            what = (
                f"no checkpoint of step {step}"
                if step is not None
                else (f"no {self.weights.name} and no checkpoint: the run has not come so far yet, or has failed")
            )
            raise FileNotFoundError(f"{self.path} has {what}")
        check_same_model(saved.facts["config"]["model"], config.model.model_dump(mode="json"), str(saved.path))
        model = DecoderLM(config.model, dtype=dtype)
        store.load(saved, TensorState({f"model.{name}": p.detach() for name, p in model.named_parameters()}))
        return model.to(device).eval()

    def describe(self, facts: Mapping[str, Any], tokenizer: Path | None) -> None:
        """Write machine.json, and copy the tokenizer to the folder. Raises OSError."""
        if tokenizer is not None:
            with atomic_write(self.tokenizer) as partial:
                shutil.copyfile(tokenizer, partial)
        write_checksummed_json(self.machine, {**facts, "tokenizer": None if tokenizer is None else file_digest(tokenizer)})

    def read_machine(self) -> dict[str, Any]:
        """The content of machine.json; empty if there is no such file. Raises ValueError if it was damaged or changed; a file
        of an older version, without a checksum, is accepted."""
        return read_checksummed_json(self.machine, required=False) if self.machine.is_file() else {}

    def codec(self) -> Codec:
        """Encodes and decodes the tokens that the run was trained on.

        Raises:
            ImportError: the tokenizers library is not installed.
            ValueError: the run's tokenizer is missing, or is not the one that it was trained with.
        """
        return codec_for(self.checked_tokenizer())

    def checked_tokenizer(self) -> Path | None:
        """The run's tokenizer.json; None if tokens are bytes. Raises ValueError if it is missing, or is not the one that the
        run was trained with."""
        facts = self.read_machine()
        if facts.get("tokenizer") is not None:
            verify_file(self.tokenizer, facts["tokenizer"])
            return self.tokenizer
        return self.tokenizer if "tokenizer" not in facts and self.tokenizer.is_file() else None
