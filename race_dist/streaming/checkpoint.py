"""A step that takes hours, stored in its middle and resumed.

Each rank writes its own files into a folder that all ranks see (or each its own): the carries, as they come; and, as one
*generation*, everything else. A generation counts once every rank has written it, and the one before stays until then, so
that a step can be killed at any moment.

    carries-FIRST.safetensors   rows of the stack of carries, from row FIRST on
    N.safetensors               the tensors of generation N
    N.json                      its manifest, written last: of which step it is, how far it is, and a checksum of every file
    step.json                   which step this is, in words, and which generations there are
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

KEPT = 2  # generations
PIECES, PIECE = 64, 4096  # of a text, read for its digest
PHASES = ("forward", "backward")
_KINDS = {"generation": int, "key": str, "step": str, "phase": str, "done": int, "rows": int, "carries": list}
_NOTHING, _ANOTHER_STEP = -1, -2


class DamagedStepError(ValueError):
    """What is stored of a step is damaged, and nothing whole is left to go on from. The message names the file."""


class OtherStepError(ValueError):
    """What is stored under a step's key is of other weights, another text or other chunks."""


@dataclass(frozen=True)
class StepCheckpoint:
    """Where a step in progress is stored, and how often.

        streamed_backward(..., checkpoint=StepCheckpoint("runs/long/step", every=600))

    The same call resumes the step where it was stored; the weights, the text and the chunks must then be the same. What is
    stored is checked when it is read: where the newest is damaged, the step goes on from the one before. What cannot be
    stored (a full disk) is said, and the step goes on. What is stored stays until :meth:`clear`, also when the step has
    ended: clear it once the optimizer's step is safe.

    Attributes:
        folder: for its files, made where it is not there. Ranks may share it.
        every: seconds between two times of storing.
        key: which step this is, in any words. What is stored under another key is of a step that is over, and replaced.
        stop: asked after every chunk; when it answers True on any rank, the step is stored and ends with StepInterrupted.

    Raises:
        TypeError, ValueError: a field is of another type, or the folder cannot be one.
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
        shutil.rmtree(_place(self.folder), ignore_errors=True)


@dataclass
class SavedStep:
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


@dataclass(frozen=True)
class _Generation:
    """One generation as its manifest describes it."""

    manifest: Manifest

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says."""
        return self.manifest.body

    @property
    def number(self) -> int:
        """Its number: the newest has the highest."""
        return int(self.about["generation"])

    @property
    def position(self) -> int:
        """How far the step is: ranks continue together from the same one."""
        return int(self.about["done"]) + 2**40 * PHASES.index(self.about["phase"])


