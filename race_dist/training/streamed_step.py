"""Streamed training steps: exact gradients of sequences of any length, with the activations of one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from race_dist.models import DecoderLM
from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import DataParallelModel
from race_dist.streaming import (
    DamagedStepError,
    OtherStepError,
    Progress,
    StepCheckpoint,
    Tokens,
    streamed_backward,
    streamed_loss,
)
from race_dist.streaming.checkpoint import weights_digest
from race_dist.streaming.gradient_accumulation import Reduce
from race_dist.terminal import print_line
from race_dist.training.checkpoint import CheckpointError
from race_dist.training.config import TrainConfig
from race_dist.training.data.batches import Batch
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.step import autocast, build_replica, micro_batches

PROGRESS_INTERVAL = 30.0  # seconds between two progress lines of one step


class _Sequences(NamedTuple):
    """Full sequences, ``[B, T]`` each, the same on every rank of the group; and the documents in one sequence (B = 1)."""

    inputs: Tokens
    labels: Tokens
    cu_seqlens: Tensor | None


class StreamedForwardBackward:
    """Streams the micro-batches of this rank's rows one after the other."""

    def __init__(self, config: TrainConfig, model: DecoderLM, mesh: RankMesh) -> None:
        self.config, self.mesh = config, mesh
        self.replica: DataParallelModel = build_replica(config, model, mesh, dynamic=False)
        self._folder: Path | None = None
        self._stop: Callable[[], bool] | None = None
        self._last_progress = 0.0

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        # a step is not stored under FSDP2, which does not expose the gradients of earlier chunks
        stored = folder is not None and self.config.stream.minutes > 0 and not self.replica.is_sharded
        self._folder, self._stop = folder if stored else None, stop

    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`.

        Raises:
            StepInterrupted: a stop was requested; the step is stored, if :meth:`begin` was given a folder.
            CheckpointError: a stored step with the same weights and windows has other chunks or ranks.
        """
        config, total = self.config, torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        parts = list(self._streamed_rows(batch))
        weights = "" if self._folder is None else weights_digest(self.replica.model)
        for rows in parts:
            sequences, checkpoint = _read(batch, rows), None
            if self._folder is not None:
                key = f"weights {weights}, windows at {[batch.starts[row] for row in rows]} of {batch.starts}"
                checkpoint = StepCheckpoint(self._folder, 60 * config.stream.minutes, key, self._stop)
            reduce: Reduce = "sum" if rows is parts[-1] and self.replica.is_sharded else "none"
            try:
                total += self._backward(sequences, batch.targets, reduce, checkpoint)
            except DamagedStepError as error:  # raised on every rank: restart the step
                assert checkpoint is not None
                checkpoint.clear()
                print_line(f"{error}: beginning the step anew")
                total += self._backward(sequences, batch.targets, reduce, checkpoint)
            except OtherStepError as error:
                raise CheckpointError(str(error)) from None
        if not self.replica.is_sharded:
            with self.replica.reducer.reduce_on_exit(overlap=False):
                pass
        return self._share(total)

    def _backward(self, sequences: _Sequences, targets: int, reduce: Reduce, checkpoint: StepCheckpoint | None) -> Tensor:
        config, mesh = self.config, self.mesh
        with autocast(config, mesh.device):
            return streamed_backward(
                self.replica.model,
                sequences.inputs,
                sequences.labels,
                chunk_size=config.stream.chunk_size,
                group=mesh.sp_group,
                cu_seqlens=sequences.cu_seqlens,
                num_targets=max(1, targets),
                reduce=reduce,
                keep=config.stream.keep,
                checkpoint=checkpoint,
                world=mesh.world,
                progress=self._print_progress if mesh.rank == 0 else None,
            )

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for rows in self._streamed_rows(batch):
            sequences = _read(batch, rows)
            with autocast(self.config, self.mesh.device):
                total += streamed_loss(
                    self.replica.model,
                    sequences.inputs,
                    sequences.labels,
                    num_targets=1,
                    chunk_size=self.config.stream.chunk_size,
                    group=self.mesh.sp_group,
                    cu_seqlens=sequences.cu_seqlens,
                )
        return self._share(total)

    def end(self) -> None:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        if self._folder is not None:
            StepCheckpoint(self._folder).clear()

    def _streamed_rows(self, batch: Batch) -> Iterator[range]:
        """Rows that are streamed together. Separate documents need a sequence per row."""
        rows = batch.rows_of_dp_rank(self.mesh.dp_rank, self.mesh.dp)
        return micro_batches(rows, self.config.optim.accumulate if batch.split.boundaries is None else len(rows))

    def _share(self, total: Tensor) -> Tensor:
        """Every rank of a sequence has its full loss: the first rank contributes it."""
        return total if self.mesh.rank % self.mesh.sp == 0 else torch.zeros_like(total)

    def _print_progress(self, progress: Progress) -> None:
        if progress.seconds < self._last_progress:
            self._last_progress = 0.0  # a new step has begun
        if progress.seconds - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = progress.seconds
            print_line(f"  {progress}")


def _read(batch: Batch, rows: range) -> _Sequences:
    """Some rows of a batch. They are not copied if they are contiguous in a memory map and all their targets count."""
    windows = [batch.row(row) for row in rows]
    tokens = windows[0][None] if len(windows) == 1 else np.stack(windows)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    starts, context = [batch.starts[row] for row in rows], batch.context
    begins = [batch.split.boundaries_in(start + 1, start + context + 1) - start - 1 for start in starts]
    if any(len(b) for b in begins) or rows[-1] >= batch.count:
        labels = labels.astype(np.int32)
        for n, (row, begin) in enumerate(zip(rows, begins)):
            labels[n, begin] = IGNORE_INDEX
            if row >= batch.count:
                labels[n] = IGNORE_INDEX
    documents = None
    if batch.split.boundaries is not None:
        inside = batch.split.boundaries_in(starts[0] + 1, starts[0] + context) - starts[0]
        documents = torch.from_numpy(np.concatenate([[0], inside, [context]]))
    return _Sequences(inputs, labels, documents)
