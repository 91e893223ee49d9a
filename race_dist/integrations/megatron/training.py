"""``engine = "megatron"``: runs of ``race-dist train`` with megatron-core's model, data parallelism, optimizer and checkpoints.

Data, initial weights, losses, learning rates, reports and the files of a run are the same as with the native engine. Steps are
computed by megatron-core (from pip, without Megatron-LM), over parallel_state's tp x cp x dp, on GPUs or on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron.checkpoint import MegatronState
from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.integrations.megatron.model import build_gpt, transformer_config
from race_dist.integrations.megatron.weights import from_megatron, gather_full_weights, load_full_weights, to_megatron
from race_dist.models import DecoderLM
from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import DataParallelModel, group_size, init_distributed, shard_positions
from race_dist.rank_environment import rank_environment
from race_dist.training.checkpoint_state import CheckpointState
from race_dist.training.config import OptimConfig, TrainConfig
from race_dist.training.data.batches import Batch
from race_dist.training.engine import CheckModel
from race_dist.training.optim import set_learning_rate
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.step import ForwardBackward, FullSequence, forward_loss, micro_batches, sequence_shard

DECAYED = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", "decay.weight")


@dataclass(frozen=True)
class MegatronRankMesh(RankMesh):
    """The mesh of a run over megatron-core's parallel_state: dp x sp x tp ranks, where sp is context parallelism.

    Attributes:
        tp_group: the tensor-parallel ranks, which share every layer's heads.
    """

    tp_group: ProcessGroup | None = None

    @classmethod
    def join(cls, config: TrainConfig) -> MegatronRankMesh:
        """As :meth:`race_dist.training.rank_mesh.RankMesh.join`. Raises ValueError for an unsupported setting."""
        _, sp = config.parallel.mesh(rank_environment().world_size)
        _check(config)
        transformer_config(config.model, tp=config.parallel.tp, cp=sp)
        device = init_distributed(device=None if config.device == "auto" else config.device, timeout=config.parallel.timeout)
        with without_cuda():
            if parallel_state.model_parallel_is_initialized():  # by an earlier run in this process
                parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=config.parallel.tp,
                context_parallel_size=sp,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=max(1, round(config.parallel.timeout / 60)),
            )
            model_parallel_cuda_manual_seed(config.seed + 1, force_reset_rng=True)
        return cls(
            device,
            dist.group.WORLD,
            parallel_state.get_context_parallel_group(),
            config.parallel.layout,
            parallel_state.get_tensor_model_parallel_group(),
        )

    @property
    def tp(self) -> int:
        """Number of tensor-parallel ranks."""
        return group_size(self.tp_group)

    @property
    def dp(self) -> int:
        """Number of data-parallel groups."""
        return group_size(self.world) // (self.sp * self.tp)

    @property
    def dp_rank(self) -> int:
        """The data-parallel group that this rank belongs to."""
        return int(parallel_state.get_data_parallel_rank())


def _check(config: TrainConfig) -> None:
    """Raise ValueError for a setting that this engine does not support."""
    for is_set, name, reason in (
        (config.precision == "float64", 'precision = "float64"', "megatron-core computes losses in float32"),
        (config.compile, "compile = true", "megatron-core compiles its own modules"),
        (
            config.parallel.sharding != "none",
            f"parallel.sharding = {config.parallel.sharding!r}",
            "parameters are divided by parallel.tp",
        ),
    ):
        if is_set:
            raise ValueError(f'engine = "megatron" does not go with {name}: {reason}')
    for name, value in (
        ("num_heads", config.model.num_heads),
        ("vocab_size", config.model.vocab_size),
        ("ffn_dim", config.model.resolved_ffn_dim),
    ):
        if value % config.parallel.tp:
            raise ValueError(f"model.{name} = {value} does not divide over parallel.tp = {config.parallel.tp}: change one")


class MegatronLM(nn.Module):
    """A GPTModel over parallel_state's ranks, with DecoderLM's call signature. Its loss is this rank's share of the mean loss.

    Attributes:
        gpt: the GPTModel.
        ddp: the GPTModel wrapped for mixed precision and data parallelism.
    """

    def __init__(self, config: TrainConfig, mesh: MegatronRankMesh) -> None:
        super().__init__()
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        settings = transformer_config(
            config.model,
            tp=mesh.tp,
            cp=mesh.sp,
            dtype=dtype,
            race_layout=mesh.layout,
            **(recompute if config.model.activation_checkpointing else {}),
        )
        self.gpt: Any = build_gpt(config.model, settings, config.data.context).to(mesh.device)
        narrow = Float16Module(settings, self.gpt) if dtype == torch.bfloat16 else self.gpt
        self.ddp: Any = DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), narrow)
        self.mesh = mesh

    @without_cuda()
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        num_targets: int,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
    ) -> Tensor:
        """This rank's summed loss, divided by ``num_targets``. The shares of all ranks add up to the mean loss."""
        positions = shard_positions(input_ids.shape[1], group, layout=layout, cu_seqlens=cu_seqlens, device=input_ids.device)
        packed = (
            None
            if cu_seqlens is None
            else PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens.int(), cu_seqlens_kv=cu_seqlens.int())
        )
        losses = self.ddp(
            input_ids, positions.expand(*input_ids.shape), None, labels=labels.clamp(min=0), packed_seq_params=packed
        )
        total: Tensor = torch.where(labels == IGNORE_INDEX, 0.0, losses).sum()
        return total / (num_targets * self.mesh.tp)  # tensor-parallel ranks compute the same loss


