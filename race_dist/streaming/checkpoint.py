"""Checkpoints of a streamed step while it runs: a step that takes hours is stored and resumed.

Each rank writes its own files, to one folder that all ranks share or to a folder per rank. Carries are written as they are
computed; everything else is written as a *generation*. A generation is valid once every rank has written it. The generation
before is kept until then, so that the step can be killed at any moment.

    carries-FIRST.safetensors   rows of the stack of carries, from row FIRST on
    N.safetensors               the tensors of generation N
    N.json                      its manifest, written last: the step's digest, its progress, and a checksum of every file
    step.json                   the facts that identify the step, and the numbers of the generations
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.checkpoint_files import Manifest, remove_unlisted, save_tensors_file
from race_dist.distributed.consistency import max_over_ranks, min_over_ranks
from race_dist.files import DamagedFileError, json_digest, read_checksummed_json, write_checksummed_json
from race_dist.streaming.chunks import Tokens
from race_dist.terminal import print_line

KEPT_GENERATIONS = 2
DIGEST_PIECES, PIECE_LENGTH = 64, 4096  # tokens of a text that its digest reads
PHASES = ("forward", "backward")
_MANIFEST = {"generation": int, "key": str, "step": str, "phase": str, "done": int, "rows": int, "carries": list}
_NOTHING, _ANOTHER_STEP = -1, -2


class DamagedStepError(ValueError):
    """The stored step is damaged and no valid generation is left to resume from. The message names the file."""


class OtherStepError(ValueError):
    """The step stored under the same key has other weights, another text or other chunks."""


@dataclass(frozen=True)
class StepCheckpoint:
    """Where a running step is stored, and how often.

        streamed_backward(..., checkpoint=StepCheckpoint("runs/long/step", every=600))

    The same call resumes the step; the weights, the text and the chunks must then be the same. Files are verified when they are
    read: if the newest generation is damaged, the step resumes from the one before. If storing fails (a full disk), a line is
    printed and the step continues. Files stay until :meth:`clear`, also after the end of the step: clear them once the
    optimizer's step is safe.

    Attributes:
        folder: for the files; created if missing. Ranks may share it.
        every: seconds between two checkpoints.
        key: any text that identifies the step. Files with another key belong to an earlier step and are replaced.
        stop: called after every chunk; when it returns True on any rank, the step is stored and raises StepInterrupted.

    Raises:
        TypeError, ValueError: a field has another type, or ``folder`` cannot be a folder.
    """

    folder: str | Path
    every: float = 600.0
    key: str = ""
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        checks.folder("folder", self.folder)
        if not checks.is_number(self.every) or not (0 <= self.every <= checks.MAX_BYTES or self.every == float("inf")):
            raise ValueError(
                f"every must be a number of seconds, 0 or more (inf: only at the end); got {checks.typed_repr(self.every)}"
            )
        checks.instance("key", self.key, str)
        checks.callback("stop", self.stop)

    def clear(self) -> None:
        """Remove what this process has stored."""
        shutil.rmtree(_rank_folder(self.folder), ignore_errors=True)


@dataclass
class SavedStep:
    """The state of a stored step.

    Attributes:
        phase, done: the number of chunks done in a phase.
        tensors: by name.
        carries: ``[count, bytes]``: the rows of the stack of carries.
    """

    phase: str
    done: int
    tensors: dict[str, Tensor]
    carries: Tensor | None = None


@dataclass(frozen=True)
class _Generation:
    """One generation."""

    manifest: Manifest

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of the manifest."""
        return self.manifest.body

    @property
    def number(self) -> int:
        """The newest generation has the highest number."""
        return int(self.facts["generation"])

    @property
    def position(self) -> int:
        """The progress of the step as one number: all ranks resume from the same one."""
        return int(self.facts["done"]) + 2**40 * PHASES.index(self.facts["phase"])


