"""Forward and backward of one step: how a global batch becomes a loss and gradients."""

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
from race_dist.training.data.splits import Split
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.weights_file import load_weights


class ForwardBackward(Protocol):
    """Computes losses and gradients of global batches.

    Attributes:
        replica: the model on this rank, called for the forward pass.
    """

    replica: DataParallelModel

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """Called before the first step.

        Args:
            folder: where a step in progress may be stored; None: nowhere.
            stop: returns True when a step in progress should end early.
        """
        ...

    def end(self) -> None:
        """Called after the last step: remove what is stored of a step in progress."""
        ...

    def gradients(self, batch: Batch) -> Tensor:
        """Compute the gradient of the global batch's mean loss, summed over all ranks, into every ``.grad`` (of sharded
        parameters: this rank's shard of it).

        Args:
            batch: the windows of all ranks; the summed loss is divided by ``batch.targets``.

        Returns:
            This rank's share of the mean loss, detached. The shares of all ranks add up to the mean loss.
        """
        ...

    def loss(self, batch: Batch) -> Tensor:
        """This rank's share of the summed loss of a batch, without gradients. The shares add up to the summed loss."""
        ...


class FullSequence:
    """Base of the implementations that run over full sequences: micro-batches of this rank's rows, without streaming."""

    config: TrainConfig
    mesh: RankMesh
    replica: DataParallelModel

    def begin(self, folder: Path | None, stop: Callable[[], bool]) -> None:
        """Nothing to do: these steps cannot be interrupted."""

    def end(self) -> None:
        """Nothing to do: nothing is stored."""

    def loss(self, batch: Batch) -> Tensor:
        """See :class:`ForwardBackward`."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for rows in micro_batches(batch.rows_of_dp_rank(self.mesh.dp_rank, self.mesh.dp), self.config.optim.accumulate):
            part = batch.shard(rows, sequence_shard(self.mesh))
            total += forward_loss(self.replica.model, part, 1, self.config, self.mesh).detach().double()
        return total


class NativeForwardBackward(FullSequence):
    """Full sequences in PyTorch, with gradient accumulation over ``optim.accumulate`` micro-batches."""

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
    """Compile, shard and initialize the model as the configuration says."""
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
    """Give a model on the meta device its initial weights. They depend only on the seed and the parameters' names, or come from
    ``init``: a safetensors file or the folder of a run."""
    model.to_empty(device=device)
    model.initialize()
    if init is not None:
        load_weights(model, Path(init))


def forward_loss(
    model: DataParallelModel | nn.Module, part: ShardedBatch, targets: int, config: TrainConfig, mesh: RankMesh
) -> Tensor:
    """The summed loss of a shard, divided by the global number of targets."""
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
    """Matrix products in bfloat16 if ``precision`` is bfloat16; weights, norms, states and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def sequence_shard(mesh: RankMesh) -> Shard:
    """This rank's shard of every sequence."""
    return Shard(mesh.sp_rank, mesh.sp, mesh.layout)


def micro_batches(rows: range, parts: int) -> Iterator[range]:
    """Split the rows of a batch into ``parts`` micro-batches of equal size."""
    size = len(rows) // parts
    return (rows[n * size : (n + 1) * size] for n in range(parts))


def random_batch(config: TrainConfig, seed: int) -> Batch:
    """A batch of random tokens, the same on every rank. Separate documents are a third of the context long."""
    data = config.data
    size = data.context + data.batch_size
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, size, dtype=np.uint32)
    boundaries = np.arange(1, size, max(1, data.context // 3)) if data.documents == "separate" else None
    split = Split(tokens, np.array([0]), np.array([0, size]), boundaries)
    return Batch(split, tuple(range(data.batch_size)), data.context, data.batch_size)
