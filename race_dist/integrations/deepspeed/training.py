"""``engine = "deepspeed"``: runs of ``race-dist train`` with DeepSpeed's optimizer step and ZeRO sharding.

Data, losses, checkpoints and the files of a run are the same as with the native engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.integrations.deepspeed.checkpoint import DeepSpeedState, full_weight, link_states
from race_dist.integrations.deepspeed.config import RACE_SECTION, SEQUENCE_PARALLEL_SIZE
from race_dist.integrations.deepspeed.engine import SequenceParallelMesh, initialize
from race_dist.models import DecoderLM
from race_dist.parallel import DataParallelModel
from race_dist.training.checkpoint_state import CheckpointState
from race_dist.training.config import TrainConfig
from race_dist.training.data.batches import Batch
from race_dist.training.engine import CheckModel, describe_mesh
from race_dist.training.optim import build_optimizer
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.step import ForwardBackward, FullSequence, materialize, micro_batches, random_batch, sequence_shard


class DeepSpeedReplica(DataParallelModel):
    """The model inside a DeepSpeed engine, called through the engine."""

    def __init__(self, engine: Any, group: ProcessGroup | None) -> None:
        super().__init__(engine.module, group, is_sharded=True)
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights by name, gathered, on every rank."""
        return ((name, full_weight(p)) for name, p in self.model.named_parameters())


