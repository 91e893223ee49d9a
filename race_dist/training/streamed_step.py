"""A step that streams its sequences: exact gradients of contexts of any length, one chunk's activations at a time."""

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

TOLD_EVERY = 30.0  # seconds between two lines of a step under way


class _Rows(NamedTuple):
    """Whole sequences, the same on every rank that shares them: ``[B, T]`` each, and the documents in one (B = 1)."""

    inputs: Tokens
    labels: Tokens
    cu_seqlens: Tensor | None


class StreamedForwardBackward:
    """Each part of this rank's rows is streamed, one after the other."""

    def __init__(self, config: TrainConfig, model: DecoderLM, mesh: RankMesh) -> None:
        self.config, self.mesh = config, mesh
        self.replica: DataParallelModel = build_replica(config, model, mesh, dynamic=False)
        self._folder: Path | None = None
        self._stop: Callable[[], bool] | None = None
        self._told = 0.0

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        # FSDP2 holds the gradients of chunks itself, out of reach
        stored = folder is not None and self.config.stream.minutes > 0 and not self.replica.is_sharded
        self._folder, self._stop = folder if stored else None, stop

    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`.

        Raises:
            StepInterrupted: somebody asked to stop; the step is stored, if :meth:`begin` has said where.
            CheckpointError: what is stored of this very step is of other chunks or ranks.
        """
        config, total = self.config, torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        parts = list(self._parts(batch))
        weights = "" if self._folder is None else weights_digest(self.replica.model)
        for rows in parts:
            sequences, checkpoint = _read(batch, rows), None
            if self._folder is not None:
                key = f"weights {weights}, windows at {[batch.starts[row] for row in rows]} of {batch.starts}"
                checkpoint = StepCheckpoint(self._folder, 60 * config.stream.minutes, key, self._stop)
            reduce: Reduce = "sum" if rows is parts[-1] and self.replica.is_sharded else "none"
            try:
                total += self._backward(sequences, batch.targets, reduce, checkpoint)
            except DamagedStepError as error:  # on every rank: the step is made again from its beginning
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

    def _backward(self, sequences: _Rows, targets: int, reduce: Reduce, checkpoint: StepCheckpoint | None) -> Tensor:
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
                progress=self._tell if mesh.rank == 0 else None,
            )

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for rows in self._parts(batch):
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

    def _parts(self, batch: Batch) -> Iterator[range]:
        """Rows that are streamed together: documents that are kept apart need a sequence of their own."""
        rows = batch.rows_of_dp_rank(self.mesh.dp_rank, self.mesh.dp)
        return micro_batches(rows, self.config.optim.accumulate if batch.split.boundaries is None else len(rows))

    def _share(self, total: Tensor) -> Tensor:
        """Every rank of a sequence knows its whole loss: the first one brings it in."""
        return total if self.mesh.rank % self.mesh.sp == 0 else torch.zeros_like(total)

    def _tell(self, progress: Progress) -> None:
        if progress.seconds < self._told:
            self._told = 0.0  # a new step has begun
        if progress.seconds - self._told >= TOLD_EVERY:
            self._told = progress.seconds
            print_line(f"  {progress}")


def _read(batch: Batch, rows: range) -> _Rows:
    """Some rows, unread where they lie in a memory map in one piece and count whole."""
    windows = [batch.row(row) for row in rows]
    whole = windows[0][None] if len(windows) == 1 else np.stack(windows)
    inputs, labels = whole[:, :-1], whole[:, 1:]
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
    return _Rows(inputs, labels, documents)
