"""A step that takes hours, stored in its middle and resumed.

Each rank writes its own files into a folder that all ranks see (or each its own): the carries, as they come; and, as one
*generation*, everything else. A generation counts once every rank has written it, and the one before stays until then, so
that a step can be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.parallel import barrier
from race_dist.parallel.agree import agree_on_least
from race_dist.streaming.text import Tokens

KEPT = 2  # generations
PIECES, PIECE = 64, 4096  # of a text, read for its digest


@dataclass(frozen=True)
class StepCheckpoint:
    """Where a step in progress is stored, and how often.

        streamed_backward(..., checkpoint=StepCheckpoint("runs/long/step", every=600))

    The same call resumes the step where it was stored; the weights, the text and the chunks must then be the same. What is
    stored stays until :meth:`clear`, also when the step has ended: clear it once the optimizer's step is safe.

    Attributes:
        folder: for its files, made where it is not there. Ranks may share it.
        every: seconds between two times of storing.
        key: which step this is, in any words. What is stored under another key is of a step that is over, and replaced.
        stop: asked after every chunk; when it answers True on any rank, the step is stored and ends with StepInterrupted.
    """

    folder: str | Path
    every: float = 600.0
    key: str = ""
    stop: Callable[[], bool] | None = None

    def clear(self) -> None:
        """Remove what this process has stored."""
        shutil.rmtree(_place(self.folder), ignore_errors=True)


@dataclass
class Saved:
    """A step in its middle.

    Attributes:
        phase, done: chunks done of a phase.
        tensors: by name.
        carries: ``[count, bytes]`` rows of the stack of carries.
    """

    phase: str
    done: int
    tensors: dict[str, Tensor]
    carries: Tensor | None = None


@dataclass
class Store:
    """One rank's side of a step's checkpoints.

    Attributes:
        checkpoint: what the user asked for.
        facts: names and values that must be the same for what is stored to be of this step.
        group: the ranks that store it together.
    """

    checkpoint: StepCheckpoint
    facts: Mapping[str, str]
    group: ProcessGroup | None
    _generation: int = 0
    _rows: int = 0
    _last: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """This rank's."""
        return _place(self.checkpoint.folder)

    def due(self) -> bool:
        """Whether it is time to store again."""
        return time.monotonic() - self._last >= self.checkpoint.every

    def load(self) -> Saved | None:
        """What is stored of this step by all ranks; None where there is nothing, or another step's.

        Raises:
            ValueError: something is stored under this step's key, but of other weights, another text or other chunks.
        """
        record = self._record()
        differ: list[str] = []
        if record is not None and record["key"] == self.checkpoint.key:
            differ = [name for name, value in self.facts.items() if record["facts"].get(name) != value]
        elif record is not None:
            record = None
        newest = agree_on_least(-2 if differ else -1 if record is None else max(record["generations"]), self.group)
        if newest == -2:
            others = f"another {' and another '.join(differ)}" if differ else "something else, as another rank has found"
            raise ValueError(f"{self.folder} holds a step in progress of {others}: make it the same again, or remove that "
                             "folder to begin the step anew")
        if newest == -1 or record is None or newest not in record["generations"]:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        self._generation = newest
        about = json.loads((self.folder / f"{newest}.json").read_text(encoding="utf-8"))
        self._rows = about["rows"]
        parts = [load_file(self.folder / f"carries-{first}.safetensors")["rows"] for first in about["carries"]]
        carries = torch.cat(parts)[:self._rows] if parts else None
        return Saved(about["phase"], about["done"], load_file(self.folder / f"{newest}.safetensors"), carries)

    def save(self, phase: str, done: int, tensors: Mapping[str, Tensor], new_rows: Callable[[int], Tensor | None]) -> None:
        """Store a generation; every rank of the group calls it at the same chunk.

        Args:
            phase, done: chunks done.
            tensors: on any device.
            new_rows: from the first of the carries that is not stored yet, all that are there; None where there are none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        generation = self._generation + 1
        before = self._about(self._generation)
        files, rows = list(before.get("carries", ())), new_rows(self._rows)
        if rows is not None and len(rows):
            _write(self.folder / f"carries-{self._rows}.safetensors", {"rows": rows})
            files.append(self._rows)
            self._rows += len(rows)
        _write(self.folder / f"{generation}.safetensors", {name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        about = {"phase": phase, "done": done, "rows": self._rows, "carries": files}
        _replace(self.folder / f"{generation}.json", json.dumps(about).encode())
        kept = [g for g in range(generation - KEPT + 1, generation + 1) if (self.folder / f"{g}.json").exists()]
        record = {"key": self.checkpoint.key, "facts": dict(self.facts), "generations": kept}
        _replace(self.folder / "step.json", json.dumps(record, indent=1).encode())
        barrier(self.group)
        for old in self.folder.glob("*.safetensors"):
            number = old.name.removesuffix(".safetensors")
            if number.isdecimal() and int(number) not in kept:
                old.unlink()
                old.with_suffix(".json").unlink(missing_ok=True)
        self._generation, self._last = generation, time.monotonic()

    def _record(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / "step.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{self.folder / 'step.json'} is no step's record: {error}; remove the folder") from None

    def _about(self, generation: int) -> dict[str, Any]:
        file = self.folder / f"{generation}.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _place(folder: str | Path) -> Path:
    return Path(folder) / f"rank-{dist.get_rank() if dist.is_initialized() else 0}"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that is whole or not there."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    _settle(partial, path)


def _replace(path: Path, text: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(text)
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def digest_of_tokens(tokens: Tokens) -> str:
    """Of a text's shape and of pieces all over it: quick for any length."""
    length = int(tokens.shape[1])
    digest = hashlib.blake2b(str(tuple(tokens.shape)).encode(), digest_size=16)
    for n in range(PIECES):
        start = n * max(0, length - PIECE) // max(1, PIECES - 1)
        piece = tokens[:, start:start + PIECE]
        piece = piece if isinstance(piece, np.ndarray) else piece.cpu().numpy()
        digest.update(np.ascontiguousarray(piece, dtype=np.int64).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def digest_of_weights(model: nn.Module) -> str:
    """Of every parameter's name, shape, sum and sum of squares."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        wide = p.detach().double()
        digest.update(f"{name} {tuple(p.shape)} {float(wide.sum())!r} {float(wide.square().sum())!r}".encode())
    return digest.hexdigest()