class DeepSpeedForwardBackward(FullSequence):
    """Computes the gradients of a global batch in DeepSpeed's buffers."""

    def __init__(self, config: TrainConfig, mesh: RankMesh, engine: Any) -> None:
        self.config, self.mesh, self.engine = config, mesh, engine
        self.replica: DataParallelModel = DeepSpeedReplica(engine, mesh.world)

    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.ForwardBackward`; ``engine.step()`` has to follow."""
        parts, mesh = self.config.optim.accumulate, self.mesh
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        scale = mesh.dp * parts  # DeepSpeed averages over replicas and over micro-batches
        for n, rows in enumerate(micro_batches(batch.rows_of_dp_rank(mesh.dp_rank, mesh.dp), parts)):
            part = batch.shard(rows, sequence_shard(mesh))
            cu_seqlens = None if part.cu_seqlens is None else part.cu_seqlens.to(mesh.device)
            loss = self.engine(
                part.inputs.to(mesh.device),
                part.labels.to(mesh.device),
                cu_seqlens=cu_seqlens,
                num_targets=max(1, batch.targets) / scale,
            )
            self.engine.backward(loss)
            if n + 1 < parts:
                self.engine.step()  # counts the micro-batch; only the last one's changes the weights
            total += loss.detach().double()
        return total / scale


class DeepSpeedEngine:
    """A :class:`race_dist.training.engine.Engine` whose parameters, gradients and optimizer states DeepSpeed holds.

    ``config.deepspeed`` is the DeepSpeed configuration; what the run's own configuration says (batch, mesh, clipping,
    precision) is filled in. Checkpoints are those of the native engine, and are read at any ZeRO stage and on any mesh.
    """

    def __init__(self, config: TrainConfig, mesh: RankMesh, check_model: CheckModel) -> None:
        """See :class:`race_dist.training.engine.NativeEngine`."""
        self.config, self.mesh = config, mesh
        settings = deepspeed_config(config, mesh)
        self.model: Any = DecoderLM(config.model, dtype=torch.float32, device="meta")
        if config.compile:
            for block in self.model.blocks:
                block.compile()
        materialize(self.model, mesh.device, config.init)
        check_model(self.model)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        optimizer: Any = build_optimizer(self.model, config.optim)
        sequence_mesh = SequenceParallelMesh(mesh.sp_group, mesh.sp, mesh.dp, mesh.dp_rank, mesh.layout)
        self.engine, self.optimizer, _, _ = initialize(
            model=self.model, config=settings, optimizer=optimizer, sequence_mesh=sequence_mesh
        )
        self.forward_backward: ForwardBackward = DeepSpeedForwardBackward(config, mesh, self.engine)
        self.has_states = False  # whether AdamW has made its states

    def zero_grad(self) -> None:
        """Nothing to do: DeepSpeed discards the gradients in its step."""

    def gradient_norm(self) -> Tensor | None:
        """None: DeepSpeed computes it in its step."""
        return None

    def update(self, learning_rate: float, norm: Tensor | None = None) -> Tensor:
        """See :class:`race_dist.training.engine.Engine`: DeepSpeed's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        grads = [p.grad for p in self.model.parameters() if p.grad is not None] if self.is_plain else []
        norm = torch.nn.utils.get_total_norm(grads) if grads else None
        self.engine.step()
        self.has_states = True
        return torch.tensor(float(self.engine.get_global_grad_norm()), dtype=torch.float64) if norm is None else norm

    @property
    def is_plain(self) -> bool:
        """Whether DeepSpeed uses the AdamW directly, on the model's own parameters: ZeRO-0 in float32."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    @property
    def adamw(self) -> Any:
        """The AdamW inside DeepSpeed's optimizer."""
        return self.engine.optimizer if self.is_plain else self.engine.optimizer.optimizer

    def checkpoint_state(self) -> CheckpointState:
        """See :class:`race_dist.training.engine.Engine`."""
        return DeepSpeedState(self)

    def make_states(self) -> None:
        """Create AdamW's states, as its first step would, by a step of rate 0 on gradients of 0, which changes no weight."""
        handles = [p.register_hook(torch.zeros_like) for p in self.model.parameters() if p.requires_grad]
        self.forward_backward.gradients(random_batch(self.config, seed=0))
        self.update(0.0)
        link_states(self.engine.optimizer)
        for handle in handles:
            handle.remove()

    def describe(self) -> str:
        """See :class:`race_dist.training.engine.Engine`."""
        return describe_mesh(self.num_parameters, self.mesh, is_sharded=True)


def deepspeed_config(config: TrainConfig, mesh: RankMesh) -> dict[str, Any]:
    """``config.deepspeed``, completed from the run's configuration.

    Raises:
        ValueError: the two contradict each other, or DeepSpeed does not support a setting.
    """
    if config.precision == "float64":
        raise ValueError('precision = "float64" is not known to DeepSpeed; take engine = "native"')
    if config.parallel.sharding != "none":
        raise ValueError(
            f'parallel.sharding = "{config.parallel.sharding}" beside engine = "deepspeed": leave it out and set '
            "deepspeed.zero_optimization.stage"
        )
    tree = dict(config.deepspeed)
    if config.compile and (tree.get("zero_optimization") or {}).get("stage") == 3:
        raise ValueError(
            "compile = true traces blocks whose weights ZeRO-3 has taken apart, which fails: set compile = false, "
            "or deepspeed.zero_optimization.stage to at most 2"
        )
    for key, instead in (("optimizer", "optim"), ("scheduler", "optim.lr, optim.warmup_steps and optim.final_lr")):
        if tree.get(key, "auto") != "auto":
            raise ValueError(f"deepspeed.{key} is not read by race-dist train: set {instead} of the run")
        tree.pop(key, None)
    parts = config.optim.accumulate
    ours: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // mesh.dp // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": config.optim.clip,
        SEQUENCE_PARALLEL_SIZE: mesh.sp,
    }
    for key, value in ours.items():
        if tree.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"deepspeed.{key} = {tree[key]!r} but the run's configuration makes it {value!r}: leave it out or "
                "make them agree"
            )
    layout = (tree.pop(RACE_SECTION, None) or {}).get("layout", mesh.layout)
    if layout != mesh.layout:
        raise ValueError(f"deepspeed.{RACE_SECTION}.layout = {layout!r} but parallel.layout = {mesh.layout!r}: make them agree")
    if (tree.get("bf16") or {}).get("enabled", "auto") == "auto":
        tree["bf16"] = (tree.get("bf16") or {}) | {"enabled": config.precision == "bfloat16"}
    # the optimizer is PyTorch's AdamW: DeepSpeed need not know it, nor compile its own one for offloaded states
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | tree | ours