@dataclass
class StepStore:
    """One rank's side of a step's checkpoints.

    Attributes:
        checkpoint: what the user asked for.
        facts: names and values that must be the same for what is stored to be of this step.
        group: the ranks that store it together.
        problem: why the last :meth:`save` has failed, as a sentence; None: it has not.
    """

    checkpoint: StepCheckpoint
    facts: Mapping[str, str]
    group: ProcessGroup | None
    problem: str | None = None
    _kept: list[_Generation] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """This rank's."""
        return _place(self.checkpoint.folder)

    @property
    def stored(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self._kept)

    def due(self) -> bool:
        """Whether it is time to store again."""
        return time.monotonic() - self._last >= self.checkpoint.every

    # --- reading -------------------------------------------------------------------------------------------------------

    def load(self) -> SavedStep | None:
        """The newest of what all ranks have stored of this step and is whole; None where there is nothing, or another step's.

        A damaged file is named in a printed line.

        Raises:
            DamagedStepError: there is something of this step, and none of it is whole.
            OtherStepError: something is stored under this step's key, but of other weights, another text or other chunks.
        """
        own, others, trouble = self._found()
        found = {g.position: g for g in own}
        chosen: _Generation | None = None
        while chosen is None:
            newest = min_over_ranks(_ANOTHER_STEP if others else max(found, default=_NOTHING), self.group)
            if newest < 0:
                break
            wrong = self._wrong(found[newest]) if newest in found else None
            trouble += [] if wrong is None else [wrong]
            if min_over_ranks(int(newest in found and wrong is None), self.group):
                chosen = found[newest]
            found = {position: g for position, g in found.items() if position < newest}
        if newest == _ANOTHER_STEP:
            others = others or "something else, as another rank has found"
            raise OtherStepError(
                f"{self.folder} holds a step in progress of {others}: make it the same again, or remove that "
                "folder to begin the step anew"
            )
        if chosen is None and max_over_ranks([len(trouble)], self.group)[0]:
            damage = trouble[0] if trouble else "another rank has found a damaged file"
            raise DamagedStepError(
                f"{damage}, and nothing else that is stored of this step is whole; remove {self.folder} to begin the step anew"
            )
        if chosen is None:
            if own:
                print_line(f"{self.folder}: the ranks have stored nothing of this step in common; it begins anew")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        if trouble:
            print_line(
                f"{'; '.join(trouble)}: the step goes on from what was stored after {chosen.about['done']} chunks of the "
                f"{chosen.about['phase']} phase"
            )
        self._kept = [chosen]
        return self._read(chosen)

    def _found(self) -> tuple[list[_Generation], str | None, list[str]]:
        """This rank's generations of this step (their files not checked yet); what else is stored under its key, in words;
        and what is damaged."""
        own: list[_Generation] = []
        trouble: list[str] = []
        others, over = None, False
        words, listed = self._words(trouble)
        for number in self._numbers("json") | listed:
            try:
                manifest = Manifest.read(self.folder / f"{number}.json", _KINDS)
                about = manifest.body
                if about["generation"] != number:
                    raise DamagedFileError(f"{self.folder / f'{number}.json'} is that of generation {about['generation']}")
            except (OSError, DamagedFileError) as error:
                trouble.append(
                    f"{self.folder / f'{number}.json'} is missing" if isinstance(error, FileNotFoundError) else str(error)
                )
                continue
            if about["key"] != self.checkpoint.key or about["phase"] not in PHASES:
                over = True
            elif about["step"] != json_digest(self.facts):
                differ = [name for name, value in self.facts.items() if words.get(name, value) != value]
                others = f"another {' and another '.join(differ)}" if differ else "something else"
            else:
                own.append(_Generation(manifest))
        return own, others, [] if over and not own else trouble  # a step that is over may be damaged as it likes

    def _words(self, trouble: list[str]) -> tuple[dict[str, Any], set[int]]:
        """What ``step.json`` says: the stored step's facts and generations."""
        try:
            record = read_checksummed_json(self.folder / "step.json", {"key": str, "facts": dict, "generations": list})
        except FileNotFoundError:
            return {}, set()
        except (OSError, DamagedFileError) as error:
            trouble.append(str(error))
            return {}, set()
        mine = record["key"] == self.checkpoint.key  # else it is what is left of a step that is over
        return (record["facts"], {int(n) for n in record["generations"]}) if mine else ({}, set())

    def _numbers(self, suffix: str) -> set[int]:
        """Of the generations that have such a file."""
        return {int(file.stem) for file in self.folder.glob(f"*.{suffix}") if file.stem.isdecimal()}

    def _wrong(self, generation: _Generation) -> str | None:
        """What is damaged of a generation, as a sentence."""
        try:
            generation.manifest.verify()
        except (OSError, DamagedFileError) as error:
            return str(error)
        return None

    def _read(self, generation: _Generation) -> SavedStep:
        about = generation.about
        parts = [load_file(self.folder / name)["rows"] for name in about["carries"]]
        carries = torch.cat(parts)[: about["rows"]] if parts else None
        return SavedStep(about["phase"], about["done"], load_file(self.folder / f"{generation.number}.safetensors"), carries)

    # --- writing -------------------------------------------------------------------------------------------------------

    def save(self, phase: str, done: int, tensors: Mapping[str, Tensor], new_rows: Callable[[int], Tensor | None]) -> None:
        """Store a generation; every rank of the group calls it at the same chunk.

        Where a rank cannot write, that is told, ``problem`` says why, and what was stored before stays.

        Args:
            phase, done: chunks done.
            tensors: on any device.
            new_rows: from the first of the carries that is not stored yet, all that are there; None where there are none.
        """
        before: dict[str, Any] = self._kept[-1].about if self._kept else {"rows": 0, "carries": [], "files": {}}
        rows, told = new_rows(before["rows"]), self.problem
        generation: _Generation | None = None
        self._last = time.monotonic()
        try:
            generation = self._write(phase, done, tensors, rows, before)
            self.problem = None
        except OSError as error:
            self.problem = str(error)
        if not min_over_ranks(int(generation is not None), self.group):  # it counts for all ranks, or for none
            self.problem = self.problem or "another rank could not store its part of the step"
            if told is None:
                print_line(f"{self.problem}: the step goes on and is stored again later")
        else:
            assert generation is not None
            self._kept = [*self._kept, generation][-KEPT:]
            self._write_words()
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
        about = {
            "generation": number,
            "key": self.checkpoint.key,
            "step": json_digest(self.facts),
            "phase": phase,
            "done": done,
            "rows": count,
            "carries": carries,
        }
        return _Generation(Manifest.write(self.folder / f"{number}.json", about, files))

    def _write_words(self) -> None:
        """``step.json``. Nothing depends on it: where it cannot be written, there is none."""
        file, generations = self.folder / "step.json", [g.number for g in self._kept]
        try:
            write_checksummed_json(file, {"key": self.checkpoint.key, "facts": dict(self.facts), "generations": generations})
        except OSError:
            with suppress(OSError):
                file.unlink()


def _place(folder: str | Path) -> Path:
    return Path(folder) / f"rank-{dist.get_rank() if dist.is_initialized() else 0}"


def tokens_digest(tokens: Tokens) -> str:
    """Of a text's shape and of pieces all over it: quick for any length."""
    length = int(tokens.shape[1])
    digest = hashlib.blake2b(str(tuple(tokens.shape)).encode(), digest_size=16)
    for n in range(PIECES):
        start = n * max(0, length - PIECE) // max(1, PIECES - 1)
        piece = tokens[:, start : start + PIECE]
        piece = piece if isinstance(piece, np.ndarray) else piece.cpu().numpy()
        digest.update(np.ascontiguousarray(piece, dtype=np.int64).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Of every parameter's name, shape, sum, sum of squares, and a sum with weights that differ by place."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        wide = p.detach().double().flatten()
        sums = torch.stack([wide.sum(), wide.square().sum(), wide.dot(torch.linspace(1, 2, len(wide)).to(wide))]).tolist()
        digest.update(f"{name} {tuple(p.shape)} {sums!r}".encode())
    return digest.hexdigest()