class MegatronReplica(DataParallelModel):
    """Gathers the full float32 weights under DecoderLM's names, for the end of a run."""

    def __init__(self, config: TrainConfig, model: MegatronLM, names: list[str]) -> None:
        super().__init__(model, model.mesh.world, is_sharded=True)
        self.config, self.names, self.gpt, self.tp_group = config.model, names, model.gpt, model.mesh.tp_group

    @without_cuda()
    def _gather(self) -> dict[str, Tensor]:
        return from_megatron(gather_full_weights(self.gpt, self.tp_group), self.config, dict.fromkeys(self.names))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by name; every rank calls it."""
        return ((name, tensor.float()) for name, tensor in self._gather().items())


class MegatronForwardBackward(FullSequence):
    """The gradients of a batch, in ``main_grad`` of every parameter."""

    mesh: MegatronRankMesh

    def __init__(self, config: TrainConfig, model: MegatronLM, names: list[str]) -> None:
        self.config, self.model, self.mesh = config, model, model.mesh
        self.replica: DataParallelModel = MegatronReplica(config, model, names)

    @without_cuda()
    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`."""
        mesh, ddp = self.mesh, self.model.ddp
        ddp.zero_grad_buffer()
        total = torch.zeros((), device=mesh.device)
        parts = list(micro_batches(batch.rows_of_dp_rank(mesh.dp_rank, mesh.dp), self.config.optim.accumulate))
        for rows in parts:
            with nullcontext() if rows is parts[-1] else ddp.no_sync():
                loss = forward_loss(self.model, batch.shard(rows, sequence_shard(mesh)), batch.targets, self.config, mesh)
                (loss * mesh.tp).backward()
            total += loss.detach()
        finalize_model_grads([ddp])
        return total


class MegatronEngine:
    """A :class:`race_dist.training.engine.Engine` with megatron-core's model, data parallelism, optimizer and checkpoints."""

    @without_cuda()
    def __init__(self, config: TrainConfig, mesh: MegatronRankMesh, check_model: CheckModel) -> None:
        """See :class:`race_dist.training.engine.NativeEngine`. The first weights are those of DecoderLM."""
        self.config, self.mesh = config, mesh
        first = DecoderLM(config.model)
        state = dict(first.named_parameters())
        self.num_parameters = sum(p.numel() for p in state.values())
        self.model: Any = MegatronLM(config, mesh)
        load_full_weights(self.model.gpt, to_megatron(state, config.model), mesh.tp_group)
        self.forward_backward: ForwardBackward = MegatronForwardBackward(config, self.model, list(state))
        self.optimizer: Any = build_optimizer(self.model.ddp, config.optim, narrow=config.precision == "bfloat16")
        check_model(first)

    def zero_grad(self) -> None:
        """See :class:`race_dist.training.engine.Engine`."""
        self.optimizer.zero_grad(set_to_none=True)

    @without_cuda()
    def gradient_norm(self) -> Tensor | None:
        """See :class:`race_dist.training.engine.Engine`."""
        self.optimizer.prepare_grads()
        return torch.tensor(float(self.optimizer.get_grad_norm()))

    @without_cuda()
    def update(self, learning_rate: float, norm: Tensor | None) -> Tensor:
        """See :class:`race_dist.training.engine.Engine`: megatron-core clips and steps."""
        assert norm is not None
        set_learning_rate(self.optimizer, learning_rate)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.optim.weight_decay * group["wd_mult"]
        self.optimizer.step()
        return norm

    def checkpoint_state(self) -> CheckpointState:
        """See :class:`race_dist.training.engine.Engine`: in megatron-core's format."""
        return MegatronState(self.model.gpt, self.optimizer)

    def describe(self) -> str:
        """See :class:`race_dist.training.engine.Engine`."""
        mesh, count = self.mesh, group_size(self.mesh.world)
        return (
            f"{self.num_parameters:,} parameters, {count} rank{'s' if count > 1 else ''} (dp {mesh.dp} x "
            f"sp {mesh.sp} x tp {mesh.tp}) on {mesh.device.type}, megatron-core {megatron.core.__version__}"
        )


def build_optimizer(model: Any, config: OptimConfig, *, narrow: bool) -> Any:
    """megatron-core's AdamW, with weight decay on the matrices of linear layers only, as in the native engine."""

    def without_decay(_: nn.Parameter, name: str) -> bool:
        return not name.endswith((*DECAYED, "output_layer.weight"))

    options = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip,
        bf16=narrow,
        params_dtype=torch.bfloat16 if narrow else torch.float32,
    )
    overrides = {ParamKey(with_name_predicate=ParamWithNamePredicate("not a linear layer", without_decay)): {"wd_mult": 0.0}}
    return get_megatron_optimizer(options, [model], config_overrides=overrides, use_gloo_process_groups=False)
