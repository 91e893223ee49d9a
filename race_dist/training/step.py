"""One step's loss and gradients: how a global batch becomes them. The one place to put another way of computing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from race_dist.models import DecoderLM
from race_dist.parallel import DataParallelModel
from race_dist.training.config import TrainConfig
from race_dist.training.data.batches import Batch, Shard, ShardedBatch
from race_dist.training.data.corpus import Split
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.weights_file import load_weights


class ForwardBackward(Protocol):
    """How one global batch becomes gradients."""

    replica: DataParallelModel

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """Before the first step: where a step under way may be stored (None: nowhere), and who may ask it to end in its
        middle."""
        ...

    def end(self) -> None:
        """After the last step: what is stored of steps under way is no longer needed."""
        ...

    def gradients(self, batch: Batch) -> Tensor:
        """Leave in every ``.grad`` the gradient of the global batch's mean loss, summed over all ranks (of sharded
        parameters: this rank's part of it).

        Args:
            batch: the windows of all ranks; ``batch.targets`` is what the summed loss is divided by.

        Returns:
            This rank's share of the mean loss, detached: the ranks' shares add up to it.
        """
        ...

    def loss(self, batch: Batch) -> Tensor:
        """This rank's share of the summed loss of a batch, without gradients."""
        ...


def build_forward_backward(config: TrainConfig, model: DecoderLM, mesh: RankMesh) -> ForwardBackward:
    """The way that the configuration asks for. ``model`` is on the meta device; it gets its weights here."""
    if config.stream.chunk_size:
        from race_dist.training.streamed_step import StreamedForwardBackward

        return StreamedForwardBackward(config, model, mesh)
    return NativeForwardBackward(config, model, mesh)


class FullSequence:
    """What methods have in common that run over whole sequences."""

    config: TrainConfig
    mesh: RankMesh
    replica: DataParallelModel

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """Nothing: these steps are not ended in their middle."""

    def end(self) -> None:
        """Nothing is stored."""

    def loss(self, batch: Batch) -> Tensor:
        """See :class:`ForwardBackward`."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for rows in micro_batches(batch.rows_of_dp_rank(self.mesh.dp_rank, self.mesh.dp), self.config.optim.accumulate):
            part = batch.shard(rows, sequence_shard(self.mesh))
            total += forward_loss(self.replica.model, part, 1, self.config, self.mesh).detach().double()
        return total


class NativeForwardBackward(FullSequence):
    """Forward and backward over whole sequences, ``optim.accumulate`` parts of this rank's rows one after the other."""

    def __init__(self, config: TrainConfig, model: DecoderLM, mesh: RankMesh) -> None:
        self.config, self.mesh = config, mesh
        self.replica = build_replica(config, model, mesh)

    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`ForwardBackward`."""
        total: Tensor | None = None
        parts = list(micro_batches(batch.rows_of_dp_rank(self.mesh.dp_rank, self.mesh.dp), self.config.optim.accumulate))
        for rows in parts:
            part = batch.shard(rows, sequence_shard(self.mesh))
            with self.replica.backward(last=rows is parts[-1]):
                loss = forward_loss(self.replica, part, batch.targets, self.config, self.mesh)
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total


def build_replica(config: TrainConfig, model: DecoderLM, mesh: RankMesh, *, dynamic: bool | None = None) -> DataParallelModel:
    """The model on its ranks, compiled and sharded as the configuration says, with its first weights."""
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=dynamic)
    if config.parallel.sharding == "fsdp":
        replica = DataParallelModel.fully_sharded(model, mesh.world, model.blocks, device_type=mesh.device.type)
        materialize(model, mesh.device, config.init)
        return replica
    materialize(model, mesh.device, config.init)
    return DataParallelModel.replicated(model, mesh.world)


def materialize(model: DecoderLM, device: torch.device, init: str | None = None) -> None:
    """Give a model on the meta device its first weights: they depend on the seed and their names alone, or come from
    ``init``, a safetensors file or the folder of a run."""
    model.to_empty(device=device)
    model.initialize()
    if init is not None:
        load_weights(model, Path(init))


def forward_loss(
    model: DataParallelModel | nn.Module, part: ShardedBatch, targets: int, config: TrainConfig, mesh: RankMesh
) -> Tensor:
    """A part's summed loss over the global count of targets."""
    device = mesh.device
    with autocast(config, device):
        loss: Tensor = model(
            part.inputs.to(device),
            part.labels.to(device),
            group=mesh.sp_group,
            layout=mesh.layout,
            cu_seqlens=None if part.cu_seqlens is None else part.cu_seqlens.to(device),
            num_targets=max(1, targets),
        )
    return loss


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Matrix products in bfloat16 where the precision says so; weights, norms, states and sums stay wide."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def sequence_shard(mesh: RankMesh) -> Shard:
    """This rank's shard of every sequence."""
    return Shard(mesh.sp_rank, mesh.sp, mesh.layout)


def micro_batches(rows: range, parts: int) -> Iterator[range]:
    """The rows in that many parts of equal size."""
    size = len(rows) // parts
    return (rows[n * size : (n + 1) * size] for n in range(parts))


def random_batch(config: TrainConfig, seed: int) -> Batch:
    """A batch of random tokens, the same on every rank. Documents that are kept apart have a third of the context."""
    data = config.data
    size = data.context + data.batch_size
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, size, dtype=np.uint32)
    boundaries = np.arange(1, size, max(1, data.context // 3)) if data.documents == "separate" else None
    split = Split(tokens, np.array([0]), np.array([0, size]), boundaries)
    return Batch(split, tuple(range(data.batch_size)), data.context, data.batch_size)