@dataclass
class StepStore:
    """The checkpoints of a running step on one rank.

    Attributes:
        checkpoint: the user's options.
        facts: names and values that identify the step: a stored step with other values is another step.
        group: the ranks that store the step together.
        problem: why the last :meth:`save` failed, as a sentence; None if it succeeded.
    """

    checkpoint: StepCheckpoint
    facts: Mapping[str, str]
    group: ProcessGroup | None
    problem: str | None = None
    _kept: list[_Generation] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """This rank's folder."""
        return _rank_folder(self.checkpoint.folder)

    @property
    def stored(self) -> bool:
        """Whether there is a generation to resume from."""
        return bool(self._kept)

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._last >= self.checkpoint.every

    # --- reading -------------------------------------------------------------------------------------------------------

    def load(self) -> SavedStep | None:
        """The newest generation of this step that is valid on all ranks; None if there is none.

        A line is printed that names damaged files.

        Raises:
            DamagedStepError: generations of this step are stored, and none of them is valid.
            OtherStepError: a step with other weights, another text or other chunks is stored under this step's key.
        """
        own, other_step, damage = self._found()
        found = {g.position: g for g in own}
        chosen: _Generation | None = None
        while chosen is None:
            newest = min_over_ranks(_ANOTHER_STEP if other_step else max(found, default=_NOTHING), self.group)
            if newest < 0:
                break
            error = self._verify(found[newest]) if newest in found else None
            damage += [] if error is None else [error]
            if min_over_ranks(int(newest in found and error is None), self.group):
                chosen = found[newest]
            found = {position: g for position, g in found.items() if position < newest}
        if newest == _ANOTHER_STEP:
            other_step = other_step or "something else, as another rank has found"
            raise OtherStepError(
                f"{self.folder} holds a step in progress of {other_step}: make it the same again, or remove that "
                "folder to begin the step anew"
            )
        if chosen is None and max_over_ranks([len(damage)], self.group)[0]:
            first = damage[0] if damage else "another rank has found a damaged file"
            raise DamagedStepError(
                f"{first}, and no other generation of this step is valid; remove {self.folder} to begin the step anew"
            )
        if chosen is None:
            if own:
                print_line(f"{self.folder}: no generation of this step is stored on all ranks; the step begins anew")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        if damage:
            print_line(
                f"{'; '.join(damage)}: the step resumes from what was stored after {chosen.facts['done']} chunks of the "
                f"{chosen.facts['phase']} phase"
            )
        self._kept = [chosen]
        return self._read(chosen)

    def _found(self) -> tuple[list[_Generation], str | None, list[str]]:
        """The generations stored on this rank; only manifests are read.

        Returns:
            The generations of this step, their files not verified yet; how another step under this key differs (None if there
            is none), in words; and damaged files, as sentences.
        """
        own: list[_Generation] = []
        damage: list[str] = []
        other_step, earlier_step = None, False
        facts, listed = self._read_facts(damage)
        for number in self._numbers("json") | listed:
            try:
                generation = _Generation(Manifest.read(self.folder / f"{number}.json", _MANIFEST))
                if generation.number != number:
                    raise DamagedFileError(f"{self.folder / f'{number}.json'} is that of generation {generation.number}")
            except (OSError, DamagedFileError) as error:
                damage.append(
                    f"{self.folder / f'{number}.json'} is missing" if isinstance(error, FileNotFoundError) else str(error)
                )
                continue
            if generation.facts["key"] != self.checkpoint.key or generation.facts["phase"] not in PHASES:
                earlier_step = True
            elif generation.facts["step"] != json_digest(self.facts):
                differ = [name for name, value in self.facts.items() if facts.get(name, value) != value]
                other_step = f"another {' and another '.join(differ)}" if differ else "something else"
            else:
                own.append(generation)
        return own, other_step, [] if earlier_step and not own else damage  # damage of an earlier step does not matter

    def _read_facts(self, damage: list[str]) -> tuple[dict[str, Any], set[int]]:
        """The facts and the numbers of generations in ``step.json``; appends to ``damage``."""
        try:
            record = read_checksummed_json(self.folder / "step.json", {"key": str, "facts": dict, "generations": list})
        except FileNotFoundError:
            return {}, set()
        except (OSError, DamagedFileError) as error:
            damage.append(str(error))
            return {}, set()
        if record["key"] != self.checkpoint.key:  # left over from an earlier step
            return {}, set()
        return record["facts"], {int(n) for n in record["generations"]}

    def _numbers(self, suffix: str) -> set[int]:
        """The numbers of the generations that have a file with this suffix."""
        return {int(file.stem) for file in self.folder.glob(f"*.{suffix}") if file.stem.isdecimal()}

    def _verify(self, generation: _Generation) -> str | None:
        """The damage of a generation's files as a sentence; None if they are valid."""
        try:
            generation.manifest.verify()
        except (OSError, DamagedFileError) as error:
            return str(error)
        return None

    def _read(self, generation: _Generation) -> SavedStep:
        facts = generation.facts
        parts = [load_file(self.folder / name)["rows"] for name in facts["carries"]]
        carries = torch.cat(parts)[: facts["rows"]] if parts else None
        return SavedStep(facts["phase"], facts["done"], load_file(self.folder / f"{generation.number}.safetensors"), carries)

    # --- writing -------------------------------------------------------------------------------------------------------

    def save(self, phase: str, done: int, tensors: Mapping[str, Tensor], new_rows: Callable[[int], Tensor | None]) -> None:
        """Store a generation. Every rank of the group calls it after the same chunk.

        If a rank cannot write, a line is printed, ``problem`` gives the reason, and the generation before stays.

        Args:
            phase, done: the number of chunks done in a phase.
            tensors: on any device.
            new_rows: returns the carries from a given index on, those not stored yet; None if there are none.
        """
        before: dict[str, Any] = self._kept[-1].facts if self._kept else {"rows": 0, "carries": [], "files": {}}
        rows, known_problem = new_rows(before["rows"]), self.problem
        generation: _Generation | None = None
        self._last = time.monotonic()
        try:
            generation = self._write(phase, done, tensors, rows, before)
            self.problem = None
        except OSError as error:
            self.problem = str(error)
        if not min_over_ranks(int(generation is not None), self.group):  # valid on all ranks or on none
            self.problem = self.problem or "another rank could not store its part of the step"
            if known_problem is None:
                print_line(f"{self.problem}: the step continues and is stored again later")
        else:
            assert generation is not None
            self._kept = [*self._kept, generation][-KEPT_GENERATIONS:]
            self._write_facts()
        remove_unlisted(self.folder, [g.manifest for g in self._kept], keep=["step.json"])

    def _write(
        self, phase: str, done: int, tensors: Mapping[str, Tensor], rows: Tensor | None, before: Mapping[str, Any]
    ) -> _Generation:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers("json") | self._numbers("safetensors"), default=0) + 1
        carries, count = list(before["carries"]), before["rows"]
        files = {name: before["files"][name] for name in carries}
        if rows is not None and len(rows):
            carries.append(f"carries-{count}.safetensors")
            files[carries[-1]] = save_tensors_file(self.folder / carries[-1], {"rows": rows})
            count += len(rows)
        name = f"{number}.safetensors"
        files[name] = save_tensors_file(self.folder / name, {n: t.detach().cpu().contiguous() for n, t in tensors.items()})
        facts = {
            "generation": number,
            "key": self.checkpoint.key,
            "step": json_digest(self.facts),
            "phase": phase,
            "done": done,
            "rows": count,
            "carries": carries,
        }
        return _Generation(Manifest.write(self.folder / f"{number}.json", facts, files))

    def _write_facts(self) -> None:
        """Write ``step.json``, which serves messages only; if it cannot be written, remove it."""
        file, generations = self.folder / "step.json", [g.number for g in self._kept]
        try:
            write_checksummed_json(file, {"key": self.checkpoint.key, "facts": dict(self.facts), "generations": generations})
        except OSError:
            with suppress(OSError):
                file.unlink()


def _rank_folder(folder: str | Path) -> Path:
    return Path(folder) / f"rank-{dist.get_rank() if dist.is_initialized() else 0}"


def tokens_digest(tokens: Tokens) -> str:
    """A digest of a text's shape and of pieces spread over it, so that it is quick for any length."""
    length = int(tokens.shape[1])
    digest = hashlib.blake2b(str(tuple(tokens.shape)).encode(), digest_size=16)
    for n in range(DIGEST_PIECES):
        start = n * max(0, length - PIECE_LENGTH) // max(1, DIGEST_PIECES - 1)
        piece = tokens[:, start : start + PIECE_LENGTH]
        piece = piece if isinstance(piece, np.ndarray) else piece.cpu().numpy()
        digest.update(np.ascontiguousarray(piece, dtype=np.int64).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """A digest of every parameter's name, shape, sum, sum of squares, and position-weighted sum."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        wide = p.detach().double().flatten()
        sums = torch.stack([wide.sum(), wide.square().sum(), wide.dot(torch.linspace(1, 2, len(wide)).to(wide))]).tolist()
        digest.update(f"{name} {tuple(p.shape)} {sums!r}".encode())
    return digest.hexdigest()
